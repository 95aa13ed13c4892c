"""Scales that may be any number: candidates, and the least squares of their codes.

For fixed codes q the best scale is A / B with A = sum w x q and B = sum w q^2, and its error is
sum w x^2 - A^2 / B (weighted least squares). Candidates are ranked by that error, others about
the best one are tried at a finer distance, and the winner is fitted to its codes once more, which
never makes it worse, and rounded as it will be stored.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.quant_args import round_to_quantized_type_dtype
from torch import Tensor

from calipers.formats import Format
from calipers.ranges.candidate_sums import Candidates, Chunk, Sums
from calipers.ranges.qparams import qparams_of_range

__all__ = ["ScaleSpec", "Scales", "min_max_scales", "search_least_squares"]

#: Candidates of one pass over the values: their sums stay in registers.
TILE = 14
#: How often a zero point may move by one in search of a better one.
ZERO_ROUNDS = 2
#: Zero points of a candidate to each side of that of the range: up to 4 bits, where few values of
#: great importance may pull it far away, and above.
SIDES, SIDES_OF_MANY_BITS = 4, 1
#: From so many bits on A^2 / B cancels in float32: the error at the candidate itself is summed too.
CANCELS = 5


@dataclass(frozen=True)
class ScaleSpec:
    """Which scales can be chosen, and how they are stored.

    Args:
        args: Quantization arguments; the strategy does not count.
        dtype: In which scales will be stored, unless `args.scale_dtype` says otherwise.
        negative_scales: Whether negative scales are candidates too (symmetric integers).
        global_scale: TENSOR_GROUP only, shape (1,): scales are stored multiplied by it.
        unit: The power of two that values were divided by: scales are stored multiplied by it.
    """

    args: QuantizationArgs
    dtype: torch.dtype
    negative_scales: bool = False
    global_scale: Tensor | None = None
    unit: float = 1.0

    @functools.cached_property
    def format(self) -> Format:
        """The number format."""
        return Format.of(self.args)

    def store(self, scale: Tensor) -> Tensor:
        """Scales as they come back from where they are stored, float32, the global scale aside."""
        if self.global_scale is not None:
            scale = scale * self.global_scale
        if self.args.scale_dtype is not None:
            scale = round_to_quantized_type_dtype(scale, self.args.scale_dtype)
        if self.global_scale is not None:
            return scale / self.global_scale
        limit = min(torch.finfo(self.dtype).max, torch.finfo(torch.float32).max)
        if self.unit < 1 and self.args.scale_dtype is None and self.dtype != torch.float64:
            # Denormal numbers are far apart.
            return (scale * self.unit).to(self.dtype).float() / self.unit
        return scale.clamp(-limit, limit).to(self.dtype).float()


@dataclass(frozen=True)
class Scales:
    """Scales with their zero points, float32, of equal shapes; zero_point None: all zero."""

    scale: Tensor
    zero_point: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point."""
        return self.scale, self.zero_point

    def at(self, index: Tensor) -> Scales:
        """For each group the entry of dimension 0 that `index` names, shape (groups,)."""
        row = index.unsqueeze(0)
        return self.each(lambda tensor: tensor.gather(0, row)[0])

    def each(self, change: Callable[[Tensor], Tensor]) -> Scales:
        """Scale and zero point after a change of each."""
        zero = None if self.zero_point is None else change(self.zero_point)
        return Scales(change(self.scale), zero)

    def where(self, condition: Tensor, other: Scales) -> Scales:
        """These scales where the condition holds, the other ones elsewhere."""
        zero = None
        if self.zero_point is not None and other.zero_point is not None:
            zero = torch.where(condition, self.zero_point, other.zero_point)
        return Scales(torch.where(condition, self.scale, other.scale), zero)

    def stacked_on(self, other: Scales) -> Scales:
        """These scales above the other ones, along a new dimension 0."""
        zero = None
        if self.zero_point is not None and other.zero_point is not None:
            zero = torch.stack([self.zero_point, other.zero_point])
        return Scales(torch.stack([self.scale, other.scale]), zero)


def min_max_scales(low: Tensor, high: Tensor, spec: ScaleSpec) -> Scales:
    """The scales that compressed-tensors makes of ranges, the global scale divided out, float32.

    Args:
        low: Minimum of each group, in the dtype of the values; Inf for a group of nothing.
        high: Maximum of each group; -Inf for a group of nothing.
        spec: Which scales can be chosen.
    """
    denormal = spec.unit < 1 and spec.global_scale is None and spec.dtype != torch.float64
    if denormal:
        # Scales are far apart there, and the zero point follows from the one that is stored.
        low, high = low * spec.unit, high * spec.unit
    scale, zero_point = qparams_of_range(low, high, spec.args, spec.global_scale)
    scale = (scale.double() / spec.unit).float() if denormal else scale.float()
    # A float64 scale may be too small for float32.
    scale = torch.where(scale == 0, torch.finfo(torch.float32).tiny, scale)
    if spec.global_scale is not None:
        scale = scale / spec.global_scale
    return Scales(scale, None if spec.args.symmetric else zero_point.float())


