"""`joined_ranks`: the processes that torchrun started; `split_by_size`: work shared over them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from calipers.distributed.meeting import Ranks
from calipers.errors import RankError

__all__ = ["joined_ranks", "split_by_size"]

Item = TypeVar("Item")


@contextmanager
def joined_ranks(timeout: float) -> Iterator[Ranks]:
    """The ranks that torchrun started this process as, until the end of the block.

    A GPU each where there are enough, by NCCL; else the CPU, by gloo. Where torch.distributed is
    initialised already its ranks are taken, and without torchrun this process alone.

    Args:
        timeout: See `Ranks`.

    Raises:
        RankError: Not all ranks came in time.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or dist.is_initialized():
        yield Ranks(timeout=timeout)
        return
    local = int(os.environ["LOCAL_RANK"])
    own_gpu = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    if own_gpu:
        torch.cuda.set_device(local)
    try:
        dist.init_process_group("nccl" if own_gpu else "gloo", timeout=timedelta(seconds=timeout))
    except (RuntimeError, ValueError) as error:
        rank, count = os.environ["RANK"], os.environ["WORLD_SIZE"]
        raise RankError(
            f"rank {rank} of {count} could not join the others within {timeout:g} s: {error}"
        ) from error
    try:
        yield Ranks(timeout=timeout)
    finally:
        dist.destroy_process_group()


def split_by_size(
    items: Sequence[Item], size_of: Callable[[Item], int], ranks: int
) -> list[list[Item]]:
    """Share items over ranks, so that all have about as much; in the order given within each.

    Args:
        items: The same on all ranks.
        size_of: How much work an item is.
        ranks: How many there are.

    Returns:
        One list a rank; the same on all of them.

    Example:
        >>> split_by_size([5, 1, 4, 2], lambda item: item, 2)
        [[5, 1], [4, 2]]
    """
    loads = [0] * ranks
    owners: dict[int, int] = {}
    for place in sorted(range(len(items)), key=lambda place: -size_of(items[place])):
        owner = loads.index(min(loads))
        owners[place] = owner
        loads[owner] += size_of(items[place])
    return [
        [item for place, item in enumerate(items) if owners[place] == rank] for rank in range(ranks)
    ]
