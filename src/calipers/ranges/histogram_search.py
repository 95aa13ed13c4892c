"""The range with the smallest squared error over a histogram."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy
from torch import Tensor

from calipers.formats import has_mx_scales
from calipers.ranges.casting import cast_range
from calipers.ranges.global_scale import checked_global_scale
from calipers.ranges.histogram import NUM_PATTERNS, Histogram
from calipers.ranges.qparams import fake_quantized, qparams_of_range
from calipers.ranges.views import ACCELERATOR_PIECE, CPU_PIECE

__all__ = ["search_histogram_range"]

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
        high: Largest value, likewise.
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
        part_low, part_high = (end / factor for end in ends)
        objective = _Objective(
            values / factor,
            weights,
            part_low,
            part_high,
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
        found = self.energy > 0
        return (
            torch.where(found, low[:, 0], self.low),
            torch.where(found, high[:, 0], self.high),
        )

    @property
    def energy(self) -> Tensor:
        """Sum of count * x**2 of each qparam, shape (qparams,), float64."""
        return (self.values.double().square() * self.weights).sum(-1)

    def _best(self, exponents: Tensor, keep: int) -> Tensor:
        """The best few of (qparams, candidates, 2), all of different errors where there are."""
        # As a part of the energy and in float32 errors that differ by rounding alone are equal.
        part = (self._errors(exponents) / self.energy.clamp(min=1e-300).unsqueeze(-1)).float()
        part, order = part.sort(stable=True, dim=-1)
        # Many candidates give one scale once it is rounded: the first of equals stands for them.
        repeated = torch.zeros_like(part, dtype=torch.bool)
        repeated[:, 1:] = part[:, 1:] == part[:, :-1]
        order = order.gather(-1, repeated.to(torch.int8).sort(stable=True, dim=-1).indices)
        return exponents.gather(1, order[:, :keep].unsqueeze(-1).expand(-1, -1, 2))

    def _projected(self, exponents: Tensor) -> Tensor:
        """The same codes at the scale that suits them best (least squares).

        Where a few huge values make up the error, all depends on how exactly they are met.
        """
        scale, zero_point = self._qparams(exponents)
        rounded = self._fake_quantize(self.values.unsqueeze(1), scale, zero_point).double()
        weights, values = self.weights.unsqueeze(1), self.values.double().unsqueeze(1)
        part = (weights * values * rounded).sum(-1) / (weights * rounded.square()).sum(-1)
        usable = part.isfinite() & (part > 0)
        return exponents + torch.where(usable, part, 1).log2().unsqueeze(-1)

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
        for rows, columns in self._pieces(scale.shape):
            values = self.values if self.values.shape[0] == 1 else self.values[rows]
            values = values.unsqueeze(1)
            rounded = self._fake_quantize(values, scale[rows, columns], zero_point[rows, columns])
            square = rounded.double().sub_(values).square_()
            errors[rows, columns] = (square @ self.weights[rows].unsqueeze(-1)).squeeze(-1)
        return errors

    def _pieces(self, shape: torch.Size) -> Iterator[tuple[slice, slice]]:
        """Qparams and candidates of a step whose scratch memory stays in the cache."""
        on_cpu = self.values.device.type == "cpu"
        room = max(1, (CPU_PIECE if on_cpu else ACCELERATOR_PIECE) // self.values.shape[-1])
        columns = min(shape[1], room)
        rows = max(1, room // columns)
        for row in range(0, shape[0], rows):
            for column in range(0, shape[1], columns):
                yield slice(row, row + rows), slice(column, column + columns)


def _ladder(top: float = 1.0, bottom: float = -20.0, steps: int = 43) -> Tensor:
    """The same exponent for both ends, shape (steps, 2)."""
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