def search_least_squares(
    chunk: Chunk, low: Tensor, high: Tensor, spec: ScaleSpec, *, rough: bool = False
) -> Scales:
    """Scale and zero point of each group with the smallest sum of w (x - dequantized x)^2.

    Args:
        chunk: Some groups.
        low: Minimum of each group, in the dtype of the values, shape (groups,).
        high: Maximum of each group.
        spec: Which scales can be chosen.
        rough: Whether the best of the first candidates will do, fitted to its codes, also where
            min/max serves as well or better.

    Returns:
        Scales as they will be stored, the global scale divided out, shape (groups,). A group that
        min/max serves as well or better keeps the scale of min/max.
    """
    plain, codes = min_max_scales(low, high, spec), spec.format
    base, zero, factors, offsets = _whole_range(low.float(), high.float(), spec)
    inverse, fine = 1 / base, _fine_factors(codes)
    rounds = 1 if zero is None else ZERO_ROUNDS
    if rough:
        rounds = 0
        if factors.numel() % (2 * TILE) == 0:
            factors, offsets = factors[::2].contiguous(), offsets[::2].contiguous()

    def choose(winner: Scales) -> Scales:
        if not rough:
            return _choose_stored(chunk, base, winner, plain, spec)
        stored = spec.store(winner.scale * base)
        return Scales(stored, winner.zero_point).where(stored != 0, plain)

    if chunk.whole is not None:
        cancels = _cancels(codes)
        found = chunk.whole.project(inverse, zero, factors, offsets, fine, rounds, cancels)
        return choose(Scales(*found))
    candidates = Scales(factors.unsqueeze(1).expand(-1, base.numel()))
    if zero is not None:
        zeros = (zero + offsets.unsqueeze(1)).clamp(codes.low, codes.high)
        candidates = Scales(candidates.scale, zeros)
    scored = _score(chunk, inverse, candidates, codes)
    for _ in range(rounds):
        scored = scored.best_and(_score(chunk, inverse, scored.about_the_best(fine, codes), codes))
    return choose(scored.best())


def _choose_stored(
    chunk: Chunk, base: Tensor, winner: Scales, plain: Scales, spec: ScaleSpec
) -> Scales:
    """The winner fitted to its codes once more and rounded as stored, unless min/max is as good.

    What the winner's codes give at the rounded scale is an upper bound on the error there, since
    rounding to the nearest code is better still: so the comparison takes one pass over the values.
    """
    inverse = 1 / base
    both = winner.stacked_on(Scales(plain.scale * inverse, plain.zero_point))
    sums = chunk.sum(Sums(spec.format, "polish", 2), Candidates(inverse, *both.tensors))
    (a, _), (b, _), (error, plain_error) = sums.double().chunk(3)
    best = torch.where(b > 0, a / b, winner.scale.double())
    stored = spec.store((best * base).float())
    gap, miss = a - winner.scale * b, stored * inverse - best
    bound = error - gap * gap / b + miss * miss * b
    # A comparison with NaN (a scale that overflowed, a group of zeros) fails.
    good = (bound < plain_error) & (stored != 0)
    return Scales(stored, winner.zero_point).where(good, plain)


def _bases(low: Tensor, high: Tensor, number_format: Format, symmetric: bool) -> Tensor:
    """The unit in which a group's scales are searched: that of its range, and never zero."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    if symmetric:
        base = torch.maximum(-low, high) / (number_format.width / 2)
    else:
        base = high / number_format.width - low / number_format.width
    return base.clamp(min=torch.finfo(torch.float32).tiny)


def _whole_range(
    low: Tensor, high: Tensor, spec: ScaleSpec
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Base, zero point and candidates of each group, about its whole range.

    Returns:
        The unit of scale of each group; its zero point (None where there is none); the candidates
        in that unit; and for each what it adds to the zero point.
    """
    number_format, symmetric = spec.format, bool(spec.args.symmetric)
    base = _bases(low, high, number_format, symmetric)
    factor, offset = _candidates(number_format, symmetric, spec.negative_scales)
    zero = None if symmetric else (number_format.low - low.clamp(max=0) / base).round()
    return base, zero, factor.to(base.device), offset.to(base.device)


