"""`Ranks`: the processes that calibrate one model together, and how they wait for each other.

They meet through the store of torch.distributed before every exchange. There a rank can leave word
of its failure without waiting, and those that wait can tell which rank has not come.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from compressed_tensors.distributed import is_distributed

from calipers._words import first_line
from calipers.errors import CalipersError, RankError

__all__ = ["TIMEOUT", "Ranks", "share_of_rank"]

#: Seconds to wait for a rank that shows no sign of life.
TIMEOUT = 600.0
#: Shortest and longest pause between two looks at the store, in seconds.
_SHORT, _LONG = 0.001, 0.1
#: Seconds that a rank which failed stays for the others to hear of it: a launcher stops them all
#: once the first has gone, and the store may go with it.
_STAY = 5.0
#: And, once they have heard, for them to say so and to end.
_LEAVE = 2.0

Item = TypeVar("Item")


class _Count:
    """Meetings of one process group so far: the same on all ranks, whoever asked for them."""

    def __init__(self) -> None:
        self.meetings = 0
        self.signs = 0


_counts: defaultdict[str, _Count] = defaultdict(_Count)


class Ranks:
    """The ranks of a process group; one alone where torch.distributed is not initialised.

    Args:
        group: The processes that run different data through the same model; None for all of them.
            Ranks that share a batch (of tensor parallel layers) belong into different groups.
        timeout: Seconds to wait for a rank that shows no sign of life, and for a collective. A rank
            that calibrates shows one with each batch.

    Raises:
        CalipersError: A timeout that is no positive number, or a group that lacks this rank.

    Attributes:
        rank: Place of this process in the group, from 0.
        size: Number of processes of the group.
        timeout: As above.

    Example:
        >>> ranks = Ranks()
        >>> ranks.rank, ranks.size
        (0, 1)
        >>> ranks.meet("the end")  # one alone waits for nobody
    """

    def __init__(self, group: dist.ProcessGroup | None = None, timeout: float = TIMEOUT) -> None:
        if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not timeout > 0:
            raise CalipersError(f"timeout: expected a positive number of seconds, got {timeout!r}")
        self.group = group
        self.timeout = float(timeout)
        self.rank, self.size = 0, 1
        if is_distributed():
            self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
            if self.rank < 0:
                raise CalipersError(f"group: rank {dist.get_rank()} is no member of it")
        self._told: BaseException | None = None

    @property
    def device(self) -> torch.device:
        """Where tensors lie that the group's backend exchanges."""
        backend = str(dist.get_backend(self.group))
        if "gloo" in backend or backend in ("mpi", "ucc", "undefined"):
            return torch.device("cpu")
        kind = torch.accelerator.current_accelerator()
        return torch.device("cpu" if kind is None else kind)

    def name_of(self, ranks: Iterable[int]) -> str:
        """`rank 1` or `ranks 1, 3`: as torch.distributed counts them, not this group."""
        everywhere = [
            each if self.group is None else dist.get_global_rank(self.group, each) for each in ranks
        ]
        return f"rank{'s' * (len(everywhere) > 1)} {', '.join(map(str, everywhere))}"

    def meet(self, stage: str) -> None:
        """Wait until all ranks have come to a stage.

        Args:
            stage: What errors call it.

        Raises:
            RankError: A rank failed, is at another stage, or showed no sign of life for `timeout`
                seconds. Names it.
        """
        if self.size == 1:
            return
        self._post(stage)
        prefix = self._next_meeting()
        missing = self._wait(prefix)
        if missing:
            told = f"waited {self.timeout:g} s for {self.name_of(missing)}"
            # Whoever comes late must not wait in a collective for those that have left.
            self._set(f"{prefix}/{self.rank}", {"stage": stage, "error": told})
            self._store.set(f"{prefix}/failed", str(self.rank))
            raise RankError(
                f"{self.name_of(missing)} did not come to {stage!r}, and gave no sign of life for "
                f"{self.timeout:g} s: look at its own output; if it only is slow, raise the timeout"
            )
        others = {rank: self._found(prefix, rank)["stage"] for rank in range(self.size)}
        if set(others.values()) != {stage}:
            told = ", ".join(f"{self.name_of([rank])} at {what!r}" for rank, what in others.items())
            raise RankError(f"ranks met at different stages: {told}; all must make the same calls")

    def show_life(self) -> None:
        """Tell ranks that wait for this one that it is at work.

        Raises:
            RankError: Another rank has failed meanwhile.
        """
        if self.size == 1:
            return
        count = self._count
        count.signs += 1
        self._store.set(f"{self._base}/life/{self.rank}", str(count.signs))
        prefix = f"{self._base}/{count.meetings}"
        if self._store.check([f"{prefix}/failed"]):
            count.meetings += 1
            self._raise_failure(prefix)

    @contextmanager
    def telling_failure(self, stage: str) -> Iterator[None]:
        """Tell the other ranks of an exception inside of the block, which goes on.

        They raise a `RankError` at the next meeting, or sign of life. The exception goes on when
        they have, or after some seconds.
        """
        try:
            yield
        except BaseException as error:
            if self.size > 1 and not isinstance(error, RankError) and error is not self._told:
                self._told = error
                self._post(stage, f"{type(error).__name__}: {first_line(error)}")
                prefix = self._next_meeting()
                self._store.set(f"{prefix}/failed", str(self.rank))
                if isinstance(error, Exception):
                    self._stay_until_heard(prefix)
            raise

    # -- the store -----------------------------------------------------------------------------

    @property
    def _store(self) -> Any:
        # no public name; whatever initialises torch.distributed has one
        return dist.distributed_c10d._get_default_store()

    @property
    def _base(self) -> str:
        group = cast(Any, dist.group.WORLD if self.group is None else self.group)
        return f"calipers/{group.group_name}"

    @property
    def _count(self) -> _Count:
        return _counts[self._base]

    def _next_meeting(self) -> str:
        """Keys of the meeting that this rank has posted at; it goes on to the next one."""
        count = self._count
        count.meetings += 1
        return f"{self._base}/{count.meetings - 1}"

    def _post(self, stage: str, error: str | None = None) -> None:
        key = f"{self._base}/{self._count.meetings}/{self.rank}"
        self._set(key, {"stage": stage, "error": error})

    def _set(self, key: str, value: dict[str, str | None]) -> None:
        self._store.set(key, json.dumps(value))

    def _found(self, prefix: str, rank: int) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self._store.get(f"{prefix}/{rank}"))
        return found

    def _wait(self, prefix: str) -> list[int]:
        """Wait for all ranks; those that did not come."""
        store, pause = self._store, _SHORT
        keys = [f"{prefix}/{rank}" for rank in range(self.size)]
        deadline, signs = time.monotonic() + self.timeout, ""
        while True:
            if store.check([f"{prefix}/failed"]):
                self._raise_failure(prefix)
            if store.check(keys):
                return []
            if time.monotonic() >= deadline:
                missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
                latest = self._signs_of(missing)
                if latest == signs:
                    return missing
                deadline, signs = time.monotonic() + self.timeout, latest
            time.sleep(pause)
            pause = min(2 * pause, _LONG)

    def _signs_of(self, ranks: Iterable[int]) -> str:
        """What the signs of life of some ranks are now."""
        keys = [f"{self._base}/life/{rank}" for rank in ranks]
        return ", ".join(
            f"{key} {self._store.get(key).decode()}" for key in keys if self._store.check([key])
        )

    def _stay_until_heard(self, prefix: str) -> None:
        self._store.set(f"{prefix}/heard/{self.rank}", "")  # others that failed too need not wait
        keys = [f"{prefix}/heard/{rank}" for rank in range(self.size)]
        deadline = time.monotonic() + _STAY
        while not self._store.check(keys) and time.monotonic() < deadline:
            time.sleep(_LONG)
        time.sleep(_LEAVE)

    def _raise_failure(self, prefix: str) -> None:
        self._store.set(f"{prefix}/heard/{self.rank}", "")
        rank = int(self._store.get(f"{prefix}/failed"))
        found = self._found(prefix, rank)
        raise RankError(f"{self.name_of([rank])} failed at {found['stage']!r}: {found['error']}")


def share_of_rank(batches: Iterable[Item], ranks: Ranks | None = None) -> Sequence[Item]:
    """This rank's share of batches that all ranks hold: every so many-th, from its own on.

    Args:
        batches: The same on all ranks, in the same order.
        ranks: The ranks; None takes all of torch.distributed.

    Returns:
        A list; empty on ranks for which there is none.

    Example:
        >>> share_of_rank(["a", "b", "c"])
        ['a', 'b', 'c']
    """
    ranks = ranks or Ranks()
    return list(islice(batches, ranks.rank, None, ranks.size))
