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
#: Up to so many values in one group, `torch.aminmax` is done before a kernel is called.
_ONE_GROUP = 2**20


def min_max(view: Groups, *, engine: str | None = None) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of each group.

    Args:
        view: Values of any floating dtype.
        engine: "native" or "eager"; None chooses, see `calipers.engines.dispatch`. Up to
            `SMALLEST_CHUNK` values, and on other devices than the CPU, it is always eager,
            and so is one group of up to 2^20 values.

    Returns:
        Minimum and maximum, each of shape `view.qparam_shape`, in the dtype of the values. NaN and
        Inf among the values show in the result, unless the view leaves them out: then a group with
        no finite value gets Inf and -Inf, the range of nothing, whose scale is that of zeros.

    Example:
        >>> rows = Groups(torch.tensor([[1.0, -2.0], [3.0, 4.0]]), reduce_dims=(1,))
        >>> min_max(rows)
        (tensor([-2.,  3.]), tensor([1., 4.]))
    """
    values = view.values
    few = values.numel() <= (_ONE_GROUP if _is_one(view) else SMALLEST_CHUNK)
    if few or values.device.type != "cpu":
        return _min_max_eager(view)
    problem = Problem(values.device, values.numel() // READS, (values.dtype,))
    return run(MIN_MAX, _min_max_eager, lambda min_max: min_max(view), problem, engine)


def _min_max_eager(view: Groups) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of each group, by torch operations.

    Each chunk is read from memory once: its minimum leaves it in the cache for its maximum.
    (`torch.aminmax` along a dimension is slower than the two together.)
    """
    if _is_one(view):
        values = view.gathered()
        low, high = torch.aminmax(values if values.is_contiguous() else _in_memory_order(values))
        return low.reshape(view.qparam_shape), high.reshape(view.qparam_shape)
    if not view.finite_only and view.values.numel() <= SMALLEST_CHUNK:
        values = view.gathered()
        return values.amin(view.reduce_dims), values.amax(view.reduce_dims)
    low = view.values.new_full(view.qparam_shape, torch.inf)
    high = view.values.new_full(view.qparam_shape, -torch.inf)
    num_kept = len(view.qparam_shape)
    in_float32 = view.values.device.type == "cpu" and view.values.element_size() == 2
    for where, chunk in view.chunks():
        dims = tuple(range(num_kept, chunk.dim()))
        if in_float32:
            chunk = chunk.float()  # exact, and what the CPU has vector instructions for
        if view.finite_only:
            finite = chunk.isfinite()
            chunk_low = torch.where(finite, chunk, torch.inf).amin(dims)
            chunk_high = torch.where(finite, chunk, -torch.inf).amax(dims)
        else:
            chunk_low, chunk_high = chunk.amin(dims), chunk.amax(dims)
        chunk_low, chunk_high = chunk_low.to(low.dtype), chunk_high.to(high.dtype)
        # A large group comes in several chunks, so results are brought together, not written.
        torch.minimum(low[where], chunk_low, out=low[where])
        torch.maximum(high[where], chunk_high, out=high[where])
    return low, high


def _is_one(view: Groups) -> bool:
    """Whether all values are one group, and none is left out."""
    return not view.finite_only and all(size == 1 for size in view.qparam_shape)


def _in_memory_order(values: Tensor) -> Tensor:
    """The values with dimensions ordered by stride, so that a reduction of all reads straight."""
    return values.permute(sorted(range(values.dim()), key=values.stride, reverse=True))
