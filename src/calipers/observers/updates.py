"""`whole_update`: a change of an observer's statistics that happens wholly or not at all."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import torch

__all__ = ["UpdateState", "whole_update", "without_autocast"]

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
    """Run a method of an observer under its lock, without gradients or autocast, all or nothing.

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
                with torch.no_grad():
                    if any(map(torch.is_autocast_enabled, _AUTOCAST_DEVICES)):
                        with without_autocast():
                            result = method(self, *args, **kwargs)
                    else:
                        result = method(self, *args, **kwargs)
            except BaseException:
                self.__dict__.update(before)
                raise
            finally:
                update.at_work = False
            self._after_update()
            return result

    return wrapped


@contextmanager
def without_autocast() -> Iterator[None]:
    """Switch autocast off for every device for which it is on: sums stay in their own dtype."""
    with ExitStack() as stack:
        for device in filter(torch.is_autocast_enabled, _AUTOCAST_DEVICES):
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


_AUTOCAST_DEVICES = ("cpu", "cuda", "xpu", "mps")
