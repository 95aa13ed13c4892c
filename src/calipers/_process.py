"""What this process holds and does not need: threads of torch's OpenMP, memory of glibc's heap."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any

__all__ = ["give_back_memory", "release_team"]

_SOFT = 1  # omp_pause_soft: what was set stays


def release_team() -> None:
    """Let go the OpenMP threads that the calling thread has around it, until it needs them again.

    Every thread that calls torch gets a team of its own. While there are more such threads than
    cores, libgomp has those of the team at work sleep between two operations, which makes an
    operation on some 100,000 numbers six times as long.
    """
    pause = _c_function("omp_pause_resource_all")
    if pause is not None:
        pause(_SOFT)


def give_back_memory() -> None:
    """Let the system have what glibc keeps of freed tensors: its heap only grows by itself."""
    trim = _c_function("malloc_trim")
    if trim is not None:
        trim(0)


@cache
def _c_function(name: str) -> Any:
    """A function of the libraries that are loaded, on Linux; None where there is none."""
    if sys.platform != "linux":
        return None
    return getattr(ctypes.CDLL(None), name, None)
