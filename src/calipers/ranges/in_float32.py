"""Searches in float32 of values that float32 may not hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor

from calipers.formats import has_mx_scales
from calipers.grouping import Groups

__all__ = ["has_free_scales", "search_in_float32", "times"]

#: Values of a larger exponent are searched as if they were smaller by a power of two.
_LARGEST_EXPONENT = 124
#: Float64 values of a smaller exponent are searched as if they were larger.
_SMALLEST_EXPONENT = -76
#: So are those of other dtypes, where scales would be no normal float32 numbers, by one power.
_SMALLEST_OF_FLOAT32, _REACH_OF_FLOAT32 = -100, 60
#: The powers of two that float64 values are divided by are those of multiples of this exponent.
_REACH = 200

Range = tuple[Tensor, Tensor]


def has_free_scales(
    args: QuantizationArgs, dtype: torch.dtype, global_scale: Tensor | None
) -> bool:
    """Whether scales of values of a dtype can be divided by a power of two.

    Scales that are rounded cannot, unless they are powers of two or have a global scale beside
    them.
    """
    return args.scale_dtype is None or (
        dtype == torch.float64 and (global_scale is not None or has_mx_scales(args))
    )


def search_in_float32(
    views: Sequence[Groups],
    extremes: Sequence[Range],
    search: Callable[[Sequence[Groups], Sequence[Range], float], list[Range]],
    free: bool = True,
) -> list[Range]:
    """Search values in float32 that it may not hold, or whose `high - low` it may not hold.

    Such values are searched as if they were smaller by a power of two (or larger, where all of a
    group would vanish in float32). Groups of float64 values that need other powers of two are
    searched one power after the other.

    Args:
        views: The views of one value.
        extremes: For each view the minimum and maximum of its groups.
        search: Called with views and extremes divided by a power of two, and with that number.
            What it returns for each view is multiplied by it already.
        free: Whether scales can be divided by a power of two; else values are searched as they are.

    Returns:
        For each view what the search found for its groups.
    """
    if not free or extremes[0][0].dtype == torch.float16:
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
