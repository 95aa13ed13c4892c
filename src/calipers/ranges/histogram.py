"""Histograms over bit patterns: pooled counts that add up in any order, in bounded memory.

`search_histogram_range` finds the range with the smallest squared error over one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy
from torch import Tensor

from calipers.formats import has_mx_scales
from calipers.grouping import ACCELERATOR_CHUNK, CPU_CHUNK, Groups
from calipers.ranges.qparams import (
    cast_range,
    checked_global_scale,
    fake_quantized,
    qparams_of_range,
)

__all__ = [
    "Histogram",
    "count_patterns",
    "percentile_range",
    "search_histogram_range",
]

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

    def points(
        self, low: Tensor | None = None, high: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Weighted values that stand for all that was counted.

        Of a 16-bit pattern it is the value itself. Of a float32 bin it is two values around the
        mean, as if the bin were filled evenly around it as far as it reaches: exact for values
        that are bfloat16 numbers (small integers too) and for a value alone in its bin, and a bin's
        mean is always exact.

        Args:
            low: Smallest value of each qparam, shape (qparams,): no value of a bin is smaller.
            high: Largest value of each qparam; None where they are not known.

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
        if low is not None and high is not None:
            # Of a constant, or at the ends of the range, there is less room than the bin has.
            middle = edge + step * mean
            room = torch.minimum(
                middle - low.double().unsqueeze(-1), high.double().unsqueeze(-1) - middle
            )
            reach = torch.minimum(reach, (room.clamp(min=0) / step.abs()).nan_to_num(0, 0))
        values = torch.cat([edge + step * (mean - reach), edge + step * (mean + reach)], -1)
        return values.float(), torch.cat([weights, weights], -1) / 2


def count_patterns(view: Groups) -> Histogram:
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
    for where, chunk in view.chunks():
        target = counts[where]
        groups = target.shape[:-1].numel()
        rows = _in_dtype(chunk, dtype).reshape(groups, -1)
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
        high: Largest value of each qparam.
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


#: Largest values of a larger exponent are searched as if they were smaller by a power of two.
LARGEST_EXPONENT = 124
#: The smallest largest value whose fellows down to 2^-20 of it are normal float32 numbers.
SMALLEST_COUNTED = 2.0**-105
#: Qparams whose points are laid side by side at once.
_QPARAMS_AT_ONCE = 32
#: How often the best scale is fitted to its own codes at the end.
_PROJECTIONS = 2
#: By how much a fit must lower the error: below it, rounding would choose between the two.
_WORTH_IT = 1e-4


def search_histogram_range(
    histogram: Histogram,
    low: Tensor,
    high: Tensor,
    args: QuantizationArgs,
    dtype: torch.dtype,
    *,
    global_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Range with the smallest sum of count * (fake_quantize(x) - x)**2 for each qparam.

    Candidates are the extremes, each times a power of two with a fraction: the whole scale down to
    the smallest values at first, then ever finer around the best few. Each candidate is judged by
    the scale and zero point that it gives in `dtype`, so the result is never worse than the
    extremes themselves. The cost depends on how many patterns occur, not on the number of values.

    Args:
        histogram: The values.
        low: Smallest value of each qparam, of `qparam_shape`.
        high: Largest value of each qparam.
        args: Quantization arguments; the strategy does not count.
        dtype: Dtype of the observed values, in which scales are computed.
        global_scale: TENSOR_GROUP only, shape (1,). Without it local scales are left unrounded.

    Returns:
        Minimum and maximum, of the shape and dtype of `low`. Where nothing was counted, or all
        values are zero, the extremes are returned.
    """
    if args.strategy == QuantizationStrategy.TENSOR_GROUP and global_scale is None:
        args = args.model_copy(update={"scale_dtype": None})
    if global_scale is not None:
        global_scale = checked_global_scale(global_scale, low.device)
    shape, parts = low.shape, []
    low, high = low.flatten(), high.flatten()
    counts = histogram.counts.view(-1, NUM_PATTERNS)
    offsets = histogram.offsets
    for start in range(0, low.numel(), _QPARAMS_AT_ONCE):
        some = slice(start, start + _QPARAMS_AT_ONCE)
        lower = None if offsets is None else offsets.view(-1, NUM_PATTERNS)[some]
        ends = low[some], high[some]
        values, weights = Histogram(counts[some], lower, histogram.dtype).points(*ends)
        factor = _factor(*ends, args) if global_scale is None else 1.0
        its_low, its_high = (end / factor for end in ends)
        objective = _Objective(
            values / factor,
            weights,
            its_low,
            its_high,
            args,
            dtype,
            global_scale,
            limit=torch.finfo(low.dtype).max / factor,
        )
        found = [cast_range(end.double() * factor, end.dtype) for end in objective.best_range()]
        known = _is_counted(*ends, histogram.dtype)
        parts.append([torch.where(known, new, end) for new, end in zip(found, ends, strict=True)])
    best_low, best_high = (torch.cat(ends).reshape(shape) for ends in zip(*parts, strict=True))
    return best_low, best_high


