"""Units of error: powers of two that keep powers of errors away from the ends of float32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor

from calipers.formats import Format
from calipers.ranges.views import GroupedView

__all__ = ["error_units", "search_in_float32", "times"]

#: Exponents of units, so that neither a unit nor a value in it overflows.
_MOST_EXPONENT = 120
#: Values of a larger exponent are searched as if they were smaller by a power of two.
_LARGEST_EXPONENT = 124
#: Float64 values of a smaller exponent are searched as if they were larger.
_SMALLEST_EXPONENT = -76
#: So are those of other dtypes, where scales would be no normal float32 numbers, by one power.
_SMALLEST_OF_FLOAT32, _REACH_OF_FLOAT32 = -100, 60
#: The powers of two that float64 values are divided by are those of multiples of this exponent.
_REACH = 200

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
    exponent = torch.frexp(half * (Format.of(args).largest_error / expand)).exponent.to(torch.int32)
    exponent = torch.where(half.isfinite(), exponent, 0).clamp(-_MOST_EXPONENT, _MOST_EXPONENT)
    return ((127 - exponent) << 23).view(torch.float32)


def search_in_float32(
    views: Sequence[GroupedView],
    extremes: Sequence[Range],
    search: Callable[[Sequence[GroupedView], Sequence[Range], float], list[Range]],
) -> list[Range]:
    """What a float32 search finds of values that float32 may not hold, or not their `high - low`.

    Such values are searched as if they were smaller by a power of two (or larger, where all of a
    group would vanish in float32). Groups of float64 values that need other powers of two are
    searched one power after the other.

    Args:
        views: The views of one value.
        extremes: For each view the minimum and maximum of its groups.
        search: Called with views and extremes divided by a power of two, and with that number.
            What it returns for each view is multiplied by it already.

    Returns:
        For each view what was found for its groups.
    """
    if extremes[0][0].dtype == torch.float16:
        return search(views, extremes, 1.0)
    exponents = [_needed_exponents(low, high) for low, high in extremes]
    if not any(bool(each.any()) for each in exponents):
        return search(views, extremes, 1.0)
    every = torch.cat([each.reshape(-1) for each in exponents]).unique().tolist()
    if extremes[0][0].dtype != torch.float64:
        # One power serves all large ones.
        most = max(every)
        every = [each for each in every if each < 0] + ([most] if most >= 0 else [])
        exponents = [torch.where(each >= 0, most, each) for each in exponents]
    whole: list[Range] | None = None
    for exponent in every:
        factor = 2.0**exponent
        if exponent == 0:
            part = search(views, extremes, factor)
        else:
            part = search(
                [replace(view, values=view.values / factor) for view in views],
                [(low / factor, high / factor) for low, high in extremes],
                factor,
            )
        if whole is None:
            whole = part
            continue
        for i, each in enumerate(exponents):
            first, second = (
                torch.where(each == exponent, new, old)
                for new, old in zip(part[i], whole[i], strict=True)
            )
            whole[i] = first, second
    assert whole is not None
    return whole


def _needed_exponents(low: Tensor, high: Tensor) -> Tensor:
    """The power of two that each group is divided by, as an exponent, int64; 0 for most."""
    ends = torch.stack([low, high])
    largest = torch.where(ends.isfinite(), ends, 0).abs().amax(0)
    exponent = torch.frexp(largest).exponent.long()
    over = (exponent - _LARGEST_EXPONENT).clamp(min=0)
    if low.dtype != torch.float64:
        return torch.where(exponent < _SMALLEST_OF_FLOAT32, -_REACH_OF_FLOAT32, over)
    # Few powers of two serve all groups.
    over = (over + _REACH - 1) // _REACH * _REACH
    under = (_SMALLEST_EXPONENT - exponent).clamp(min=0)
    return over - (under + _REACH - 1) // _REACH * _REACH


def times(global_scale: Tensor, factor: float) -> Tensor:
    """A global scale for values divided by a factor, at most what float32 holds."""
    limits = torch.finfo(torch.float32)
    return (global_scale.double() * factor).clamp(limits.tiny, limits.max).float()
