"""Ranks that share the files of one checkpoint, under torchrun."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from torch import distributed

from calipers.errors import CalipersError

__all__ = ["Ranks", "joined_ranks", "split_by_size"]

Item = TypeVar("Item")


@dataclass(frozen=True)
class Ranks:
    """The processes that work together, and which of them this one is.

    Attributes:
        rank: Number of this one, from 0.
        count: How many there are.
        timeout: Seconds that one waits for the others.
        group: Their process group; None of a process that is alone.
    """

    rank: int = 0
    count: int = 1
    timeout: float = 0.0
    group: Any = None

    def wait_for_all(self, what: str) -> None:
        """Wait until every rank has come here.

        Args:
            what: What they have done then, for the error.

        Raises:
            CalipersError: Some did not come in time; names them.
        """
        if self.count == 1:
            return
        try:
            distributed.monitored_barrier(
                self.group, timedelta(seconds=self.timeout), wait_all_ranks=True
            )
        except RuntimeError as error:
            raise CalipersError(
                f"rank {self.rank} of {self.count} waited {self.timeout:g} s for all ranks to be "
                f"done with {what}: {error}"
            ) from error


@contextmanager
def joined_ranks(timeout: float) -> Iterator[Ranks]:
    """The ranks that torchrun started, for a block; this process alone where it started none.

    The process group is that of the program where it has one, on gloo; else one is made, and taken
    down at the end.

    Args:
        timeout: Seconds that one rank waits for the others.

    Raises:
        CalipersError: Not all ranks came in time.
    """
    own = not distributed.is_available() or not distributed.is_initialized()
    if own and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks()
        return
    waiting = timedelta(seconds=timeout)
    if own:
        try:
            distributed.init_process_group("gloo", timeout=waiting)
        except (RuntimeError, ValueError) as error:
            rank, count = (os.environ.get(name, "?") for name in ("RANK", "WORLD_SIZE"))
            raise CalipersError(
                f"rank {rank} of {count} could not join the others within {timeout:g} s: {error}"
            ) from error
    try:
        group = None if own else distributed.new_group(backend="gloo", timeout=waiting)
        yield Ranks(distributed.get_rank(), distributed.get_world_size(), timeout, group)
    finally:
        if own:
            distributed.destroy_process_group()


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
