"""The Triton engine against the eager reference: on a GPU, or by numpy where there is none.

Whether Triton interprets kernels is settled when it is imported, so that without a GPU these tests
run in a process of their own, which one test starts. Another compiles every kernel for real.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, fake_quantize
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams
from loguru import logger

from calipers.engines import dispatch
from calipers.engines.dispatch import choose_engine, triton_problem
from calipers.engines.kernels import GridProblem, GridReference
from calipers.formats import Format
from calipers.observers import Observer
from calipers.ranges import Groups, ShrinkGrid, group_values, min_max, search_grid_ranges
from calipers.ranges.optimal import search_optimal_scales

HERE = Path(__file__)
INSTALLED = importlib.util.find_spec("triton") is not None
INTERPRETED = INSTALLED and os.environ.get("TRITON_INTERPRET") == "1"
HAS_GPU = INSTALLED and torch.cuda.is_available() and not INTERPRETED

needs_triton = pytest.mark.skipif(not INSTALLED, reason="triton is not installed")
#: Two errors this close (relative) may be told apart either way by the order of a float32 sum and
#: by the rounding of a power.
TIE = 1e-6
DEFAULTS = ShrinkGrid(maxshrink=0.2, grid=100, patience=5, norm=2.4)
CPU = torch.device("cpu")


@pytest.fixture(
    params=[
        pytest.param(
            "cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="not interpreted here")
        ),
        pytest.param(
            "cuda",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="no CUDA device")],
        ),
    ]
)
def device(request) -> torch.device:
    return torch.device(request.param)


# The interpreter's numpy tells of every overflow, which is in order for denormals.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def preset(name: str) -> QuantizationArgs:
    return preset_name_to_scheme(name, ["Linear"]).weights


def group(bits: int, size: int, **fields) -> QuantizationArgs:
    return QuantizationArgs(num_bits=bits, strategy="group", group_size=size, **fields)


def awkward(rows: int, cols: int, seed: int = 7) -> torch.Tensor:
    """Gauss, Laplace and Student rows; outliers, zeros, single values, tiny ones among them."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, cols, generator=generator)
    heavy = torch.rand(rows, cols, generator=generator).clamp(1e-4, 1 - 1e-4) - 0.5
    values[::3] = -heavy[::3].sign() * torch.log1p(-2 * heavy[::3].abs())
    values[1::3] /= (torch.rand(values[1::3].shape, generator=generator) + 0.05).sqrt()
    values[::7, ::50] *= 20
    for row, factor in ((5, 0), (6, torch.arange(cols) == 0), (9, 1e-39), (10, 1e-30)):
        if row < rows:
            values[row] *= factor
    return values * 0.02


def errors_of(view: Groups, found, args, norm, weights, global_scale) -> torch.Tensor:
    """Error of every group of a view under a range, in float64 sums."""
    low, high = found
    scale, zero_point = calculate_qparams(low, high, args, global_scale=global_scale)
    kept, reduced = view.kept_dims, view.reduce_dims
    values = view.gathered().permute(*kept, *reduced).reshape(*view.qparam_shape, -1).float()
    if view.finite_only:
        values = torch.where(values.isfinite(), values, 0)
    token_args = args.model_copy(update={"strategy": "token"})
    rounded = fake_quantize(
        values, scale.unsqueeze(-1), zero_point.unsqueeze(-1), token_args, global_scale
    )
    loss = (rounded.double() - values.double()).abs() ** norm
    if weights is not None:
        loss *= weights.gathered().permute(*kept, *reduced).reshape(values.shape)
    return loss.sum(-1)


