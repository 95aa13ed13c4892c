"""Fake-quantization by plain arithmetic, for compiled searches.

compressed-tensors' `fake_quantize` is the reference. Here values are multiplied by the inverse of
the scale and rounded without tables or casts, so that one loop over vector registers does it all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationType
from compressed_tensors.quantization.utils import calculate_range
from torch import Tensor

__all__ = ["Rounding", "power_of_square", "quantization_error", "round_to_codes"]

#: log2(1 + m) / m and 2**f on [0, 1), least-squares fits at Chebyshev nodes: errors 2e-7 and 1e-7.
_LOG2 = (
    1.4426947670911614,
    -0.7213107228447689,
    0.4800737491815663,
    -0.35345468332517355,
    0.2561797043960858,
    -0.15559996788729358,
    0.06378759589351896,
    -0.012370642803503203,
)
_EXP2 = (
    0.9999998957631351,
    0.6931546200033011,
    0.2401407700918361,
    0.05586328265926227,
    0.008946214666326741,
    0.0018951072910053913,
)


@dataclass(frozen=True)
class Rounding:
    """A number format, as the constants that its rounding needs.

    Args:
        integer: Integer codes, else the sizes of a float format.
        num_bits: Bits of a code.
        low: Smallest code.
        high: Largest code.
    """

    integer: bool
    num_bits: int
    low: float
    high: float

    @classmethod
    def of(cls, args: QuantizationArgs) -> Rounding:
        """The format that quantization arguments name."""
        low, high = (float(limit) for limit in calculate_range(args, torch.device("cpu")))
        return cls(args.type == QuantizationType.INT, args.num_bits, low, high)


def quantization_error(
    values: Tensor, scale: Tensor, zero_point: Tensor | None, rounding: Rounding
) -> Tensor:
    """Values minus their fake-quantized selves; for float formats the sizes of both.

    Args:
        values: Float32.
        scale: Float32, broadcast to the values; the global scale divided out.
        zero_point: Float32, broadcast to the values; None for zero.
        rounding: The format.
    """
    codes = values * (1 / scale)
    if rounding.integer:
        if zero_point is None:
            return values - codes.round().clamp(rounding.low, rounding.high) * scale
        shifted = (codes + zero_point).clamp(rounding.low, rounding.high).round()
        return values - (shifted - zero_point) * scale
    size = codes.abs().clamp(max=rounding.high)
    rounded = _round_e2m1(size) if rounding.num_bits == 4 else _round_e4m3(size)
    return values.abs() - rounded * scale


def round_to_codes(scaled: Tensor, zero_point: Tensor | None, rounding: Rounding) -> Tensor:
    """Codes of values already divided by their scale, relative to the zero point.

    Args:
        scaled: Float32; for float formats sizes, >= 0.
        zero_point: Float32, whole, broadcast to the values; None for zero.
        rounding: The format.
    """
    if rounding.integer:
        if zero_point is None:
            return scaled.round().clamp(rounding.low, rounding.high)
        shifted = (scaled + zero_point).round().clamp(rounding.low, rounding.high)
        return shifted - zero_point
    size = scaled.clamp(max=rounding.high)
    return _round_e2m1(size) if rounding.num_bits == 4 else _round_e4m3(size)


def _round_e2m1(size: Tensor) -> Tensor:
    """To the nearest of 0, .5, 1, 1.5, 2, 3, 4, 6, ties to the even mantissa; size in [0, 6]."""
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    inverse = torch.where(size < 2, 2.0, torch.where(size < 4, 1.0, 0.5))
    return (size * inverse).round() * step


def _round_e4m3(size: Tensor) -> Tensor:
    """To the nearest float8_e4m3fn, ties to even; size in [0, 448].

    The bits of the exponent alone are the power of two below the value, an eighth of which is the
    step of the format; below 2**-6 the step stays what it is there.
    """
    smallest = 121 << 23  # the bits of 2**-6
    exponent = (size.view(torch.int32) & 0x7F800000).clamp(min=smallest)
    power = exponent.view(torch.float32)
    inverse = (0x7F000000 - exponent).view(torch.float32)
    return (size * (inverse * 8)).round() * (power * 0.125)


def power_of_square(square: Tensor, norm: float) -> Tensor:
    """|d|**norm of a squared error d*d, float32, relative error 4e-7.

    d**norm = d*d * 2**((norm/2 - 1) * log2(d*d)), with the logarithm split into the exponent's bits
    and a polynomial of the mantissa, which is a few times faster than log2 and exp2. Of a zero,
    which has no logarithm, the bits pass for 2**-127, and times zero nothing comes of it.
    """
    if norm == 2:
        return square
    bits = square.view(torch.int32)
    exponent = ((bits >> 23) - 127).float()
    mantissa = ((bits & 0x7FFFFF) | 0x3F800000).view(torch.float32) - 1
    log2 = exponent + mantissa * _polynomial(_LOG2, mantissa)
    power = (log2 * (norm / 2 - 1)).clamp(min=-126.0, max=127.0)
    whole = power.floor()
    scale = ((whole.to(torch.int32) + 127) << 23).view(torch.float32)
    return square * (scale * _polynomial(_EXP2, power - whole))


def _polynomial(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    *lower, highest = coefficients
    result = highest * x + lower.pop()
    while lower:
        result = result * x + lower.pop()
    return result
