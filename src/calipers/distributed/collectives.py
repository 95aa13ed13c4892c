"""Exchanges between ranks: each meets first, has a timeout, and names its stage where it fails.

Tensors travel as bytes, so that every backend takes every dtype.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from compressed_tensors.offload import as_single_threaded
from torch import Tensor

from calipers.distributed.meeting import Ranks
from calipers.errors import RankError

__all__ = ["first_alone", "gather_objects", "merge_flat"]

Result = TypeVar("Result")


def gather_objects(ranks: Ranks, value: Any, stage: str) -> list[Any]:
    """What each rank gives, in the order of ranks.

    Args:
        ranks: The ranks, all of which make this call.
        value: Anything that pickle takes; tensors on the CPU.
        stage: What errors call it.

    Raises:
        RankError: See `Ranks.meet`; or the exchange failed.
    """
    if ranks.size == 1:
        return [value]
    ranks.meet(stage)
    device = ranks.device
    own = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8).to(device)
    size = torch.tensor([own.numel()], dtype=torch.int64, device=device)
    sizes = [int(each.view(torch.int64)) for each in _all_gather(ranks, size, stage)]
    padded = torch.zeros(max(sizes), dtype=torch.uint8, device=device)
    padded[: own.numel()] = own
    found = _all_gather(ranks, padded, stage)
    return [
        pickle.loads(bytes(each[:size].cpu().numpy()))
        for each, size in zip(found, sizes, strict=True)
    ]


def first_alone(ranks: Ranks, work: Callable[[], Result], stage: str) -> Result:
    """What `work` gives on the first rank, which does it as if there were no others.

    For what compressed-tensors and transformers would do together with all ranks: loading and
    saving of quantized models.

    Args:
        ranks: The ranks, all of which make this call.
        work: Gives anything that pickle takes.
        stage: What errors call it.

    Raises:
        RankError: See `gather_objects`.
    """
    if ranks.size == 1:
        return work()
    found: Result | None = None
    if ranks.rank == 0:
        with as_single_threaded():
            found = work()
    first: Result = gather_objects(ranks, found, stage)[0]
    return first


def merge_flat(
    ranks: Ranks, flat: Tensor, merge: Callable[[Tensor, slice], Tensor], stage: str
) -> Tensor:
    """Merge one flat tensor of each rank; the result is the same on all of them, bit for bit.

    Each rank gets what all have of its share, merges it and gives the result to the others: two
    collectives, which move about twice the tensor, however many ranks there are.

    Args:
        ranks: The ranks, more than one, all of which make this call.
        flat: Shape (n,), of the same n and dtype everywhere.
        merge: `(rows, where) -> merged`: rows has shape (ranks, size of the share), in the order of
            ranks; `where` is the place of the share in `flat`. Gives shape (size of the share,).
        stage: What errors call it.

    Returns:
        The merged tensor, shape (n,), on the device of `flat`.

    Raises:
        RankError: See `Ranks.meet`; or the exchange failed.
    """
    ranks.meet(stage)
    total, size = flat.numel(), ranks.size
    step = -(-total // size)
    padded = torch.zeros(step * size, dtype=flat.dtype, device=ranks.device)
    padded[:total] = flat
    rows = torch.empty_like(padded)
    given, taken = padded.view(torch.uint8), rows.view(torch.uint8)
    _wait(ranks, dist.all_to_all_single(taken, given, group=ranks.group, async_op=True), stage)
    where = slice(min(total, step * ranks.rank), min(total, step * (ranks.rank + 1)))
    share = padded.new_zeros(step)
    held = where.stop - where.start
    share[:held] = merge(rows.view(size, step)[:, :held], where)
    merged = torch.cat(_all_gather(ranks, share, stage)).view(flat.dtype)
    return merged[:total].to(flat.device)


def _all_gather(ranks: Ranks, value: Tensor, stage: str) -> list[Tensor]:
    """The bytes of a tensor of each rank, which has the same size everywhere."""
    own = value.view(torch.uint8)
    found = [torch.empty_like(own) for _ in range(ranks.size)]
    _wait(ranks, dist.all_gather(found, own, group=ranks.group, async_op=True), stage)
    return found


def _wait(ranks: Ranks, work: dist.Work | None, stage: str) -> None:
    assert work is not None
    try:
        done = work.wait(timedelta(seconds=ranks.timeout))
    except RuntimeError as error:
        raise RankError(f"{stage!r} broke off: {error}; a rank ended or hangs") from error
    if done is False:
        raise RankError(f"{stage!r} broke off after {ranks.timeout:g} s; a rank ended or hangs")
