"""What a thread leaves behind in torch's OpenMP."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any

__all__ = ["release_team"]

_SOFT = 1  # omp_pause_soft: what was set stays


def release_team() -> None:
    """Let go the OpenMP threads that the calling thread has around it, until it needs them again.

    Every thread that calls torch gets a team of its own. While there are more such threads than
    cores, libgomp has those of the team at work sleep between two operations, which makes an
    operation on some 100,000 numbers six times as long.
    """
    pause = _pause()
    if pause is not None:
        pause(_SOFT)


@cache
def _pause() -> Any:
    """`omp_pause_resource_all` of OpenMP 5, where torch's is one that has it."""
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), "omp_pause_resource_all", None)
