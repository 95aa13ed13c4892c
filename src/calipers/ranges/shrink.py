"""The candidates of a shrink grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ShrinkGrid", "last_step"]


@dataclass(frozen=True)
class ShrinkGrid:
    """The candidates of a shrink grid: step i is the range times `expand * (1 - i / grid)`.

    Args:
        maxshrink: Largest part of the range to give up, 0 to 1.
        grid: Number of steps that the whole range would have.
        patience: Steps in a row without a better group after which the search ends; 0: never.
        norm: Exponent of the absolute error.
        expand: Factor on the range before it shrinks, at least 1.
        include_end: Whether step `max(1, int(maxshrink * grid))` itself is a candidate.
    """

    maxshrink: float
    grid: float
    patience: int
    norm: float
    expand: float = 1.0
    include_end: bool = False

    @property
    def num_steps(self) -> int:
        """Number of candidates, at least one."""
        steps = int(self.maxshrink * self.grid)
        return max(1, steps) + 1 if self.include_end else max(1, steps)

    def shrink(self, step: int) -> float:
        """Factor on the expanded range at `step`."""
        return 1 - step / self.grid

    def factors(self, num_steps: int, device: torch.device | str = "cpu") -> Tensor:
        """Factors on the expanded range of the first steps, float32, shape (num_steps,)."""
        shrinks = [self.shrink(step) for step in range(num_steps)]
        return torch.tensor(shrinks, dtype=torch.float32, device=device)


def last_step(gains: Sequence[bool], patience: int) -> int:
    """The step at which the patience ends, of steps that made any group better or not."""
    without_gain = 0
    for step, gain in enumerate(gains):
        without_gain = 0 if gain else without_gain + 1
        if patience and without_gain >= patience:
            return step
    return len(gains) - 1