def assert_like_the_reference(
    value, args, device, grid=DEFAULTS, *, importance=None, global_scale=None, g_idx=None,
    finite_only=False, engine="triton",
) -> None:  # fmt: skip
    """The engine's range of each group is the reference's, or its error is as small."""
    value = value.to(device)
    views = list(group_values(value, "weight", args, g_idx))
    weights = None
    if importance is not None:
        importance = importance.to(device).expand_as(value)
        weights = list(group_values(importance, "weight", args, g_idx))
    if finite_only:
        views = [view.finite() for view in views]
    extremes = [min_max(view) for view in views]
    if global_scale is not None:
        global_scale = global_scale.to(device)
    ours, theirs = (
        search_grid_ranges(
            views, extremes, args, grid, importance=weights, global_scale=global_scale, engine=name
        )
        for name in (engine, "eager")
    )
    assert engine not in dispatch._failures, dispatch._failures
    assert choose_engine(device, engine, 2**40) == engine
    if args.strategy == "tensor_group" and global_scale is None:
        args = args.model_copy(update={"scale_dtype": None})
    groups = ties = 0
    for position, (view, mine, other) in enumerate(zip(views, ours, theirs, strict=True)):
        weight = None if weights is None else weights[position]
        assert mine[0].shape == view.qparam_shape
        differ = (mine[0] != other[0]) | (mine[1] != other[1])
        # A NaN or a range too small for its scale to have an inverse.
        differ &= ~(mine[1].isnan() & other[1].isnan()) & (extremes[position][1].abs() > 1e-36)
        found, best = (
            errors_of(view, each, args, grid.norm, weight, global_scale) for each in (mine, other)
        )
        gap = ((found - best).abs() / best.abs().clamp(min=1e-300))[differ]
        assert bool((gap <= TIE).all()), f"{int((gap > TIE).sum())} of {gap.numel()} are worse"
        groups, ties = groups + differ.numel(), ties + int(differ.sum())
    assert ties <= max(1, groups * 1e-3), f"{ties} of {groups} differ"


NORMS = (0.5, 1.0, 2.0, 3.0, 4.0)
FORMATS = {
    **{f"int{bits}": (group(bits, 32), DEFAULTS) for bits in range(2, 9)},
    **{f"int{bits} asymmetric": (group(bits, 32, symmetric=False), DEFAULTS) for bits in (2, 4, 8)},
    "fp8": (QuantizationArgs(num_bits=8, type="float", strategy="channel"), DEFAULTS),
    "fp4": (group(4, 32, type="float"), DEFAULTS),
    "mxfp4": (preset("MXFP4"), DEFAULTS),
    "mxfp8": (preset("MXFP8"), DEFAULTS),
    "nvfp4": (preset("NVFP4"), DEFAULTS),
    "nvfp4 expanded": (preset("NVFP4"), ShrinkGrid(1 - 0.8 / 1.8, 200, 1000, 2.4, 1.8)),
    "bfloat16 scales": (group(4, 32, scale_dtype=torch.bfloat16), DEFAULTS),
    "float16 scales": (group(4, 32, symmetric=False, scale_dtype=torch.float16), DEFAULTS),
    "more than 32 steps": (group(4, 32), ShrinkGrid(0.95, 70, 0, 2.0, include_end=True)),
    **{f"norm {norm}": (group(4, 32), ShrinkGrid(0.3, 40, 5, norm)) for norm in NORMS},
}


