"""Units of error: powers of two that keep powers of errors away from the ends of float32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationType
from torch import Tensor

from calipers.ranges.views import GroupedView

__all__ = ["error_units", "in_float32_range"]

#: The largest rounding error of a float format of 4 and of 8 bits, as a part of its largest code.
_LARGEST_ERROR = {4: 1 / 6, 8: 16 / 448}
#: Exponents of units, so that neither a unit nor a value in it overflows.
_MOST_EXPONENT = 120
#: Values of a larger exponent are searched as if they were smaller by a power of two.
_LARGEST_EXPONENT = 124

Range = tuple[Tensor, Tensor]


def error_units(low: Tensor, high: Tensor, args: QuantizationArgs, expand: float) -> Tensor:
    """Factor on the values and scales of each group that brings its largest error close to 1.

    In that unit the largest rounding error with the scale of minimum and maximum lies from 0.5 to
    1, so that no norm makes it vanish, or overflow, in float32. A power of two changes no code and
    no order of errors.

    Args:
        low: Minimum of each group, float32, expanded.
        high: Maximum of each group.
        args: Quantization arguments; the strategy does not count.
        expand: What the range is expanded by.

    Returns:
        Powers of two, float32, of the shape of `low`.
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    half = torch.maximum(-low, high) if args.symmetric else high / 2 - low / 2
    integer = args.type == QuantizationType.INT
    part = 1 / (2.0**args.num_bits - 1) if integer else _LARGEST_ERROR.get(args.num_bits, 1 / 28)
    exponent = torch.frexp(half * (part / expand)).exponent.to(torch.int32)
    exponent = torch.where(half.isfinite(), exponent, 0).clamp(-_MOST_EXPONENT, _MOST_EXPONENT)
    return ((127 - exponent) << 23).view(torch.float32)


def in_float32_range(
    views: Sequence[GroupedView], extremes: Sequence[Range]
) -> tuple[Sequence[GroupedView], Sequence[Range], float]:
    """Values whose ranges float32 cannot hold, all divided by one power of two.

    So are float64 values near the end of float32 and beyond, and others where `high - low` would
    overflow.

    Returns:
        Views, extremes and the power of two, 1.0 for values that float32 can hold as they are.
    """
    if extremes[0][0].dtype == torch.float16:
        return views, extremes, 1.0
    ends = torch.cat([end.reshape(-1).double() for pair in extremes for end in pair])
    largest = torch.where(ends.isfinite(), ends, 0).abs().amax()
    exponent = int(torch.frexp(largest).exponent)
    if exponent <= _LARGEST_EXPONENT:
        return views, extremes, 1.0
    factor = 2.0 ** (exponent - _LARGEST_EXPONENT)
    return (
        [replace(view, values=view.values / factor) for view in views],
        [(low / factor, high / factor) for low, high in extremes],
        factor,
    )