@functools.lru_cache(maxsize=64)
def _candidates(number_format: Format, symmetric: bool, negative: bool) -> tuple[Tensor, Tensor]:
    """Candidate scales, and the offsets of their zero points, a multiple of TILE of them.

    Asymmetric formats: each scale with the zero point of the range and some to each side, as far
    as keeping one end of the range where the scale leaves out much of it.
    """
    factors = _candidate_factors(number_format, negative)
    if symmetric:
        return factors, torch.zeros_like(factors)
    most = SIDES if number_format.num_bits <= 4 else SIDES_OF_MANY_BITS
    pairs = []
    for factor in factors.tolist():
        left_out = max(0.0, (1 / factor - 1) * number_format.width / 2)
        step = max(1, round(left_out / max(2, most)))
        sides = min(most, math.ceil((left_out + 1) / step))
        pairs += [(factor, float(side * step)) for side in range(-sides, sides + 1)]
    pairs += [pairs[-1]] * (-len(pairs) % TILE)
    found, offsets = torch.tensor(pairs, dtype=torch.float32, device="cpu").unbind(1)
    return found.contiguous(), offsets.contiguous()


@functools.lru_cache(maxsize=64)
def _candidate_factors(number_format: Format, negative: bool) -> Tensor:
    """Candidate scales in units of the scale of the range, a multiple of TILE of them.

    Negative: those and their negatives.
    """
    start, end, count = number_format.window
    factors = torch.logspace(
        math.log10(start), math.log10(end), count, dtype=torch.float32, device="cpu"
    )
    return torch.cat([factors, -factors]) if negative else factors


def _fine_factors(number_format: Format) -> Tensor:
    """A tile of factors on the best candidate, as far as its neighbours to both sides."""
    start, end, count = number_format.window
    distance = math.pow(end / start, 1 / (count - 1)) - 1
    return 1 + distance * torch.linspace(-1, 1, TILE, dtype=torch.float32, device="cpu")


@dataclass(frozen=True)
class _Scored:
    """Candidates, fitted to their codes where it costs nothing, and gains, (candidates, groups)."""

    scales: Scales
    gain: Tensor

    def best(self) -> Scales:
        """The candidate of the greatest gain in each group, shape (groups,)."""
        return self.scales.at(_first_largest(self.gain))

    def best_and(self, others: _Scored) -> _Scored:
        """The best candidate, followed by others."""
        row, theirs = _first_largest(self.gain).unsqueeze(0), others.scales
        zero = None
        if theirs.zero_point is not None:
            assert self.scales.zero_point is not None
            zero = torch.cat([self.scales.zero_point.gather(0, row), theirs.zero_point])
        scale = torch.cat([self.scales.scale.gather(0, row), theirs.scale])
        return _Scored(Scales(scale, zero), torch.cat([self.gain.gather(0, row), others.gain]))

    def about_the_best(self, fine_factors: Tensor, number_format: Format) -> Scales:
        """A tile of scales about the best candidate, by factors on it.

        Where there are zero points, one tile for the best one and each of its neighbours.
        """
        best = self.best()
        scales = best.scale * fine_factors.to(self.gain.device).unsqueeze(1)
        if best.zero_point is None:
            return Scales(scales)
        zeros = torch.stack([best.zero_point - 1, best.zero_point, best.zero_point + 1])
        zeros = zeros.clamp(number_format.low, number_format.high).repeat_interleave(TILE, dim=0)
        return Scales(scales.repeat(3, 1), zeros)


def _first_largest(gain: Tensor) -> Tensor:
    """Index of the first largest entry along dimension 0: argmax, which is slow there."""
    places = torch.arange(gain.shape[0], dtype=torch.float32, device=gain.device).unsqueeze(1)
    found = torch.where(gain == gain.amax(0), places, torch.inf).amin(0)
    return found.clamp(max=gain.shape[0] - 1).long()


def _cancels(number_format: Format) -> bool:
    """Whether A^2 / B cancels in float32."""
    return not number_format.integer or number_format.num_bits >= CANCELS


def _score(chunk: Chunk, inverse: Tensor, candidates: Scales, number_format: Format) -> _Scored:
    """Gain of each candidate over quantizing all to zero, or minus its error: larger is better."""
    cancels = _cancels(number_format)
    sums = Sums(number_format, "all" if cancels else "least squares", TILE)
    gains, factors = [], []
    for first in range(0, candidates.scale.shape[0], TILE):
        part = slice(first, first + TILE)
        factor = candidates.scale[part].contiguous()
        zero = None if candidates.zero_point is None else candidates.zero_point[part]
        a, b, *error = chunk.sum(sums, Candidates(inverse, factor, zero)).chunk(3 if cancels else 2)
        best = a / b
        if error:
            gap = a - factor * b
            gain = gap * gap / b - error[0]
        else:
            gain = a * best
        some = b > 0
        gains.append(torch.where(some, gain, -torch.inf))
        factors.append(torch.where(some, best, factor))
    return _Scored(Scales(torch.cat(factors).float(), candidates.zero_point), torch.cat(gains))
