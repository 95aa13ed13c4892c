"""One thread reads ahead, one computes, one writes; what they hold at once is bounded."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Generic, TypeVar

from calipers._process import release_team

__all__ = ["read_ahead", "writing_behind"]

Item = TypeVar("Item")
Read = TypeVar("Read")


def read_ahead(
    items: Iterable[Item],
    read: Callable[[Item], Read],
    size_of: Callable[[Item], int],
    most: int,
) -> Iterator[tuple[Item, Read]]:
    """Items with what is read for them, by a thread that reads the next ones meanwhile.

    At most `most` bytes are read ahead, or one item where it is larger.

    Args:
        items: In the order in which they are wanted.
        read: Called for one item after the other, in one thread.
        size_of: Bytes that are held for an item once it is read.
        most: Bytes.
    """
    with ThreadPoolExecutor(1, "calipers-read") as pool, ExitStack() as stack:
        stack.callback(pool.shutdown, wait=True, cancel_futures=True)

        def read_one(item: Item) -> Read:
            try:
                return read(item)
            finally:
                release_team()

        rest = deque(items)
        waiting: deque[tuple[Item, Future[Read]]] = deque()
        while rest or waiting:
            held = sum(size_of(item) for item, _ in waiting)
            while rest and (not waiting or held + size_of(rest[0]) <= most):
                held += size_of(rest[0])
                waiting.append((rest[0], pool.submit(read_one, rest.popleft())))
            item, future = waiting.popleft()
            found = future.result()
            del future
            if rest and not waiting:  # of items larger than `most` one is read ahead
                waiting.append((rest[0], pool.submit(read_one, rest.popleft())))
            yield item, found
            del found


class writing_behind(Generic[Item]):
    """A block whose results are written by another thread, one at a time.

    Args:
        write: Called with one result after the other.
    """

    def __init__(self, write: Callable[[Item], object]) -> None:
        self._write = write
        self._pool = ThreadPoolExecutor(1, "calipers-write")
        self._last: Future[object] | None = None

    def __enter__(self) -> Callable[[Item], None]:
        return self._put

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self._settle()
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _put(self, item: Item) -> None:
        self._settle()
        self._last = self._pool.submit(self._write, item)

    def _settle(self) -> None:
        last, self._last = self._last, None
        if last is not None:
            last.result()
