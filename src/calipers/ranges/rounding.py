"""Rounding to codes by plain arithmetic, without tables or casts.

compressed-tensors' `fake_quantize` is the reference.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationType
from torch import Tensor

from calipers.ranges.qparams import code_range

__all__ = ["Rounding", "round_to_codes"]

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