def _factor(low: Tensor, high: Tensor, args: QuantizationArgs) -> float:
    """A power of two to divide by, so that codes times their scale do not overflow in float32."""
    if args.scale_dtype is not None and not has_mx_scales(args):
        return 1.0  # such scales are absolute
    ends = torch.stack([low, high]).float()
    largest = torch.where(ends.isfinite(), ends, 0).abs().amax()
    return 2.0 ** max(0, int(torch.frexp(largest).exponent) - LARGEST_EXPONENT)


def _is_counted(low: Tensor, high: Tensor, dtype: torch.dtype) -> Tensor:
    """Whether a histogram tells the values of a qparam apart.

    That of float32 does not for float64 values that are too large, or so small that float32 has no
    bins of 1/128 for them.
    """
    if dtype != torch.float32:
        return torch.ones_like(low, dtype=torch.bool)
    largest = torch.maximum(-low.double(), high.double())
    return (largest >= SMALLEST_COUNTED) & (largest <= torch.finfo(torch.float32).max)


@dataclass(frozen=True)
class _Objective:
    """Squared error of some qparams as a function of the exponents that shrink their extremes."""

    values: Tensor
    weights: Tensor
    low: Tensor
    high: Tensor
    args: QuantizationArgs
    dtype: torch.dtype
    global_scale: Tensor | None
    #: The largest end of a range that can be returned.
    limit: float

    def best_range(self) -> tuple[Tensor, Tensor]:
        """Minimum and maximum of each qparam."""
        one_sided = self.args.symmetric
        first = _ladder() if one_sided else _pairs(_ladder(0.0, -14.0, 15))
        exponents = first.to(self.low.device).expand(self.low.numel(), -1, -1)
        for keep, offsets in _ROUNDS_OF_ONE if one_sided else _ROUNDS_OF_TWO:
            best = self._best(exponents, keep)
            near = best.unsqueeze(2) + offsets.to(best.device)
            exponents = near.flatten(1, 2)
        best = self._best(exponents, 1)
        for _ in range(_PROJECTIONS):
            pair = torch.cat([best, self._projected(best)], 1)
            errors = self._errors(pair)
            worth = errors[:, 1:] < errors[:, :1] * (1 - _WORTH_IT)
            best = torch.where(worth.unsqueeze(-1), pair[:, 1:], best)
        low, high = self._ranges(best)
        found = self.square_sum > 0
        return (
            torch.where(found, low[:, 0], self.low),
            torch.where(found, high[:, 0], self.high),
        )

    @property
    def square_sum(self) -> Tensor:
        """Sum of count * x**2 of each qparam, shape (qparams,), float64."""
        return (self.values.double().square() * self.weights).sum(-1)

    def _best(self, exponents: Tensor, keep: int) -> Tensor:
        """The best few of (qparams, candidates, 2), all of different errors where there are."""
        # In float32, as shares of the sum of squares, errors that differ by rounding are equal.
        share = (self._errors(exponents) / self.square_sum.clamp(min=1e-300).unsqueeze(-1)).float()
        share, order = share.sort(stable=True, dim=-1)
        # Many candidates give one scale once it is rounded: the first of equals stands for them.
        repeated = torch.zeros_like(share, dtype=torch.bool)
        repeated[:, 1:] = share[:, 1:] == share[:, :-1]
        order = order.gather(-1, repeated.to(torch.int8).sort(stable=True, dim=-1).indices)
        return exponents.gather(1, order[:, :keep].unsqueeze(-1).expand(-1, -1, 2))

    def _projected(self, exponents: Tensor) -> Tensor:
        """The exponents at which the codes of these have the least squared error.

        Where a few huge values make up the error, all depends on how exactly they are met.
        """
        scale, zero_point = self._qparams(exponents)
        rounded = self._fake_quantize(self.values.unsqueeze(1), scale, zero_point).double()
        weights, values = self.weights.unsqueeze(1), self.values.double().unsqueeze(1)
        factor = (weights * values * rounded).sum(-1) / (weights * rounded.square()).sum(-1)
        usable = factor.isfinite() & (factor > 0)
        return exponents + torch.where(usable, factor, 1).log2().unsqueeze(-1)

    def _qparams(self, exponents: Tensor) -> tuple[Tensor, Tensor]:
        low, high = (cast_range(t, self.dtype) for t in self._ranges(exponents))
        scale, zero_point = qparams_of_range(low, high, self.args, self.global_scale)
        # In float32, else results would be rounded to the dtype of the scale.
        return cast_range(scale, torch.float32), zero_point

    def _fake_quantize(self, values: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        each = scale.unsqueeze(-1), zero_point.unsqueeze(-1)
        return fake_quantized(values, *each, self.args, self.global_scale)

    def _ranges(self, exponents: Tensor) -> tuple[Tensor, Tensor]:
        """Minimum and maximum for exponents (qparams, candidates, 2)."""
        counted = self.low <= self.high  # else Inf and -Inf: nothing was counted
        factors = exponents.exp2()
        low = torch.where(counted, self.low, 0).unsqueeze(-1) * factors[..., 0].to(self.low.dtype)
        high = torch.where(counted, self.high, 0).unsqueeze(-1) * factors[..., 1].to(self.low.dtype)
        return low.clamp(-self.limit, self.limit), high.clamp(-self.limit, self.limit)

    def _errors(self, exponents: Tensor) -> Tensor:
        """Sum of count * error**2 for exponents (qparams, candidates, 2), float64."""
        scale, zero_point = self._qparams(exponents)
        errors = torch.empty(scale.shape, dtype=torch.float64, device=scale.device)
        for rows, columns in self._chunks(scale.shape):
            values = self.values if self.values.shape[0] == 1 else self.values[rows]
            values = values.unsqueeze(1)
            rounded = self._fake_quantize(values, scale[rows, columns], zero_point[rows, columns])
            square = rounded.double().sub_(values).square_()
            errors[rows, columns] = (square @ self.weights[rows].unsqueeze(-1)).squeeze(-1)
        return errors

    def _chunks(self, shape: torch.Size) -> Iterator[tuple[slice, slice]]:
        """Qparams and candidates of a step whose scratch memory stays in the cache."""
        on_cpu = self.values.device.type == "cpu"
        room = max(1, (CPU_CHUNK if on_cpu else ACCELERATOR_CHUNK) // self.values.shape[-1])
        columns = min(shape[1], room)
        rows = max(1, room // columns)
        for row in range(0, shape[0], rows):
            for column in range(0, shape[1], columns):
                yield slice(row, row + rows), slice(column, column + columns)


def _ladder(top: float = 1.0, bottom: float = -20.0, steps: int = 43) -> Tensor:
    """Falling exponents, alike for both ends, shape (steps, 2)."""
    ladder = torch.linspace(top, bottom, steps, dtype=torch.float64, device="cpu")
    return ladder.unsqueeze(-1).expand(-1, 2)


def _pairs(ladder: Tensor) -> Tensor:
    """All combinations of the two ends' exponents, shape (steps * steps, 2)."""
    return torch.cartesian_prod(ladder[:, 0], ladder[:, 1])


#: How many of the best to go on with, and where to look around each of them, in octaves. The error
#: of float8 has a dozen minima in an octave: the first round finds all of them.
_ROUNDS_OF_ONE = [
    (3, _ladder(1 / 2, -1 / 2, 33)),
    (6, _ladder(1 / 32, -1 / 32, 9)),
    (2, _ladder(1 / 128, -1 / 128, 9)),
]
_ROUNDS_OF_TWO = [
    (keep, _pairs(_ladder(1 / 2**i, -1 / 2**i, 3)))
    for i, keep in enumerate((4, 4, 4, 4, 3, 3, 2, 2, 1), start=1)
]
