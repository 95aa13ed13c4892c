"""`whole_update`: a change of an observer's statistics that happens wholly or not at all."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from calipers.ranges.surroundings import undisturbed

__all__ = ["UpdateState", "whole_update"]

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


class UpdateState:
    """The lock of one observer, and whether one of its methods is at work.

    A copy, also one that went through pickle, has a lock of its own and is at work on nothing.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.at_work = False

    def __deepcopy__(self, memo: dict[int, Any]) -> UpdateState:
        return UpdateState()

    def __copy__(self) -> UpdateState:
        return UpdateState()

    def __reduce__(self) -> tuple[type[UpdateState], tuple[()]]:
        return UpdateState, ()


class _Updated(Protocol):
    _update: UpdateState

    def _held(self) -> dict[str, Any]: ...

    def _after_update(self) -> None: ...


Owner = TypeVar("Owner", bound=_Updated)


def whole_update(
    method: Callable[Concatenate[Owner, Parameters], Result],
) -> Callable[Concatenate[Owner, Parameters], Result]:
    """Run a method of an observer under its lock, undisturbed, all or nothing.

    What the observer holds is kept by reference and put back where the method raises: statistics
    are replaced by an update, never changed in place. Calls inside of such a method belong to it.
    """

    @functools.wraps(method)
    def wrapped(self: Owner, /, *args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        update = self._update
        with update.lock:
            if update.at_work:
                return method(self, *args, **kwargs)
            before = self._held()
            update.at_work = True
            try:
                with undisturbed():
                    result = method(self, *args, **kwargs)
            except BaseException:
                self.__dict__.update(before)
                raise
            finally:
                update.at_work = False
            self._after_update()
            return result

    return wrapped
