"""Scales of formats whose scale may be any number: candidates, then projection onto their codes.

For fixed codes q the best scale is A / B with A = sum w x q and B = sum w q^2, and its error is
sum w x^2 - A^2 / B (weighted least squares). Candidates are ranked by that error, the best two are
projected twice, which never makes them worse, and the better one is rounded as it will be stored.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.quant_args import round_to_quantized_type_dtype
from compressed_tensors.quantization.utils import calculate_qparams
from torch import Tensor

from calipers.ranges.group_sums import Candidates, GroupBatch, Sums
from calipers.ranges.rounding import Rounding

__all__ = ["Scales", "Scheme", "candidate_ratios", "min_max_scales", "project_batch"]

#: Candidates of one pass over the values: their sums stay in registers.
TILE = 16
#: How many of the best candidates are projected: neighbours may end in different optima.
TRACKS = 2
#: Projections of each.
STEPS = 2
#: From so many bits on A^2 / B cancels in float32, and candidates are ranked by their own error.
CANCELS = 6


@dataclass(frozen=True)
class Scheme:
    """What is searched for.

    Args:
        args: Quantization arguments; the strategy does not count.
        dtype: In which scales will be stored, unless `args.scale_dtype` says otherwise.
        signed: Whether negative scales are candidates too (symmetric integers).
        global_scale: TENSOR_GROUP only, shape (1,): scales are stored multiplied by it.
    """

    args: QuantizationArgs
    dtype: torch.dtype
    signed: bool = False
    global_scale: Tensor | None = None

    @functools.cached_property
    def rounding(self) -> Rounding:
        """The number format."""
        return Rounding.of(self.args)

    def store(self, scale: Tensor) -> Tensor:
        """Scales as they come back from where they are stored, float32, the global scale aside."""
        if self.global_scale is not None:
            scale = scale * self.global_scale
        if self.args.scale_dtype is not None:
            scale = round_to_quantized_type_dtype(scale, self.args.scale_dtype)
        if self.global_scale is not None:
            return scale / self.global_scale
        limit = min(torch.finfo(self.dtype).max, torch.finfo(torch.float32).max)
        return scale.clamp(-limit, limit).to(self.dtype).float()


@dataclass(frozen=True)
class Scales:
    """Scales with their zero points, float32, of equal shapes; zero_point None: all zero."""

    scale: Tensor
    zero_point: Tensor | None = None

    def gather(self, index: Tensor) -> Scales:
        """For each group the entries of dimension 0 that `index` names, shape (picked, groups)."""
        zero = None if self.zero_point is None else self.zero_point.gather(0, index)
        return Scales(self.scale.gather(0, index), zero)

    def where(self, condition: Tensor, other: Scales) -> Scales:
        """These where the condition holds, else the others."""
        zero = None
        if self.zero_point is not None and other.zero_point is not None:
            zero = torch.where(condition, self.zero_point, other.zero_point)
        return Scales(torch.where(condition, self.scale, other.scale), zero)

    def stacked_on(self, other: Scales) -> Scales:
        """Both, one above the other in dimension 0."""
        zero = None
        if self.zero_point is not None and other.zero_point is not None:
            zero = torch.stack([self.zero_point, other.zero_point])
        return Scales(torch.stack([self.scale, other.scale]), zero)


def min_max_scales(low: Tensor, high: Tensor, scheme: Scheme) -> Scales:
    """What compressed-tensors makes of a range, the global scale divided out, float32.

    Args:
        low: Minimum of each group, in the dtype of the values; Inf for a group of nothing.
        high: Maximum of each group; -Inf for a group of nothing.
        scheme: What is searched for.
    """
    scale, zero_point = calculate_qparams(low, high, scheme.args, global_scale=scheme.global_scale)
    scale = scale.float()
    # A float64 scale may be too small for float32.
    scale = torch.where(scale == 0, torch.finfo(torch.float32).tiny, scale)
    if scheme.global_scale is not None:
        scale = scale / scheme.global_scale
    return Scales(scale, None if scheme.args.symmetric else zero_point.float())


def project_batch(batch: GroupBatch, low: Tensor, high: Tensor, scheme: Scheme) -> Scales:
    """Scale and zero point of each group with the smallest sum of w (x - dequantized x)^2.

    Args:
        batch: The groups.
        low: Minimum of each group, in the dtype of the values, shape (groups,).
        high: Maximum of each group.
        scheme: What is searched for.

    Returns:
        Scales as they will be stored, the global scale divided out, shape (groups,). A group that
        min/max serves as well or better keeps the scale of min/max.
    """
    plain = min_max_scales(low, high, scheme)
    base = _bases(low.float(), high.float(), scheme.rounding, bool(scheme.args.symmetric))
    inverse = 1 / base
    candidates = _candidates(low.float(), base, scheme)
    best = _best_candidates(batch, inverse, candidates, scheme.rounding)
    polish = Sums(scheme.rounding, "polish", TRACKS)
    error = torch.zeros_like(best.scale, dtype=torch.float64)
    for _ in range(STEPS):
        best, error = _project(batch, polish, inverse, best)
    found = best.gather(error.argmin(0, keepdim=True))
    zero = None if found.zero_point is None else found.zero_point[0]
    stored = Scales(scheme.store(found.scale[0] * base), zero)
    both = stored.stacked_on(plain)
    sums = batch.sum(polish, Candidates(inverse, both.scale * inverse, both.zero_point))
    mine, others = sums[-TRACKS:]
    # A comparison with NaN (a scale that overflowed, or rounded to zero) fails.
    return stored.where(mine < others, plain)


def _bases(low: Tensor, high: Tensor, rounding: Rounding, symmetric: bool) -> Tensor:
    """The unit in which a group's scales are searched: that of its range, and never zero."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    if symmetric:
        base = torch.maximum(-low, high) / ((rounding.high - rounding.low) / 2)
    else:
        base = high / (rounding.high - rounding.low) - low / (rounding.high - rounding.low)
    return base.clamp(min=torch.finfo(torch.float32).tiny)


