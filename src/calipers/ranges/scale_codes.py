"""Scales that are codes themselves (NVFP4: float8; MX: powers of two): searched exhaustively.

Two bounds make it short. If a scale s covers the largest value, the error at 2s is at least that
at s, since the values of a float format at 2s are among those at s: no scale an octave or more
above the smallest covering one wins. And the part of the error that clipping alone makes only
grows as the scale falls: once it reaches the best error found, no smaller scale wins.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from calipers.formats import E4M3, has_mx_scales
from calipers.ranges.candidate_sums import Candidates, Chunk, MemoryChunk, Sums
from calipers.ranges.least_squares import Scales, ScaleSpec, min_max_scales

__all__ = ["all_scales", "search_scale_codes"]

#: Candidates of one pass. float8 has eight codes an octave: one octave above the smallest covering
#: code and one below; of powers of two the covering one and three below.
FLOAT8_TILE, MX_TILE = 16, 4


def search_scale_codes(chunk: Chunk, low: Tensor, high: Tensor, spec: ScaleSpec) -> Scales:
    """The scale code of each group with the smallest sum of w (x - dequantized x)^2 of all codes.

    Args:
        chunk: Some groups.
        low: Minimum of each group, in the dtype of the values, shape (groups,).
        high: Maximum of each group.
        spec: Which scales can be chosen.

    Returns:
        Scales, the global scale divided out, float32, shape (groups,). A group of zeros gets the
        scale that min/max gives it.
    """
    table = all_scales(spec, low.device)
    amax = torch.maximum(-low.float().clamp(max=0), high.float().clamp(min=0))
    # The smallest scale that covers each group.
    covering = torch.searchsorted(table, amax / spec.format.high).clamp(max=table.numel() - 1)
    tile, above = (MX_TILE, 0) if has_mx_scales(spec.args) else (FLOAT8_TILE, FLOAT8_TILE // 2 - 1)
    if chunk.whole is not None:
        found = chunk.whole.search_scale_codes(table, covering, above, tile - 1)
    else:
        found = _search_down(chunk, covering, table, tile, above, spec)
    plain = min_max_scales(low, high, spec)
    return Scales(torch.where((low < 0) | (high > 0), table[found], plain.scale))


def all_scales(spec: ScaleSpec, device: torch.device) -> Tensor:
    """All scales that can be stored, ascending, the global scale divided out, float32."""
    mx = has_mx_scales(spec.args)
    table = (_powers_of_two(spec.dtype) if mx else E4M3.positive_codes()).to(device)
    return table if spec.global_scale is None else table / spec.global_scale


def _search_down(
    chunk: Chunk, covering: Tensor, table: Tensor, tile: int, above: int, spec: ScaleSpec
) -> Tensor:
    """Index of the best code of each group: tile after tile downwards, until the bound says stop.

    Subnormal float8 codes have no octave of eight codes, but the whole lowest tile covers theirs.
    """
    sums = Sums(spec.format, "bounded residual", tile)
    inverse = 1 / table[covering].clamp(min=torch.finfo(torch.float32).tiny)
    steps = torch.arange(tile - 1, -1, -1, dtype=torch.int64, device=table.device).unsqueeze(1)
    lowest = (covering + above - tile + 1).clamp(min=0)
    best = covering.clone()
    best_error = torch.full_like(inverse, torch.inf)
    active = torch.arange(covering.numel(), dtype=torch.int64, device=table.device)
    while True:
        codes = (lowest + steps).clamp(max=table.numel() - 1)
        found = chunk.sum(sums, Candidates(inverse, table[codes] * inverse))
        error, picked = found[:tile].float().min(0)
        better = error < best_error[active]
        best[active] = torch.where(better, codes.gather(0, picked.unsqueeze(0))[0], best[active])
        best_error[active] = torch.where(better, error, best_error[active])
        going = (lowest > 0) & (found[tile] < best_error[active])
        if not going.any():
            return best
        if isinstance(chunk, MemoryChunk) and chunk.values is not None:
            # Of other groups a call costs little for those that are done.
            left = going.nonzero().squeeze(1)
            chunk, active = chunk.select(left), active[left]
            inverse, lowest = inverse[left], lowest[left]
        lowest = (lowest - tile).clamp(min=0)


@functools.lru_cache(maxsize=8)
def _powers_of_two(dtype: torch.dtype) -> Tensor:
    """The scales of MX, 2**-127 to 2**127, as far as `dtype` has them, denormal ones too."""
    powers = torch.exp2(torch.arange(-127, 128, dtype=torch.float64, device="cpu"))
    limits = torch.finfo(dtype)
    return powers[(powers >= limits.smallest_normal * limits.eps) & (powers <= limits.max)].float()
