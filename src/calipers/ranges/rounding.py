"""Fake-quantization by plain arithmetic, for compiled searches.

compressed-tensors' `fake_quantize` is the reference. Here values are multiplied by the inverse of
the scale and rounded without tables or casts, so that one loop over vector registers does it all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationType
from torch import Tensor

from calipers.ranges.qparams import code_range

__all__ = ["Rounding", "power_of_square", "quantization_error", "round_to_codes"]

#: (log2(1 + m) - m) / (m * (1 - m)) and (2**f - 1 - f) / (f * (1 - f)) on [0, 1], fits of least
#: largest error: the logarithm is right to 7e-6, the power to 4e-7 of itself.
_LOG2 = (
    0.44266410422331526,
    -0.27687743502730333,
    0.18560722249454367,
    -0.09957908240714103,
    0.026868604873209582,
)
_EXP2 = (
    -0.3068511073741756,
    -0.06667977633985467,
    -0.010862594469609636,
    -0.0018991709517222374,
)
#: The bits of 1.0, and of the mantissa.
_ONE, _MANTISSA = 127 << 23, (1 << 23) - 1
#: A float whose last bit counts ones.
_LAST_BIT = 1.5 * 2**23


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
        low, high = code_range(args)
        return cls(args.type == QuantizationType.INT, args.num_bits, low, high)


def quantization_error(
    values: Tensor,
    scale: Tensor,
    inverse: Tensor,
    zero_point: Tensor | None,
    rounding: Rounding,
) -> Tensor:
    """Values minus their fake-quantized selves; for float formats the sizes of both.

    Args:
        values: Float32.
        scale: Float32, broadcast to the values; the global scale divided out.
        inverse: One over the scale.
        zero_point: Float32, broadcast to the values; None for zero.
        rounding: The format.
    """
    scaled = values * inverse
    if rounding.integer:
        return values - round_to_codes(scaled, zero_point, rounding) * scale
    return values.abs() - round_to_codes(scaled.abs(), None, rounding) * scale


def round_to_codes(scaled: Tensor, zero_point: Tensor | None, rounding: Rounding) -> Tensor:
    """Codes of values already divided by their scale, relative to the zero point.

    Args:
        scaled: Float32; for float formats sizes, >= 0.
        zero_point: Float32, whole, broadcast to the values; None for zero.
        rounding: The format.
    """
    if rounding.integer:
        if zero_point is None:
            return _clamp(scaled.round(), rounding.low, rounding.high)
        return _clamp((scaled + zero_point).round(), rounding.low, rounding.high) - zero_point
    rounded = _round_e2m1(scaled) if rounding.num_bits == 4 else _round_e4m3(scaled)
    return _limit(rounded, rounding.high)


def _limit(codes: Tensor, high: float) -> Tensor:
    """clamp(max=high) of rounded codes: exact, and one instruction where clamp looks for NaN."""
    return high - torch.relu(high - codes)


def _clamp(codes: Tensor, low: float, high: float) -> Tensor:
    return high - torch.relu((high - low) - torch.relu(codes - low))


def _round_e2m1(size: Tensor) -> Tensor:
    """To the nearest of 0, .5, 1, 1.5, 2, 3, 4, 6 and 2s on, ties to the even mantissa."""
    # Next to this number floats lie one step of the format apart.
    largest = size.new_full((), 2 * _LAST_BIT)  # of two numbers the default dtype would be made
    magic = torch.where(size < 2, 0.5 * _LAST_BIT, torch.where(size < 4, _LAST_BIT, largest))
    return (size + magic) - magic


def _round_e4m3(size: Tensor) -> Tensor:
    """To the nearest float8_e4m3fn, ties to even, as if it had no largest value.

    The bits of the exponent alone are the power of two below the value, an eighth of which is the
    step of the format; below 2**-6 the step stays what it is there.
    """
    smallest = 121 << 23  # the bits of 2**-6
    exponent = (size.view(torch.int32) & ~_MANTISSA).clamp(min=smallest)
    power = exponent.view(torch.float32)
    inverse = (2 * _ONE - exponent).view(torch.float32)
    return (size * (inverse * 8)).round() * (power * 0.125)


def power_of_square(square: Tensor, norm: float) -> Tensor:
    """|d|**norm of a squared error d*d, float32; relative error under 1e-5 for norms up to 4.

    d**norm = d*d * 2**((norm/2 - 1) * log2(d*d)). The bits of a float, read as a number, are its
    logarithm but for a curve of the mantissa, a polynomial; the way back is the same. Of a zero,
    which has no logarithm, the bits pass for 2**-127, and times zero nothing comes of it.
    """
    if norm == 2:
        return square
    bits, exponent = square.view(torch.int32), norm / 2 - 1
    mantissa = (bits & _MANTISSA).float() * 2.0**-23
    log2 = (bits - _ONE).float() * 2.0**-23 + _curve(_LOG2, mantissa)
    power = log2 * exponent
    if abs(exponent) > 1:
        power = power.clamp(min=-126.0, max=127.0)
    raised = (power + _curve(_EXP2, power - power.floor())) * 2.0**23
    return square * (raised.to(torch.int32) + _ONE).view(torch.float32)


def _curve(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    """A polynomial times x * (1 - x)."""
    *lower, highest = coefficients
    result = highest * x + lower.pop()
    while lower:
        result = result * x + lower.pop()
    return x * (1 - x) * result