def _candidates(low: Tensor, base: Tensor, scheme: Scheme) -> Scales:
    """All candidates in units of the base, shape (candidates, groups)."""
    rounding = scheme.rounding
    ratio = candidate_ratios(rounding, scheme.signed).to(base.device)
    if scheme.args.symmetric:
        return Scales(ratio.unsqueeze(1).expand(-1, base.numel()))
    zero = (rounding.low - low.clamp(max=0) / base).round()
    zeros = torch.stack([zero - 1, zero, zero + 1]).clamp(rounding.low, rounding.high)
    return Scales(
        ratio.view(-1, 1, 1).expand(-1, 3, base.numel()).reshape(-1, base.numel()),
        zeros.unsqueeze(0).expand(ratio.numel(), -1, -1).reshape(-1, base.numel()),
    )


@functools.lru_cache(maxsize=64)
def candidate_ratios(rounding: Rounding, signed: bool = False) -> Tensor:
    """Candidate scales in units of the scale of the range, a multiple of TILE of them.

    Integers: dense about where the optimum of bell-shaped values lies (the fewer bits, the lower),
    sparse down to where a few values of great importance pull it and up to 1.5, where the largest
    value takes a code below the largest. Floats: an octave up, since doubling a scale that covers
    the range never pays, and a little below one. Signed: those and their negatives.
    """
    if not rounding.integer:
        parts = [(0.5, 0.85, 8), (0.88, 1.96, 24)] if rounding.num_bits == 8 else [(0.4, 1.96, 32)]
    else:
        parts = _WINDOWS[min(max(rounding.num_bits, 2), 8)]
    ratios = torch.cat(
        [torch.logspace(math.log10(a), math.log10(b), count) for a, b, count in parts]
    )
    return torch.cat([ratios, -ratios]) if signed else ratios


#: From, to, count; in logarithmic steps.
_WINDOWS = {
    2: [(0.05, 1.5, 32)],
    3: [(0.08, 1.55, 32)],
    4: [(0.12, 0.6, 9), (0.64, 1.14, 19), (1.2, 1.52, 4)],
    5: [(0.15, 0.7, 7), (0.75, 1.1, 20), (1.15, 1.52, 5)],
    6: [(0.25, 0.85, 10), (0.88, 1.08, 26), (1.1, 1.52, 12)],
    7: [(0.4, 0.93, 12), (0.95, 1.08, 38), (1.09, 1.52, 14)],
    8: [(0.6, 0.97, 24), (0.98, 1.1, 48), (1.11, 1.5, 24)],
}


def _best_candidates(
    batch: GroupBatch, inverse: Tensor, candidates: Scales, rounding: Rounding
) -> Scales:
    """The TRACKS best of the candidates, projected where that costs nothing."""
    cancels = rounding.num_bits >= CANCELS
    sums = Sums(rounding, "residual" if cancels else "projection", TILE)
    gains, ratios = [], []
    for first in range(0, candidates.scale.shape[0], TILE):
        part = slice(first, first + TILE)
        ratio = candidates.scale[part].contiguous()
        zero = None if candidates.zero_point is None else candidates.zero_point[part]
        found = batch.sum(sums, Candidates(inverse, ratio, zero))
        if cancels:
            gains.append(-found)
            ratios.append(ratio)
        else:
            a, b = found.chunk(2)
            gains.append((a * a / b).nan_to_num(0.0))
            ratios.append(torch.where(b > 0, a / b, ratio).float())
    gain = torch.cat(gains)
    first = gain.argmax(0, keepdim=True)
    second = gain.scatter(0, first, -torch.inf).argmax(0, keepdim=True)
    return Scales(torch.cat(ratios), candidates.zero_point).gather(torch.cat([first, second]))


def _project(
    batch: GroupBatch, polish: Sums, inverse: Tensor, scales: Scales
) -> tuple[Scales, Tensor]:
    """Each scale moved to the best one for its codes, and the error it then has, in float64."""
    found = batch.sum(polish, Candidates(inverse, scales.scale, scales.zero_point))
    a, b, error = found.chunk(3)
    ratio = scales.scale.double()
    gap = a - ratio * b
    better = b > 0
    ratio = torch.where(better, a / b, ratio)
    error = error - torch.where(better, gap * gap / b, 0)
    return Scales(ratio.float(), scales.zero_point), error
