"""The one timing helper: two ways to the same result, alternating in one process."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

__all__ = ["Call", "Timing", "alternate"]

#: A sample lasts at least this long, so that the clock and the scheduler do not show.
SHORTEST_SAMPLE = 0.02
#: What a case may take beyond its fewest pairs of samples.
BUDGET = 20.0
FEWEST, MOST = 3, 30


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Call:
    """What is timed, and what goes before every call without being timed."""

    run: Callable[[], object]
    prepare: Callable[[], object] = _nothing

    def seconds(self, calls: int = 1) -> float:
        """Mean time of a call over `calls` calls."""
        total = 0.0
        for _ in range(calls):
            self.prepare()
            start = perf_counter()
            self.run()
            total += perf_counter() - start
        return total / calls


@dataclass(frozen=True)
class Timing:
    """Medians over pairs of samples; `speedups` are quartiles of theirs / ours, pair by pair."""

    ours_ms: float
    theirs_ms: float | None
    speedups: tuple[float, float, float] | None
    pairs: int
    calls_per_sample: tuple[int, int]

    @property
    def speedup(self) -> float | None:
        """Median of theirs / ours."""
        return None if self.speedups is None else self.speedups[1]


def alternate(ours: Call, theirs: Call | None, pairs: int | None = None) -> Timing:
    """Time two calls in turn: theirs, ours, theirs, ours ...

    Why not `torch.utils.benchmark.Timer`: each of its measurements warms up with two calls of its
    own, and a peer here takes seconds a call. Threads are set for the process, by the caller.

    Args:
        ours: Warmed up here by three calls (the first may compile).
        theirs: What to compare with, warmed up by one call; None times ours alone.
        pairs: Number of pairs of samples; None takes as many as fit into `BUDGET` seconds.
    """
    warm = min(ours.seconds() for _ in range(3))
    our_calls = max(1, round(SHORTEST_SAMPLE / warm))
    their_calls, cost = 0, warm * our_calls
    if theirs is not None:
        their_warm = theirs.seconds()
        their_calls = max(1, round(SHORTEST_SAMPLE / their_warm))
        cost += their_warm * their_calls
    if pairs is None:
        pairs = min(MOST, max(FEWEST, int(BUDGET / cost)))
    our_times, their_times = [], []
    for _ in range(pairs):
        if theirs is not None:
            their_times.append(theirs.seconds(their_calls))
        our_times.append(ours.seconds(our_calls))
    return Timing(
        ours_ms=statistics.median(our_times) * 1e3,
        theirs_ms=statistics.median(their_times) * 1e3 if their_times else None,
        speedups=_quartiles([t / o for t, o in zip(their_times, our_times, strict=False)]),
        pairs=pairs,
        calls_per_sample=(our_calls, their_calls),
    )


def _quartiles(values: list[float]) -> tuple[float, float, float] | None:
    if len(values) < 2:
        return (values[0],) * 3 if values else None
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high