class TestLikeTheReference:
    @pytest.mark.parametrize("name", FORMATS)
    def test_formats(self, name, device):
        args, grid = FORMATS[name]
        assert_like_the_reference(awkward(50, 128), args, device, grid)

    @pytest.mark.parametrize("name", ["NVFP4", "MXFP4"])
    def test_values_on_the_lattice(self, name, device):
        """Powers of two and ties, where a scale off by one bit would be another one."""
        value = awkward(24, 64).mul(2000).round().div(64)
        scale = 2688 / value.abs().max().reshape(1) if name == "NVFP4" else None
        assert_like_the_reference(value, preset(name), device, global_scale=scale)

    def test_global_scale(self, device):
        value = awkward(100, 128)
        value[20:40] *= 2e-5  # their scales are below the normal numbers of E4M3
        scale = 2688 / value.abs().max().reshape(1)
        assert_like_the_reference(value, preset("NVFP4"), device, global_scale=scale)

    @pytest.mark.parametrize("size", [1, 2, 3, 16, 100, 128, 1000])
    def test_groups_of_any_length(self, size, device):
        assert_like_the_reference(awkward(12 if size > 16 else 2, 1001), group(4, size), device)

    @pytest.mark.parametrize(
        "args",
        [
            QuantizationArgs(num_bits=4, strategy="tensor"),
            QuantizationArgs(num_bits=4, strategy="channel", symmetric=False),
            QuantizationArgs(num_bits=4, strategy="block", block_structure=[48, 32]),
            QuantizationArgs(num_bits=4, strategy="block", block_structure=[97, 150]),
        ],
        ids=["tensor", "channel", "block", "long block"],
    )
    def test_strategies_with_short_ends(self, args, device):
        assert_like_the_reference(awkward(100, 150), args, device)

    def test_long_groups(self, device):
        """Two runs and a little more than two."""
        for cols in (8192, 8200):
            args = QuantizationArgs(num_bits=4, strategy="channel")
            assert_like_the_reference(awkward(3, cols), args, device)

    def test_a_stack_of_strided_matrices(self, device):
        """Experts, transposed, with every other column: three dimensions to walk through."""
        value = awkward(3 * 64, 70).view(3, 64, 70).transpose(1, 2)[:, :, ::2]
        importance = awkward(1, 32).abs()
        assert_like_the_reference(value, group(4, 16), device, importance=importance)
        args = QuantizationArgs(num_bits=4, strategy="block", block_structure=[32, 16])
        assert_like_the_reference(value, args, device, importance=importance)

    def test_a_layout_that_has_to_be_copied(self, device):
        value = awkward(64, 96).view(2, 2, 2, 8, 96)[:, ::2, :, ::2].transpose(0, 3)
        args = QuantizationArgs(num_bits=4, strategy="channel")
        assert_like_the_reference(value, args, device)

    @pytest.mark.parametrize("sizes", ["equal", "unequal"])
    def test_columns_in_any_order(self, sizes, device):
        g_idx = torch.arange(128).remainder(4)
        if sizes == "unequal":
            g_idx[:10] = 0
        g_idx = g_idx.to(device)
        importance = awkward(1, 128).abs()
        assert_like_the_reference(
            awkward(20, 128), group(4, 32), device, importance=importance, g_idx=g_idx
        )

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_dtypes(self, dtype, device):
        assert_like_the_reference(awkward(40, 128).to(dtype), group(4, 32), device)

    def test_importance(self, device):
        importance = awkward(1, 128).abs()
        importance[0, ::5] = 0
        grid = ShrinkGrid(0.95, 20, 5, 3.0, include_end=True)
        assert_like_the_reference(
            awkward(40, 128), group(4, 32), device, grid, importance=importance
        )

    def test_values_that_are_not_finite(self, device):
        value = awkward(20, 128)
        value[0, 0], value[1, 5], value[2, 7] = torch.nan, torch.inf, -torch.inf
        assert_like_the_reference(value, group(4, 32), device)
        assert_like_the_reference(value, group(4, 32), device, finite_only=True)

    @pytest.mark.parametrize("patience", [1, 2, 3, 4, 6, 7])
    def test_patience_cuts_at_the_same_step(self, patience, device):
        """Few groups, so that runs of steps without a gain come."""
        grid = ShrinkGrid(0.9, 40, patience, 2.4)
        for seed in range(5):
            value = torch.randn(2, 32, generator=torch.Generator().manual_seed(seed))
            assert_like_the_reference(value, group(4, 32), device, grid)

    def test_patience_over_views_and_long_groups(self, device, monkeypatch):
        """What a view gains keeps the others going; long groups take their late gains back too."""
        from calipers.engines.triton import grid as grid_triton

        monkeypatch.setattr(grid_triton, "TILE", 16)
        for seed in range(3):
            value = torch.randn(1, 48, generator=torch.Generator().manual_seed(seed))
            grid = ShrinkGrid(0.9, 40, 2, 2.4)
            assert_like_the_reference(value, group(4, 32), device, grid)

    @pytest.mark.parametrize("tile", [4096, 16], ids=["short groups", "long groups"])
    def test_late_gains_are_taken_back(self, tile, device, monkeypatch):
        """Values for which the cut matters: without it another step would have won."""
        from calipers.engines.triton import grid as grid_triton

        monkeypatch.setattr(grid_triton, "TILE", tile)
        for seed in (34, 51, 52):
            value = torch.randn(1, 32, generator=torch.Generator().manual_seed(seed)).to(device)
            views = group_values(value, "weight", group(4, 32))
            extremes = [min_max(view) for view in views]
            found = {}
            for engine, patience in (("triton", 2), ("eager", 2), ("triton", 0)):
                grid = ShrinkGrid(0.9, 40, patience, 2.4)
                ranges = search_grid_ranges(views, extremes, group(4, 32), grid, engine=engine)
                found[engine, patience] = float(ranges[0][1])
            assert found["triton", 2] == found["eager", 2]
            assert found["triton", 2] != found["triton", 0]

    def test_nothing_at_all(self, device):
        value = torch.empty(0, 32, device=device)
        views = group_values(value, "weight", group(4, 32))
        empty = torch.empty(0, 1, device=device)
        found = search_grid_ranges(views, [(empty, empty)], group(4, 32), DEFAULTS, engine="triton")
        assert found[0][0].shape == (0, 1)
        assert "triton" not in dispatch._failures

    def test_by_an_observer(self, device, monkeypatch):
        value = awkward(20, 128).to(device)
        value = value[value.abs().amax(dim=1) > 1e-36]  # denormal numbers have few bits to agree in
        expected = Observer.load_from_registry("memoryless_mse", group(4, 32))(value)
        monkeypatch.setenv("CALIPERS_ENGINE", "triton")
        found = Observer.load_from_registry("memoryless_mse", group(4, 32))(value)
        assert torch.equal(found[0], expected[0])

    def test_arguments_that_the_kernels_do_not_know_are_left_to_the_reference(self, device):
        args = QuantizationArgs(num_bits=8, type="float", strategy="channel", symmetric=False)
        assert_like_the_reference(awkward(4, 64), args, device)


