"""The largest values of blocks, counted by size: what tells how far the scales of blocks differ."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["NUM_BINS", "count_block_maxima", "largest_with_headroom"]

#: Bins of an octave, equally wide.
_PER_OCTAVE = 16
#: Exponents of float32 as `torch.frexp` gives them, from the smallest denormal to the largest.
_EXPONENTS = range(-148, 129)
NUM_BINS = len(_EXPONENTS) * _PER_OCTAVE


def count_block_maxima(value: Tensor, block: int) -> Tensor:
    """Count blocks of consecutive values by the size of their largest.

    A bin is a sixteenth of an octave, by the bits of the value: counts are the same on every
    device, and those of two tensors add up.

    Args:
        value: Shape (..., cols), floating; NaN and Inf count as 0.
        block: Values of a block along the last dimension, the last of a row perhaps fewer.

    Returns:
        Shape (NUM_BINS,), int64, on the device of the value. Blocks of zeros are not counted.
    """
    value = torch.where(value.isfinite(), value, 0)
    blocks = pad(value, (0, -value.shape[-1] % block)).unflatten(-1, (-1, block))
    largest = torch.maximum(blocks.amax(-1), -blocks.amin(-1)).flatten()
    if largest.dtype == torch.float64:
        largest = largest.clamp(max=torch.finfo(torch.float32).max)
    largest = largest.float()
    fraction, exponent = torch.frexp(largest)
    within = ((fraction * 2 - 1) * _PER_OCTAVE).long()
    bins = (exponent.long() - _EXPONENTS.start) * _PER_OCTAVE + within
    counts = torch.zeros(NUM_BINS, dtype=torch.int64, device=value.device)
    filled = largest > 0
    return counts.scatter_add_(0, torch.where(filled, bins, 0), filled.long())


def largest_with_headroom(
    counts: Tensor, largest: Tensor, *, low: float, high: float, headroom: float
) -> Tensor:
    """The size of value that a global scale should be made for.

    Args:
        counts: What `count_block_maxima` gives, in all.
        largest: Largest size of any value, shape (1,).
        low: Percentile of the block maxima that must keep a precise scale.
        high: Percentile that must not be clipped.
        headroom: How many times the size at `low` there is room for: 16384 leaves the block at
            `low` a scale of 448 / 16384 in E4M3, which is above the smallest normal number.

    Returns:
        The greater of `headroom` times the size at `low` and the size at `high`, shape (1,),
        float64, to a sixteenth of an octave; `largest` where no block is counted.
    """
    reached = counts.cumsum(0)
    total, largest = reached[-1:], largest.double()

    def edge(percentile: float, above: int) -> Tensor:
        """The edge of the bin that holds a percentile; above the last bin there is none."""
        rank = (total * (percentile / 100)).ceil().clamp(min=1)
        index = (reached < rank).sum(0, keepdim=True) + above
        exponent = index.div(_PER_OCTAVE, rounding_mode="floor") + _EXPONENTS.start - 1
        found = torch.ldexp(1 + (index % _PER_OCTAVE).double() / _PER_OCTAVE, exponent)
        return torch.where(index < NUM_BINS, found, torch.inf)

    found = torch.maximum(edge(low, 0) * headroom, torch.minimum(edge(high, 1), largest))
    return torch.where(total > 0, found, largest)
