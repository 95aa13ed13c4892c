"""Names of the two earlier generations of llmcompressor.observers that code may still import."""

from __future__ import annotations

from torch import Tensor

from calipers.observers.min_max import MinMaxObserver

__all__ = ["MinMaxTuple", "MovingAverageMinMaxObserver", "ScaleZpTuple"]

MinMaxTuple = tuple[Tensor, Tensor]
"""Minimum and maximum: what `get_min_max` returns."""

ScaleZpTuple = tuple[Tensor, Tensor]
"""Scale and zero point: what `forward` returns."""

MovingAverageMinMaxObserver = MinMaxObserver
"""The same class as `MinMaxObserver`, by the name that it had in the first generation."""