def optimal_twice(value, args, importance=None, **options):
    """Scales, zero points and errors of all groups, by the engine and by the reference."""
    views = list(group_values(value, "weight", args))
    extremes = [min_max(view) for view in views]
    weights = None
    if importance is not None:
        importance = importance.to(value.device).expand_as(value)
        weights = list(group_values(importance, "weight", args))
    for engine in ("triton", "eager"):
        found = search_optimal_scales(
            views, extremes, args, importance=weights, engine=engine, **options
        )
        errors = []
        for position, (view, pair) in enumerate(zip(views, found, strict=True)):
            scale, zero_point = (t.unsqueeze(-1) for t in pair)
            kept, reduced = view.kept_dims, view.reduce_dims
            x = view.gathered().permute(*kept, *reduced).reshape(*view.qparam_shape, -1).float()
            token_args = args.model_copy(update={"strategy": "token", "scale_dtype": None})
            loss = (fake_quantize(x, scale, zero_point, token_args).double() - x).square()
            if weights is not None:
                weight = weights[position].gathered().permute(*kept, *reduced)
                loss *= weight.reshape(x.shape)
            errors.append(loss.sum(-1).flatten())
        yield torch.cat([t.flatten() for t, _ in found]), torch.cat(errors)
    assert "triton" not in dispatch._failures, dispatch._failures


