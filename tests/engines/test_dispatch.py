"""The native engine against the eager reference, for real; and which engine is chosen when."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, fake_quantize
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams
from loguru import logger

from calipers.engines import dispatch
from calipers.engines.dispatch import choose_engine, explain_engines
from calipers.errors import CalipersError
from calipers.formats import Format
from calipers.observers import Observer
from calipers.ranges import (
    ShrinkGrid,
    group_values,
    min_max,
    search_grid_ranges,
)

CPU = torch.device("cpu")
DEFAULTS = ShrinkGrid(maxshrink=0.2, grid=100, patience=5, norm=2.4)


def preset(name: str) -> QuantizationArgs:
    return preset_name_to_scheme(name, ["Linear"]).weights


def group(bits: int, size: int, **fields) -> QuantizationArgs:
    return QuantizationArgs(num_bits=bits, strategy="group", group_size=size, **fields)


def awkward(rows: int, cols: int) -> torch.Tensor:
    """Gauss, Laplace and Student rows; outliers, zeros, single values, denormals among them."""
    generator = torch.Generator().manual_seed(7)
    values = torch.randn(rows, cols, generator=generator)
    heavy = torch.rand(rows, cols, generator=generator).clamp(1e-4, 1 - 1e-4) - 0.5
    values[::3] = -heavy[::3].sign() * torch.log1p(-2 * heavy[::3].abs())
    values[1::3] /= (torch.rand(values[1::3].shape, generator=generator) + 0.05).sqrt()
    values[::7, ::50] *= 20
    values[5] = 0
    values[6, 1:] = 0
    values[8] = 0.25
    values[9] *= 1e-39
    return values * 0.02


def both_engines(value, args, search=DEFAULTS, *, importance=None, global_scale=None, g_idx=None):
    """A search by `native` and by the reference: what both find, as one flat tensor each."""
    views = group_values(value, "weight", args, g_idx)
    extremes = [min_max(view) for view in views]
    weights = None
    if importance is not None:
        weights = list(group_values(importance.expand_as(value), "weight", args, g_idx))
    found = {}
    for engine in ("native", "eager"):
        ranges = search_grid_ranges(
            views,
            extremes,
            args,
            search,
            importance=weights,
            global_scale=global_scale,
            engine=engine,
        )
        found[engine] = torch.cat([torch.stack(pair).flatten(1) for pair in ranges], dim=1)
    assert not dispatch._failures, "the engine did not take part"
    return found["native"], found["eager"]


def assert_same_steps(compiled: torch.Tensor, eager: torch.Tensor) -> None:
    differing = int((compiled != eager).any(dim=0).sum())
    assert differing <= eager.shape[1] * 1e-4, f"{differing} of {eager.shape[1]} groups differ"


def assert_errors_as_small(value, args, search, compiled, eager) -> None:
    """Where steps differ, the errors of both are equal to 1e-6 of themselves."""
    (view,) = group_values(value, "weight", args)
    differing = (compiled != eager).any(dim=0)
    groups = view.values.flatten(0, -2)[differing].double()
    token_args = args.model_copy(update={"strategy": "token"})
    errors = []
    for low, high in (compiled[:, differing], eager[:, differing]):
        scale, zero_point = calculate_qparams(low, high, args)
        found = fake_quantize(groups, scale.unsqueeze(-1), zero_point.unsqueeze(-1), token_args)
        errors.append((found - groups).abs().pow(search.norm).sum(-1))
    torch.testing.assert_close(*errors, rtol=1e-6, atol=0)


FORMATS = {
    "int4": (group(4, 32), DEFAULTS),
    "int4 asymmetric": (group(4, 32, symmetric=False), DEFAULTS),
    "nvfp4": (preset("NVFP4"), DEFAULTS),
    "fp8 channel": (QuantizationArgs(num_bits=8, type="float", strategy="channel"), DEFAULTS),
}
MORE_FORMATS = {
    **{f"int{bits}": (group(bits, 32), DEFAULTS) for bits in (2, 3, 5, 6, 7, 8)},
    **{
        f"int{bits} asymmetric": (group(bits, 32, symmetric=False), DEFAULTS)
        for bits in (2, 3, 5, 6, 7, 8)
    },
    "fp4": (group(4, 32, type="float"), DEFAULTS),
    "mxfp4": (preset("MXFP4"), DEFAULTS),
    "mxfp8": (preset("MXFP8"), DEFAULTS),
    "norm 1": (group(4, 32), ShrinkGrid(0.2, 100, 5, 1.0)),
    "norm 3": (group(4, 32), ShrinkGrid(0.95, 20, 5, 3.0, include_end=True)),
    "group of 2": (group(4, 2), DEFAULTS),
    "expanded nvfp4": (preset("NVFP4"), ShrinkGrid(1 - 0.8 / 1.8, 200, 1000, 2.4, 1.8)),
}


@pytest.mark.parametrize("name", FORMATS)
def test_both_engines_choose_the_same_steps(name):
    args, search = FORMATS[name]
    assert_same_steps(*both_engines(awkward(3200, 128), args, search))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FORMATS, *MORE_FORMATS])
def test_both_engines_choose_the_same_steps_in_many_groups(name):
    args, search = {**FORMATS, **MORE_FORMATS}[name]
    cols = 128 * 8 if args.strategy == "group" and args.group_size == 32 else 512
    rows = 3200 if args.strategy != "channel" else 100_000
    value = awkward(rows, cols)
    found = both_engines(value, args, search)
    assert_same_steps(*found)
    assert_errors_as_small(value, args, search, *found)


class TestLayouts:
    """One number format: every way in which values come."""

    @pytest.mark.parametrize(
        "args",
        [
            QuantizationArgs(num_bits=4, strategy="tensor"),
            QuantizationArgs(num_bits=4, strategy="channel"),
            QuantizationArgs(num_bits=4, strategy="block", block_structure=[48, 32]),
            group(4, 32),
        ],
        ids=lambda args: args.strategy,
    )
    def test_strategies_with_short_ends(self, args):
        assert_same_steps(*both_engines(awkward(100, 150), args))

    def test_a_whole_tensor_in_several_runs(self):
        args = QuantizationArgs(num_bits=4, strategy="tensor")
        assert_same_steps(*both_engines(awkward(256, 128), args))

    def test_columns_in_any_order(self):
        g_idx = torch.arange(128).remainder(4)
        assert_same_steps(*both_engines(awkward(64, 128), group(4, 32), g_idx=g_idx))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_sixteen_bit_values(self, dtype):
        assert_same_steps(*both_engines(awkward(640, 128).to(dtype), group(4, 32)))

    @pytest.mark.parametrize("weighted", [False, True], ids=["unweighted", "weighted"])
    @pytest.mark.parametrize(
        "value",
        [
            awkward(128, 640).t(),
            awkward(640, 256)[:, ::2],
            awkward(3 * 128, 70).view(3, 128, 70).transpose(1, 2)[:, :, ::2],
        ],
        ids=["transposed", "every other column", "three dimensions"],
    )
    def test_values_that_lie_apart(self, value, weighted):
        random = torch.Generator().manual_seed(1)
        importance = torch.rand(value.shape[-1], 2, generator=random)[:, 0] if weighted else None
        assert_same_steps(*both_engines(value, group(4, 32), importance=importance))

    def test_importance(self):
        importance = torch.rand(128, generator=torch.Generator().manual_seed(1)) ** 3
        value = awkward(640, 128)
        weighted = both_engines(value, group(4, 32), importance=importance)
        assert_same_steps(*weighted)
        assert not torch.equal(weighted[0], both_engines(value, group(4, 32))[0])

    def test_values_that_are_not_finite(self, monkeypatch):
        value = awkward(64, 128)
        value[3, 4], value[5, 6] = torch.nan, torch.inf
        observers = [Observer.load_from_registry("memoryless_mse", group(4, 32)) for _ in range(2)]
        monkeypatch.setenv("CALIPERS_ENGINE", "native")
        compiled, _ = observers[0](value)
        monkeypatch.setenv("CALIPERS_ENGINE", "eager")
        eager, _ = observers[1](value)
        assert torch.equal(compiled, eager)

    @pytest.mark.parametrize("patience", [1, 2, 3, 4, 6, 7])
    @pytest.mark.parametrize("rows", [1, 2])
    def test_patience_cuts_at_the_same_step(self, rows, patience):
        """Few groups, so that runs of steps without a gain come; in a tile, and across tiles."""
        search = ShrinkGrid(0.9, 40, patience, 2.4)
        for seed in range(20):
            torch.manual_seed(seed)
            compiled, eager = both_engines(torch.randn(rows, 32), group(4, 32), search)
            assert torch.equal(compiled, eager)

    def test_formats_that_only_the_reference_knows(self):
        args = group(8, 32, type="float", symmetric=False)
        compiled, eager = both_engines(awkward(64, 128) + 0.02, args)
        assert torch.equal(compiled, eager)

    def test_candidates_that_tie_are_left_to_the_reference(self):
        """With int3 a negative outlier among zeros is as far from its codes at .87 as at .88."""
        value = torch.full((2000, 32), 1e-4)
        value[:, 3] = -torch.logspace(-2, 2, 2000)
        assert torch.equal(*both_engines(value, group(3, 32)))

    def test_global_scale(self):
        value = awkward(320, 128)
        scale = 2688 / value.abs().max().reshape(1)
        assert_same_steps(*both_engines(value, preset("NVFP4"), global_scale=scale))


class TestRounding:
    """All that candidate sums are rounded by, against compressed-tensors, code by code."""

    @pytest.mark.parametrize(
        "args",
        [
            QuantizationArgs(num_bits=4, type="float"),
            QuantizationArgs(num_bits=8, type="float"),
            QuantizationArgs(num_bits=3),
        ],
    )
    def test_every_tie_and_every_code(self, args):
        values = torch.cat(
            [torch.arange(-8192, 8193) / 16, torch.arange(-4096, 4097) * 2.0**-12, torch.zeros(1)]
        )
        token = args.model_copy(update={"strategy": "token"})
        zero = torch.zeros(1, dtype=torch.int8)
        expected = fake_quantize(values, torch.ones(1), zero, token)
        sizes = values if args.type == "int" else values.abs()
        codes = Format.of(args).round(sizes)
        assert torch.equal(codes, expected if args.type == "int" else expected.abs())


class TestChoice:
    @pytest.fixture(autouse=True)
    def _fresh(self, monkeypatch):
        monkeypatch.delenv("CALIPERS_ENGINE")
        monkeypatch.setattr(dispatch, "_failures", {})
        dispatch._warn_once.cache_clear()

    def test_the_native_library_is_compiled_once_enough_is_searched(self, monkeypatch):
        monkeypatch.setattr(dispatch, "is_built", lambda: False)
        monkeypatch.setattr(dispatch, "_searched", 0)
        assert choose_engine(CPU, values=dispatch.WORTH_BUILDING - 1) == "eager"
        assert choose_engine(CPU, values=1) == "native"

    def test_the_native_library_is_taken_at_once_where_it_is(self, monkeypatch):
        monkeypatch.setattr(dispatch, "is_built", lambda: True)
        assert choose_engine(CPU, values=1) == "native"

    def test_argument_before_environment(self, monkeypatch):
        monkeypatch.setenv("CALIPERS_ENGINE", "eager")
        assert choose_engine(CPU, values=2**40) == "eager"
        assert choose_engine(CPU, "native") == "native"

    @pytest.mark.parametrize("name", ["warp", "inductor"])
    def test_an_engine_that_there_is_not(self, name, monkeypatch):
        monkeypatch.setenv("CALIPERS_ENGINE", name)
        with pytest.raises(CalipersError, match=f"one of eager, native, triton, got '{name}'"):
            choose_engine(CPU)

    def test_other_devices_are_eager(self):
        assert choose_engine(torch.device("meta"), values=2**40) == "eager"

    def test_without_a_compiler_one_warning(self, monkeypatch):
        monkeypatch.setattr(dispatch, "compiler", lambda: None)
        monkeypatch.setattr(dispatch, "is_built", lambda: False)
        messages: list[str] = []
        sink = logger.add(messages.append, format="{message}", level="WARNING")
        try:
            assert choose_engine(CPU, "native") == choose_engine(CPU, "native") == "eager"
        finally:
            logger.remove(sink)
        assert len(messages) == 1
        assert "needs a C++ compiler" in messages[0]
        assert [usable for _, usable, _ in explain_engines()[:2]] == [True, False]

    def test_a_compilation_that_fails_leaves_it_to_the_reference(self, monkeypatch):
        def broken(*_):
            raise RuntimeError("no room for the cache")

        value, args = awkward(16, 64), group(4, 32)
        views = group_values(value, "weight", args)
        extremes = [min_max(view) for view in views]
        expected = search_grid_ranges(views, extremes, args, DEFAULTS, engine="eager")
        monkeypatch.setattr("calipers.engines.native.grid.search", broken)
        messages: list[str] = []
        sink = logger.add(messages.append, format="{message}", level="WARNING")
        try:
            for _ in range(2):
                found = search_grid_ranges(views, extremes, args, DEFAULTS, engine="native")
                assert torch.equal(found[0][1], expected[0][1])
        finally:
            logger.remove(sink)
        assert len(messages) == 1
        assert "RuntimeError: no room for the cache" in messages[0]
