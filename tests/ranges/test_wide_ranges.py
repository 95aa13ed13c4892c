"""Finite values whose range is wider than their dtype, and scales judged as they are stored."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import calculate_qparams

from calipers.formats import Format
from calipers.observers import Observer
from calipers.ranges import ShrinkGrid, group_values, min_max, search_grid_ranges
from calipers.ranges.qparams import global_scale_of_range, qparams_of_range
from ranges.strategies import MX, NVFP4

LARGEST = {torch.float16: 4e4, torch.bfloat16: 2e38, torch.float32: 2e38, torch.float64: 1e300}
OBSERVERS = (
    "memoryless_minmax",
    "static_minmax",
    "minmax",
    "memoryless_mse",
    "mse",
    "histogram",
    "optimal",
)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", LARGEST)
@pytest.mark.parametrize("name", OBSERVERS)
def test_scales_stay_finite(name, dtype, symmetric, bits):
    options = {"objective": "mse"} if name == "optimal" else {}
    args = QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy="tensor")
    x = torch.tensor([[-1.0, 0.25, 0.5, 1.0]], dtype=torch.float64) * LARGEST[dtype]
    scale, zero = Observer.load_from_registry(name, "weight", args, **options)(x.to(dtype))
    assert scale.isfinite().all()
    assert (scale > 0).all()
    low, high = Format.of(args).low, Format.of(args).high
    if not symmetric and name not in ("histogram", "optimal"):
        assert abs(float(zero) - (low + high) / 2) <= 2
    if name in ("memoryless_minmax", "static_minmax", "minmax"):
        end = x.to(dtype).double()
        wide, its_zero = calculate_qparams(end.min() / 4, end.max() / 4, args)
        assert torch.equal(scale, (wide * 4).to(dtype))
        assert torch.equal(zero, its_zero)


@pytest.mark.parametrize("bits", [4, 8])
def test_float16_power_of_two_scales_stay_finite(bits):
    args = QuantizationArgs(**MX, num_bits=bits)
    end = torch.full((1, 1), 65504.0, dtype=torch.float16)
    scale, _ = qparams_of_range(-end, end, args)
    assert float(scale) == 2.0 ** (14 if bits == 4 else 8)


def test_global_scale_of_small_float16_values():
    end = torch.tensor([0.01], dtype=torch.float16)
    assert float(global_scale_of_range(-end, end)) == pytest.approx(2688 / 0.01, rel=1e-3)


def test_expanded_nvfp4_of_the_largest_values():
    args = QuantizationArgs(**NVFP4)
    module = torch.nn.Linear(32, 4)
    x = torch.linspace(-1, 1, 128).view(4, 32) * 2e38
    observer = Observer.load_from_registry("nvfp4_expanded_mse", "weight", args, module)
    module.weight_global_scale = observer.get_global_scale(x)
    scale, _ = observer(x)
    assert module.weight_global_scale.isfinite().all()
    assert scale.isfinite().all()


@pytest.mark.parametrize("engine", ["eager", "native"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_stored_power_of_two_is_the_best_one(dtype, engine):
    args = QuantizationArgs(**MX, num_bits=4)
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    views = group_values(x, "weight", args)
    grid = ShrinkGrid(maxshrink=0.6, grid=400, patience=0, norm=2.0, expand=1.2)
    ((low, high),) = search_grid_ranges(views, [min_max(views[0])], args, grid, engine=engine)
    stored, _ = qparams_of_range(low.to(dtype), high.to(dtype), args)
    token = args.model_copy(update={"strategy": "token"})

    def error(scale):
        from compressed_tensors.quantization import fake_quantize

        groups = x.float().unflatten(1, (-1, 32))
        zero = torch.zeros_like(scale).to(torch.uint8)
        rounded = fake_quantize(groups, scale.float()[..., None], zero[..., None], token)
        return (rounded - groups).double().square().sum(-1)

    found = error(stored)
    for factor in (0.5, 2.0):
        assert (found <= error(stored * factor) * (1 + 1e-6)).all()