class TestOptimal:
    """Sums for candidate scales, by the scales that `search_optimal_scales` makes of them."""

    @pytest.mark.parametrize("weighted", [False, True])
    @pytest.mark.parametrize(
        "name", ["int2", "int4", "int8", "int4 asymmetric", "fp8", "fp4", "mxfp4", "nvfp4"]
    )
    def test_formats(self, name, weighted, device):
        value = awkward(60, 128).to(device)
        value = value[value.abs().amax(1) > 1e-20]  # whose sums are normal numbers
        importance = awkward(1, 128).abs() if weighted else None
        args, _ = FORMATS[name]
        (mine, errors), (theirs, expected) = optimal_twice(value, args, importance)
        torch.testing.assert_close(errors, expected, rtol=2e-3, atol=1e-12)
        assert float((mine / theirs - 1).abs().gt(1e-5).float().mean()) < 0.02

    def test_signed(self, device):
        (mine, errors), (_, expected) = optimal_twice(
            awkward(20, 128)[11:].to(device), group(4, 32), negative_scales=True
        )
        assert bool((mine < 0).any())
        torch.testing.assert_close(errors, expected, rtol=2e-3, atol=1e-12)

    @pytest.mark.parametrize("cols", [4500, 8192])
    def test_long_groups(self, cols, device):
        args = QuantizationArgs(num_bits=4, strategy="channel")
        (_, errors), (_, expected) = optimal_twice(awkward(3, cols).to(device), args)
        torch.testing.assert_close(errors, expected, rtol=2e-3, atol=1e-12)

    def test_every_sum(self, device):
        """The kernel itself, rows that fit a block and rows that do not."""
        from calipers.engines.triton import sums as sums_triton
        from calipers.ranges.candidate_sums import Sums

        for args in (group(4, 32), group(4, 32, symmetric=False), group(4, 32, type="float")):
            rounding = Format.of(args)
            for length in (33, 5000):
                x = awkward(7, length)[:5].to(device)
                inverse = 1 / x.abs().amax(1).clamp(min=1e-6)
                ratio = torch.linspace(0.05, 0.2, 4).unsqueeze(1).repeat(1, 5).to(device)
                zero = None if args.symmetric else torch.full_like(ratio, 1.0)
                weight = awkward(5, length, seed=1).abs().to(device)
                found = sums_triton.sum_rows(rounding, x, weight, inverse, ratio, zero)
                every = Sums(rounding, "all", 4)
                expected = every(x, weight, inverse, ratio, zero)
                torch.testing.assert_close(every.of_all(found), expected, rtol=1e-4, atol=1e-6)
                bounded = Sums(rounding, "bounded residual", 4)
                if not rounding.integer:
                    expected = bounded(x, weight, inverse, ratio, zero)
                    torch.testing.assert_close(
                        bounded.of_all(found), expected, rtol=1e-4, atol=1e-6
                    )


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="no CUDA device")
class TestOnAGpu:
    """What only a device can show."""

    @pytest.mark.parametrize("name", ["int4", "int4 asymmetric", "fp8", "nvfp4", "mxfp4"])
    def test_many_groups(self, name):
        args, grid = FORMATS[name]
        size = 1024 if args.strategy == "channel" else 4096
        value = awkward(4096, size).bfloat16()
        assert_like_the_reference(value, args, torch.device("cuda"), grid)

    def test_the_search_does_not_wait(self):
        device = torch.device("cuda")
        value = awkward(64, 8200).bfloat16().to(device)
        for strategy in ({"group_size": 128}, {"strategy": "channel"}, {"strategy": "tensor"}):
            args = QuantizationArgs(num_bits=4, **strategy)
            views = group_values(value, "weight", args)
            extremes = [min_max(view) for view in views]
            search_grid_ranges(views, extremes, args, DEFAULTS)  # compiles
            torch.cuda.set_sync_debug_mode("error")
            try:
                search_grid_ranges(views, extremes, args, DEFAULTS)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            assert "triton" not in dispatch._failures

    def test_scratch_memory(self):
        device = torch.device("cuda")
        value = torch.randn(4096, 4096, device=device).bfloat16()
        for args in (group(4, 128), preset("NVFP4"), QuantizationArgs(strategy="tensor")):
            views = group_values(value, "weight", args)
            extremes = [min_max(view) for view in views]
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            found = search_grid_ranges(views, extremes, args, DEFAULTS)
            results = sum(t.nbytes for pair in found for t in pair)
            assert torch.cuda.max_memory_allocated() - before - results <= 64 * 2**20

    def test_all_devices_and_engines_agree(self):
        value, args = awkward(64, 128), group(4, 32)
        found = []
        for place, engine in (("cpu", "eager"), ("cuda", "eager"), ("cuda", "triton")):
            views = group_values(value.to(place), "weight", args)
            ranges = search_grid_ranges(
                views, [min_max(v) for v in views], args, DEFAULTS, engine=engine
            )
            found.append(ranges[0][1].cpu())
        differ = [int((each != found[0]).sum()) for each in found]
        assert max(differ) <= 1, differ

    def test_it_is_chosen(self, monkeypatch):
        monkeypatch.delenv("CALIPERS_ENGINE")
        assert choose_engine(torch.device("cuda")) == "triton"


