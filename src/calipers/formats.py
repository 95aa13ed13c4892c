"""Number formats: every constant of a format is in its row here.

A new float format is one more row of `FLOAT_FORMATS`: rounding, observers, searches and kernels
take what they need from it. What a kernel does not know of a format goes to the reference.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationType
from compressed_tensors.quantization.utils import calculate_range
from torch import Tensor

__all__ = [
    "E2M1",
    "E2M3",
    "E3M2",
    "E4M3",
    "FLOAT_FORMATS",
    "FloatFormat",
    "Format",
    "IntFormat",
    "has_mx_scales",
    "has_plain_mx_scales",
    "has_scale_codes",
    "is_known_to_library",
    "range_dtype",
]

#: Values that share a scale in the MX formats.
MX_GROUP_SIZE = 32


@dataclass(frozen=True)
class Format(ABC):
    """A number format.

    Args:
        num_bits: Bits of a code.
        high: Largest code.
        window: Candidates of a search for scales that may be any number, in units of the scale of
            the range: the smallest, the largest, and how many, in logarithmic steps.
    """

    num_bits: int
    high: float
    window: tuple[float, float, int]

    #: Whether codes are whole numbers.
    integer: ClassVar[bool]

    @staticmethod
    def of(args: QuantizationArgs) -> Format:
        """The format that quantization arguments name.

        Raises:
            NotImplementedError: Float arguments of another number of bits than 4, 6 or 8.

        >>> Format.of(QuantizationArgs(num_bits=4)).high
        7.0
        """
        if args.type == QuantizationType.INT:
            return _int_format(args.num_bits)
        if args.num_bits not in FLOAT_FORMATS:
            known = ", ".join(map(str, FLOAT_FORMATS))
            raise NotImplementedError(f"float formats have {known} bits, got {args.num_bits}")
        return FLOAT_FORMATS[args.num_bits]

    @property
    def low(self) -> float:
        """The smallest code; of floats minus the largest."""
        return -self.high - self.integer

    @property
    def width(self) -> float:
        """The largest code less the smallest."""
        return self.high - self.low

    @property
    @abstractmethod
    def largest_error(self) -> float:
        """The largest rounding error, as a part of the largest code (integers: of half a range)."""

    @property
    def mx_offset(self) -> int:
        """Exponent of the largest power of two among the codes; 0 for integers."""
        return 0

    @property
    def shift(self) -> float:
        """1.5 * 2**23 steps of the codes from 1 to 2; 0 for integers."""
        return 0.0

    @property
    def smallest_bits(self) -> int:
        """Bits of the smallest normal code in float32; 0 for integers."""
        return 0

    @abstractmethod
    def round(self, scaled: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """The nearest codes of values divided by their scale, relative to the zero point.

        Ties go to the even code. Values beyond the last code get the last code.

        Args:
            scaled: Float32, any shape.
            zero_point: Float32, whole, broadcast to the values; None for zero. Float formats have
                none.
        """


@dataclass(frozen=True)
class IntFormat(Format):
    """Whole numbers from `low` to `high`."""

    integer: ClassVar[bool] = True

    @property
    def largest_error(self) -> float:
        """Half a step, as a part of half the range."""
        return 1 / (2.0**self.num_bits - 1)

    def round(self, scaled: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """As of every format."""
        if zero_point is None:
            return scaled.round().clamp_(self.low, self.high)
        return (scaled + zero_point).round_().clamp_(self.low, self.high).sub_(zero_point)


@dataclass(frozen=True)
class FloatFormat(Format):
    """Numbers with a sign, an exponent and a mantissa, without Inf; NaN is no code.

    Args:
        mantissa: Bits of the mantissa.
        smallest: Exponent of the smallest normal number. Below it codes lie as far apart as there.
        mx_mantissa: Bits of a mantissa such that MX scales are rounded up to the next power of two
            where the largest value, rounded to so many, is a power of two.
    """

    mantissa: int
    smallest: int
    mx_mantissa: int = 1

    integer: ClassVar[bool] = False

    @property
    def largest_error(self) -> float:
        """Half the distance of the two largest codes, as a part of the largest."""
        return float(2.0 ** (self.mx_offset - self.mantissa - 1)) / self.high

    @property
    def mx_offset(self) -> int:
        """Exponent of the largest power of two among the codes."""
        return math.frexp(self.high)[1] - 1

    @property
    def shift(self) -> float:
        """Numbers next to it lie as far apart in float32 as codes from 1 to 2 do."""
        return float(1.5 * 2.0 ** (23 - self.mantissa))

    @property
    def smallest_bits(self) -> int:
        """Bits of the smallest normal code in float32."""
        return (127 + self.smallest) << 23

    def round(self, scaled: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """As of every format."""
        scaled = scaled.clamp(self.low, self.high)
        # The exponent's bits alone are the power of two below the size.
        power = (scaled.view(torch.int32) & 0x7F800000).clamp_(min=self.smallest_bits)
        far = power.view(torch.float32) * self.shift
        return (scaled + far).sub_(far)

    def mx_scale(self, size: Tensor) -> Tensor:
        """The power of two that compressed-tensors makes of the largest value of a group.

        Args:
            size: At least 0, of any shape and floating dtype.
        """
        fraction, exponent = torch.frexp(size)
        up = fraction >= 1 - 2.0 ** -(self.mx_mantissa + 2)
        exponent = (exponent - 1 + up.int() - self.mx_offset).clamp(-127, 128)
        scale = torch.where(size == 0, 2.0**-127, exponent.float().exp2())
        return torch.where(size.isfinite(), scale, size).to(size.dtype)

    def positive_codes(self) -> Tensor:
        """All codes above zero, ascending, float32, on the CPU."""
        step = 2.0 ** (self.smallest - self.mantissa)
        codes = [number * step for number in range(1, 1 << self.mantissa)]
        for exponent in range(self.smallest, self.mx_offset + 1):
            step = 2.0 ** (exponent - self.mantissa)
            codes += [number * step for number in range(1 << self.mantissa, 2 << self.mantissa)]
        every = torch.tensor(codes, dtype=torch.float32, device="cpu")
        return every[every <= self.high]


#: The fewer bits, the lower a few values of great importance pull the best scale. Above the scale
#: of the range as far as 1.5, where the largest value takes a code below the largest.
_INTEGER_WINDOWS = {
    2: (0.05, 1.52, 28),
    3: (0.08, 1.52, 28),
    4: (0.13, 1.50, 28),
    5: (0.20, 1.52, 42),
    6: (0.30, 1.52, 56),
    7: (0.50, 1.50, 112),
    8: (0.70, 1.45, 168),
}


@functools.lru_cache(maxsize=32)
def _int_format(num_bits: int) -> IntFormat:
    return IntFormat(
        num_bits, 2.0 ** (num_bits - 1) - 1, _INTEGER_WINDOWS[min(max(num_bits, 2), 8)]
    )


# Windows of floats: an octave up, since doubling a scale that covers the range never pays.
E2M1 = FloatFormat(4, 6.0, (0.3, 1.96, 28), mantissa=1, smallest=0)
E2M3 = FloatFormat(6, 7.5, (0.4, 1.96, 56), mantissa=3, smallest=0, mx_mantissa=3)
E3M2 = FloatFormat(6, 28.0, (0.4, 1.96, 42), mantissa=2, smallest=-2)
E4M3 = FloatFormat(8, 448.0, (0.6, 1.96, 84), mantissa=3, smallest=-6)

#: The format of float arguments by their number of bits. compressed-tensors has no arguments for
#: E3M2.
FLOAT_FORMATS: dict[int, FloatFormat] = {4: E2M1, 6: E2M3, 8: E4M3}


def has_mx_scales(args: QuantizationArgs) -> bool:
    """Whether scales are powers of two, stored as their exponent (the MX formats)."""
    return (
        args.type == QuantizationType.FLOAT
        and args.num_bits in FLOAT_FORMATS
        and args.group_size == MX_GROUP_SIZE
        and args.scale_dtype == torch.uint8
    )


def has_plain_mx_scales(args: QuantizationArgs) -> bool:
    """Whether the scales are powers of two, made as the kernels make those of MXFP4 and MXFP8."""
    return has_mx_scales(args) and FLOAT_FORMATS[args.num_bits].mx_mantissa == 1


def has_scale_codes(args: QuantizationArgs) -> bool:
    """Whether scales are stored in a format of few codes (float8, or a power of two)."""
    return bool(args.symmetric) and (has_mx_scales(args) or args.scale_dtype == torch.float8_e4m3fn)


def range_dtype(args: QuantizationArgs, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a search computes the scales of its candidates.

    A scale that is rounded to few codes (MX, NVFP4, `scale_dtype`) may fall on another code once
    its range is cast, so candidates are cast as the range found will be. Other scales are judged in
    float32, as a plain evaluation of the grid does it.

    Args:
        args: Quantization arguments.
        dtype: Dtype of the values, to which the range found is cast.
    """
    return torch.float32 if args.scale_dtype is None else dtype


def is_known_to_library(args: QuantizationArgs) -> bool:
    """Whether the installed compressed-tensors rounds to the format of these arguments.

    Version 0.19 has no floats of 6 bits, later ones have.
    """
    if args.type == QuantizationType.INT:
        return True
    return _largest_code_of_library(args.num_bits) == Format.of(args).high


@functools.lru_cache(maxsize=8)
def _largest_code_of_library(num_bits: int) -> float | None:
    # Of bits that it does not know it finds no dtype of zero points.
    args = QuantizationArgs(
        num_bits=num_bits, type=QuantizationType.FLOAT, zp_dtype=torch.float8_e4m3fn
    )
    try:
        return float(calculate_range(args, torch.device("cpu"))[1])
    except NotImplementedError:
        return None
