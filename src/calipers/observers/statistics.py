"""Statistics: what an observer remembers, each declared with how two of them become one.

`Observer.reset`, `state`, `load_state` and `merge` follow from these declarations alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["COUNT", "LAST", "MAX", "MIN", "SUM", "TOKENS", "Statistic", "moving_mean"]


@dataclass(frozen=True)
class Statistic:
    """How a statistic grows by a new observation and how those of two observers merge.

    Args:
        grow: `(past, current, constant) -> past` for a new observation; `constant` is the
            observer's averaging constant, which only moving averages read.
        merge: `(a, b, batches_a, batches_b) -> merged` for the statistics of two observers.
        count: Name of the statistic that holds the number of batches behind this one.
        float32: Kept in float32 at least, whatever the dtype of the values.
        exact: Whether merging two halves gives exactly what one observer of all data has.
        integer: Kept as a Python int rather than as a tensor.
        initial: What it is before any observation.
    """

    grow: Callable[[Tensor, Tensor, float], Tensor]
    merge: Callable[[Tensor, Tensor, int, int], Tensor]
    count: str = "num_batches"
    float32: bool = False
    exact: bool = True
    integer: bool = False
    initial: int | None = None


def moving_mean(count: str) -> Statistic:
    """A moving average; `count` names the statistic that holds its number of batches.

    The order of batches matters to it, so a merge is approximate: both sides are weighed by how
    many batches they saw. It is kept in float32 at least: in bfloat16 an average with constant 0.01
    stalls, since its steps fall under half a unit in the last place.
    """
    return Statistic(
        # torch.lerp lacks some dtypes, and constant 1 must give exactly the current value.
        grow=lambda past, x, c: _where_both(past * (1 - c) + x * c, past, x),
        merge=lambda a, b, m, n: _where_both(_weighted(a, b, m, n), a, b),
        count=count,
        float32=True,
        exact=False,
    )


def _weighted(a: Tensor, b: Tensor, m: int, n: int) -> Tensor:
    """(a m + b n) / (m + n), whose sum may overflow where neither side does."""
    return (a.double() * (m / (m + n)) + b.double() * (n / (m + n))).to(a.dtype)


def _where_both(average: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The average where both sides saw a finite value, else the side that did.

    A group of nothing but NaN has the range Inf to -Inf, which says nothing about it.
    """
    return torch.where(a.isinf(), b, torch.where(b.isinf(), a, average))


#: The latest observation alone. In a merge the other side is the later one.
LAST = Statistic(lambda past, current, _: current, lambda a, b, m, n: b)
#: Smallest values seen.
MIN = Statistic(lambda past, x, _: torch.minimum(past, x), lambda a, b, m, n: torch.minimum(a, b))
#: Largest values seen.
MAX = Statistic(lambda past, x, _: torch.maximum(past, x), lambda a, b, m, n: torch.maximum(a, b))
#: A sum over all observations.
SUM = Statistic(lambda past, current, _: past + current, lambda a, b, m, n: a + b)
#: A number of things seen.
COUNT = Statistic(SUM.grow, SUM.merge, integer=True, initial=0)
#: The same, None as long as none were counted.
TOKENS = Statistic(SUM.grow, SUM.merge, integer=True)
