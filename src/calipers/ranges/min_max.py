"""Smallest and largest value of every group, in one pass over memory."""

from __future__ import annotations

import torch
from torch import Tensor

from calipers.engines.dispatch import run
from calipers.engines.kernels import MIN_MAX, Problem
from calipers.grouping import SMALLEST_CHUNK, Groups

__all__ = ["min_max"]

#: Values that min/max reads in the time in which a search works on one.
READS = 256


def min_max(view: Groups, *, engine: str | None = None) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of each group.

    Args:
        view: Values of any floating dtype.
        engine: "native" or "eager"; None chooses, see `calipers.engines.dispatch`. Of the small
            values, and on other devices than the CPU, it is always eager.

    Returns:
        Minimum and maximum, each of shape `view.qparam_shape`, in the dtype of the values. NaN and
        Inf among the values show in the result, unless the view leaves them out: then a group with
        no finite value gets Inf and -Inf, the range of nothing, whose scale is that of zeros.
    """
    values = view.values
    if values.numel() <= SMALLEST_CHUNK or values.device.type != "cpu":
        return _min_max_eager(view)
    problem = Problem(values.device, values.numel() // READS, (values.dtype,))
    return run(MIN_MAX, _min_max_eager, lambda min_max: min_max(view), problem, engine)


def _min_max_eager(view: Groups) -> tuple[Tensor, Tensor]:
    """The same by torch operations.

    Each piece is read from memory once: its maximum is taken while it is still in the cache from
    its minimum (`torch.aminmax` along a dimension is slower than the two together).
    """
    if not view.finite_only and all(size == 1 for size in view.qparam_shape):
        low, high = torch.aminmax(_in_memory_order(view.gathered()))
        return low.reshape(view.qparam_shape), high.reshape(view.qparam_shape)
    if not view.finite_only and view.values.numel() <= SMALLEST_CHUNK:
        values = view.gathered()
        return values.amin(view.reduce_dims), values.amax(view.reduce_dims)
    low = view.values.new_full(view.qparam_shape, torch.inf)
    high = view.values.new_full(view.qparam_shape, -torch.inf)
    num_kept = len(view.qparam_shape)
    in_float32 = view.values.device.type == "cpu" and view.values.element_size() == 2
    for where, piece in view.chunks():
        dims = tuple(range(num_kept, piece.dim()))
        if in_float32:
            piece = piece.float()  # exact, and what the CPU has vector instructions for
        if view.finite_only:
            finite = piece.isfinite()
            piece_low = torch.where(finite, piece, torch.inf).amin(dims)
            piece_high = torch.where(finite, piece, -torch.inf).amax(dims)
        else:
            piece_low, piece_high = piece.amin(dims), piece.amax(dims)
        piece_low, piece_high = piece_low.to(low.dtype), piece_high.to(high.dtype)
        # A large group comes in several pieces, so results are brought together, not written.
        torch.minimum(low[where], piece_low, out=low[where])
        torch.maximum(high[where], piece_high, out=high[where])
    return low, high


def _in_memory_order(values: Tensor) -> Tensor:
    """The same values with dimensions ordered by stride: a reduction of all reads straight."""
    return values.permute(sorted(range(values.dim()), key=values.stride, reverse=True))
