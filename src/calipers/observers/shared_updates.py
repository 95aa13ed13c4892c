"""`SharedUpdates`: what observers learnt from one value, for others that stand where they stood.

The query, key and value projections of a layer read the same tensor, gate and up another.
Observers of the same kind and options that hold the very same statistics learn the very same from
it: one of them learns, and the others take its new statistics over, by reference, since statistics
are replaced by an update and never changed in place. Those that differ in anything learn for
themselves.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from calipers.observers.masks import TokenMask
from calipers.observers.statistics import HoldsStatistics

__all__ = ["SharedUpdates", "updates_of"]


class _Update(NamedTuple):
    kind: Hashable
    before: Mapping[str, Any]
    after: Mapping[str, Any]


class SharedUpdates:
    """Updates by one value, as long as that lives.

    Attributes:
        seen: What the hook that saw the value first made of it.
    """

    def __init__(self) -> None:
        self.seen: Any = None
        self._done: list[_Update] = []

    def update(self, kind: Hashable, part: HoldsStatistics, learn: Callable[[], object]) -> None:
        """Let `learn` update statistics, unless others like them have been updated by the value.

        Args:
            kind: What an update depends on besides the statistics: the class, arguments, options.
            part: What `learn` changes, and all that it changes.
            learn: Updates it by the value.

        Raises:
            ValueError: What `learn` raises; nothing is remembered then.
        """
        with part.alone():
            before = part.held()
            for each in self._done:
                if each.kind == kind and _same(each.before, before):
                    part.take_over(each.after)
                    return
            learn()
            after = part.held()
        # What is left out of a value is told of every module that reads it, once.
        if after["_num_nonfinite"] == before["_num_nonfinite"]:
            self._done.append(_Update(kind, before, after))

    def clear(self) -> None:
        """Forget them: the value has died, or is another one now."""
        self.seen = None
        self._done = []


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two hold the same objects, or equal numbers."""
    return one.keys() == other.keys() and all(
        value is other[name] or (isinstance(value, int) and value == other[name])
        for name, value in one.items()
    )


class _Last(threading.local):
    """The value that a thread saw last."""

    value: weakref.ref[Tensor] | None = None
    version = 0
    mask: TokenMask | None = None
    updates: SharedUpdates | None = None


_last = _Last()


def updates_of(value: Tensor, mask: TokenMask | None) -> SharedUpdates | None:
    """The updates by a value, if this thread saw it last, unchanged, under the same mask; else new.

    Returns:
        None for a tensor of inference mode, which does not tell whether it has changed.
    """
    if value.is_inference():
        return None
    last, version = _last, value._version
    known = last.value is not None and last.value() is value
    if known and last.version == version and last.mask is mask and last.updates is not None:
        return last.updates
    if last.updates is not None:
        last.updates.clear()
    updates = SharedUpdates()
    last.value = weakref.ref(value, lambda _: updates.clear())
    last.version, last.mask, last.updates = version, mask, updates
    return updates
