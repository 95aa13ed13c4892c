"""Histograms over bit patterns: pooled counts that add up in any order, in bounded memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from calipers.ranges.views import GroupedView

__all__ = ["Histogram", "count_patterns", "percentile_range"]

#: Patterns of 16 bits.
NUM_PATTERNS = 1 << 16
#: Bits of the exponent within a pattern: all set means NaN or Inf.
_EXPONENT = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00, torch.float32: 0x7F80}
#: Halves the width of an even spread in the two points that have its mean and variance.
_TO_DEVIATION = 3**-0.5


@dataclass(frozen=True)
class Histogram:
    """How often each pattern of 16 bits occurred among the values of each qparam.

    For bfloat16 and float16 a pattern is a value, and nothing is lost. For float32 (float64 and
    integers are read as float32) a pattern is the upper half of the bits, a bin of at most 1/128 of
    its values; the sum of the lower halves tells the mean of each bin exactly. Two histograms of
    one dtype are added by adding their tensors.

    Args:
        counts: Number of values by pattern, shape (*qparam_shape, 65536), int64. NaN and Inf are
            not counted.
        offsets: Float32 only: sum of the lower 16 bits by pattern, as integers; same shape, int64.
        dtype: bfloat16, float16 or float32: what the patterns mean.
    """

    counts: Tensor
    offsets: Tensor | None
    dtype: torch.dtype

    @staticmethod
    def dtype_for(dtype: torch.dtype) -> torch.dtype:
        """The dtype whose patterns are counted for values of `dtype`."""
        return dtype if dtype in _EXPONENT else torch.float32

    def points(self) -> tuple[Tensor, Tensor]:
        """Weighted values that stand for all that was counted.

        Of a 16-bit pattern it is the value itself. Of a float32 bin it is two values around the
        mean, as if the bin were filled evenly around it as far as it reaches: exact for values
        that are bfloat16 numbers (small integers too) and for a value alone in its bin, and a bin's
        mean is always exact.

        Returns:
            Values, float32, shape (1 or qparams, n); and weights, float64, shape (qparams, n). No
            more than the qparam of the most different patterns has, the others filled up with
            weights of zero.
        """
        counts = self.counts.flatten(0, -2)
        occupied = counts.any(0).nonzero().flatten()
        weights = counts[:, occupied].double()
        most = int((weights > 0).sum(-1).max()) if weights.numel() else 0
        own = occupied.unsqueeze(0)
        if most < occupied.numel():
            place = (weights == 0).to(torch.int8).argsort(dim=-1, stable=True)[:, :most]
            own, weights = occupied[place], weights.gather(-1, place)
        if self.offsets is None:
            patterns = own.to(torch.int32).to(torch.int16)  # wraps, so that bits stay
            return patterns.view(self.dtype).float(), weights
        sums = self.offsets.flatten(0, -2).gather(-1, own.expand_as(weights)).double()
        mean = sums / weights.clamp(min=1)
        reach = torch.minimum(mean, NUM_PATTERNS - 1 - mean) * _TO_DEVIATION
        reach = torch.where(weights == 1, 0, reach)  # a lone value keeps its own size
        edge = (own.to(torch.int32) << 16).view(torch.float32).double()
        last = ((own.to(torch.int32) << 16) | 0xFFFF).view(torch.float32).double()
        step = (last - edge) / (NUM_PATTERNS - 1)
        values = torch.cat([edge + step * (mean - reach), edge + step * (mean + reach)], -1)
        return values.float(), torch.cat([weights, weights], -1) / 2


def count_patterns(view: GroupedView) -> Histogram:
    """Histogram of a view's values, in one pass over them.

    Args:
        view: Values of any floating dtype; NaN and Inf are not counted. Float64 beyond the range
            of float32 counts as its largest value.

    Returns:
        The histogram, with `view.qparam_shape` in front of the patterns.
    """
    dtype = Histogram.dtype_for(view.values.dtype)
    shape = (*view.qparam_shape, NUM_PATTERNS)
    counts = torch.zeros(shape, dtype=torch.int64, device=view.values.device)
    offsets = torch.zeros_like(counts) if dtype == torch.float32 else None
    for where, piece in view.pieces():
        target = counts[where]
        groups = target.shape[:-1].numel()
        rows = _in_dtype(piece, dtype).reshape(groups, -1)
        bits = rows.view(torch.int16 if offsets is None else torch.int32).to(torch.int32)
        index = (bits if offsets is None else bits >> 16) & (NUM_PATTERNS - 1)
        if groups > 1:
            first = torch.arange(groups, dtype=torch.int64, device=index.device) * NUM_PATTERNS
            index = index + first.unsqueeze(-1)
        index = index.flatten()
        _add_counts(target, index)
        if offsets is not None:
            _add_counts(offsets[where], index, (bits & (NUM_PATTERNS - 1)).flatten())
    exponent = _EXPONENT[dtype]
    for sign in (0, NUM_PATTERNS // 2):
        for each in (counts, offsets):
            if each is not None:
                each[..., sign + exponent : sign + NUM_PATTERNS // 2] = 0
    return Histogram(counts, offsets, dtype)


def _add_counts(target: Tensor, index: Tensor, weights: Tensor | None = None) -> None:
    """Count each index in the flattened target, or sum weights that are integers."""
    if index.numel() < target.numel() and target.is_contiguous():
        # Few values in many bins: what a histogram of its own would cost is its bins.
        added = torch.ones_like(index) if weights is None else weights
        target.view(-1).scatter_add_(0, index.long(), added.long())
        return
    # Sums in float64 are exact here: integers below 2**53, and so the order does not show.
    found = torch.bincount(index, weights=weights, minlength=target.numel())
    target += found.to(torch.int64).view(target.shape)


def _in_dtype(values: Tensor, dtype: torch.dtype) -> Tensor:
    if values.dtype == torch.float64:
        limit = torch.finfo(torch.float32).max
        values = torch.where(values.isfinite(), values.clamp(-limit, limit), torch.nan)
    return values.to(dtype)


def percentile_range(
    histogram: Histogram, low: Tensor, high: Tensor, percentile: float
) -> tuple[Tensor, Tensor]:
    """Extremes, cut off at a size that so many of the values do not exceed.

    Args:
        histogram: The values.
        low: Smallest value of each qparam, of `qparam_shape`.
        high: Largest value, likewise.
        percentile: Percent of the values, by size |x|, that the range must hold; above 0.

    Returns:
        Minimum and maximum, of the shape and dtype of `low`. A bin of float32 counts as two values;
        see `Histogram`. Where nothing was counted the extremes are returned.
    """
    values, weights = histogram.points()
    order = values.abs().argsort(-1).expand_as(weights)
    sizes = values.abs().expand_as(weights).gather(-1, order)
    cumulated = weights.gather(-1, order).cumsum(-1)
    wanted = cumulated[:, -1:] * (percentile / 100)
    # The wanted number itself is subject to rounding: a hair below it is enough.
    place = (cumulated < wanted * (1 - 1e-12)).sum(-1, keepdim=True)
    limit = sizes.gather(-1, place.clamp(max=sizes.shape[-1] - 1)).reshape(low.shape).to(low.dtype)
    counted = (histogram.counts.sum(-1) > 0).reshape(low.shape)
    return (
        torch.where(counted, torch.maximum(low, -limit), low),
        torch.where(counted, torch.minimum(high, limit), high),
    )
