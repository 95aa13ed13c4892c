"""A scale and zero point, stated as a range, come back from `calculate_qparams` bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import calculate_qparams, calculate_range
from torch import Tensor

from calipers.ranges import range_of_qparams
from ranges.strategies import MX, NVFP4

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMATS: dict[str, dict[str, Any]] = {
    **{f"int{bits}": {"num_bits": bits} for bits in range(2, 9)},
    **{f"int{bits}-asym": {"num_bits": bits, "symmetric": False} for bits in range(2, 9)},
    "fp8": {"num_bits": 8, "type": "float"},
    "fp4": {"num_bits": 4, "type": "float"},
    "mxfp4": {"num_bits": 4, **MX},
    "mxfp8": {"num_bits": 8, **MX},
}


def scales_of(args: QuantizationArgs, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Positive scales over many octaves, of mantissas that the format can store."""
    octaves = torch.randint(-9, 5, (4096,), generator=generator)
    mantissas = 1 + torch.rand(4096, generator=generator)
    if args.scale_dtype == torch.uint8:
        mantissas = torch.ones(4096)
    return torch.ldexp(mantissas, octaves).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_round_trip(name: str, dtype: torch.dtype) -> None:
    args = QuantizationArgs(**FORMATS[name])
    generator = torch.Generator().manual_seed(1)
    scale = scales_of(args, dtype, generator)
    low, high = (int(limit) for limit in calculate_range(args, scale.device))
    zero_point = torch.zeros(scale.shape, dtype=args.zp_dtype)
    if not args.symmetric:
        zero_point = torch.randint(low, high + 1, scale.shape, generator=generator).to(torch.int8)
        zero_point[:2] = torch.tensor([low, high])
    found = range_of_qparams(scale, zero_point, args)
    assert found[0].dtype == found[1].dtype == torch.float64
    back, back_zero = calculate_qparams(*found, args)
    assert torch.equal(back.to(dtype), scale)
    assert torch.equal(back_zero.double(), zero_point.double())


def test_every_stored_nvfp4_scale_comes_back() -> None:
    """All 126 positive codes of float8, under global scales that do not divide evenly."""
    args = QuantizationArgs(**NVFP4)
    codes = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    for global_scale in torch.tensor([[1.0], [448 * 6 / 0.7], [1234.567], [3e-3]]):
        found = range_of_qparams(codes, None, args, global_scale)
        back, _ = calculate_qparams(*found, args, global_scale=global_scale)
        assert torch.equal(back.float(), codes)


def test_a_missing_zero_point_is_zero() -> None:
    args = QuantizationArgs(num_bits=4, symmetric=False)
    scale = torch.tensor([0.3, 7.0])
    low, high = range_of_qparams(scale, None, args)
    assert torch.equal(low, -8 * scale.double())
    assert torch.equal(high, 7 * scale.double())


@pytest.mark.parametrize("bad", [0.0, -0.5, float("nan")])
def test_a_scale_that_no_range_makes_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="scale: expected positive values"):
        range_of_qparams(torch.tensor([1.0, bad]), None, QuantizationArgs(num_bits=4))


def test_some_float32_scales_have_no_float32_range() -> None:
    """Why ranges are float64: a float32 maximum over 7.5 skips scales."""
    scale = torch.nextafter(torch.tensor(1.1), torch.tensor(2.0)) + torch.arange(64) * 2.0**-23
    nearest = scale * 7.5
    steps = torch.arange(-4, 5) * 2.0**-20
    reachable = ((nearest[:, None] + steps) / 7.5 == scale[:, None]).any(1)
    assert not reachable.all()