class TestChoice:
    @pytest.fixture(autouse=True)
    def _fresh(self, monkeypatch):
        monkeypatch.delenv("CALIPERS_ENGINE")
        monkeypatch.setattr(dispatch, "_failures", {})
        dispatch._warn_once.cache_clear()

    def test_the_cpu_only_in_the_interpreter(self, monkeypatch):
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        assert triton_problem(CPU) == "the triton engine works on CUDA devices, not on cpu"
        messages: list[str] = []
        sink = logger.add(messages.append, format="{message}", level="WARNING")
        try:
            assert choose_engine(CPU, "triton") == choose_engine(CPU, "triton") == "eager"
        finally:
            logger.remove(sink)
        assert len(messages) == 1

    def test_without_the_package(self, monkeypatch):
        monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda _: None)
        problem = "the triton engine needs the package triton, which is not installed"
        cuda = torch.device("cuda")
        assert triton_problem(cuda) == problem
        assert choose_engine(cuda) == "eager"

    def test_a_gpu_that_is_too_old(self, monkeypatch):
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda _: object())
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (6, 1))
        assert "needs compute capability 7.5, and cuda:0 has 6.1" in str(
            triton_problem(torch.device("cuda", 0))
        )

    def test_a_gpu_takes_triton_however_little_there_is(self, monkeypatch):
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda _: object())
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
        assert choose_engine(torch.device("cuda"), values=1) == "triton"


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
def test_in_the_interpreter():
    """The tests above, by numpy."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-k",
            "not gpu",
            str(HERE),
        ],
        cwd=HERE.parents[2],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")
@pytest.mark.parametrize("capability", [75, 90])
def test_every_kernel_compiles(capability, monkeypatch):
    """To machine code by Triton's own assembler, for an old GPU and a newer one; none is needed."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_kernel

    from calipers.engines.triton import grid as grid_triton
    from calipers.engines.triton import launch as launching
    from calipers.engines.triton import sums as sums_triton

    names = {
        torch.float32: "*fp32",
        torch.bfloat16: "*bf16",
        torch.int32: "*i32",
        torch.int64: "*i64",
    }
    compiled = set()

    def launch(kernel, programs, arguments):
        assert set(arguments) == {p.name for p in kernel.params}
        signature, constants, hints = {}, {}, {}
        for index, parameter in enumerate(kernel.params):
            value = arguments[parameter.name]
            if parameter.is_constexpr or (isinstance(value, int) and value == 1):
                signature[parameter.name], constants[(index,)] = "constexpr", value
                continue
            is_tensor = isinstance(value, torch.Tensor)
            signature[parameter.name] = names[value.dtype] if is_tensor else "i32"
            if is_tensor or value % 16 == 0:
                hints[(index,)] = [["tt.divisibility", 16]]
        source = ASTSource(kernel, signature, constants, hints)
        target = GPUTarget("cuda", capability, 32)
        done = compile_kernel(source, target=target, options=launching.OPTIONS)
        assert done.asm["cubin"]
        compiled.add(kernel.__name__)

    monkeypatch.setattr(launching, "launch", launch)
    formats = ["int4", "int4 asymmetric", "fp8", "nvfp4", "mxfp4", "bfloat16 scales", "norm 2.0"]
    cases = [(awkward(20, 128).bfloat16(), *FORMATS[name], None, None) for name in formats]
    importance, g_idx = awkward(1, 128).abs(), torch.arange(128).remainder(4)
    cases += [
        (awkward(20, 128), group(4, 32), DEFAULTS, importance, None),
        (awkward(20, 128), group(4, 32), DEFAULTS, importance, g_idx),
        (awkward(3, 9000), QuantizationArgs(strategy="channel"), DEFAULTS, None, None),
    ]
    for value, args, grid, weight, order in cases:
        views = group_values(value, "weight", args, order)
        extremes = [tuple(t.float() for t in min_max(view)) for view in views]
        weights = [None] * len(views)
        if weight is not None:
            weights = list(group_values(weight.expand_as(value), "weight", args, order))
        scale = torch.ones(1) if args.strategy == "tensor_group" else None
        problems = [
            GridProblem(view, *extreme, each, args, grid, scale)
            for view, extreme, each in zip(views, extremes, weights, strict=True)
        ]
        grid_triton.search(problems, GridReference(lambda _: [], lambda *_: None))
    for name in ("int4", "int4 asymmetric", "fp8", "nvfp4"):
        rounding = Format.of(FORMATS[name][0])
        for length in (32, 9000):
            x, ratio = awkward(20, length), torch.ones(14, 20)
            zero = ratio if "asymmetric" in name else None
            for weight in (None, x.abs()):
                sums_triton.sum_rows(rounding, x, weight, torch.ones(20), ratio, zero)
    assert compiled == {"search_steps", "pick_steps", "cut_steps", "sum_candidates"}
