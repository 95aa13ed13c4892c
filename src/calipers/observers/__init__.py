"""Observers: nn.Modules that watch values and answer with a scale and a zero point."""

from calipers.observers.base import Observation, Observer
from calipers.observers.headroom import HeadroomObserver
from calipers.observers.helpers import flatten_for_calibration, get_observer_token_count
from calipers.observers.histogram import HistogramObserver
from calipers.observers.imatrix import IMatrixMSEObserver, NVFP4ExpandedIMatrixObserver
from calipers.observers.min_max import (
    MemorylessMinMaxObserver,
    MinMaxObserver,
    MinMaxTuple,
    MovingAverageMinMaxObserver,
    ScaleZpTuple,
    StaticMinMaxObserver,
)
from calipers.observers.moving_base import MovingAverageObserverBase
from calipers.observers.mse import (
    MemorylessMSEObserver,
    MovingAverageMSEObserver,
    NVFP4ExpandedMSEObserver,
)
from calipers.observers.optimal import OptimalObserver
from calipers.observers.options import ObserverOptions
from calipers.observers.statistics import Statistic

__all__ = [
    "HeadroomObserver",
    "HistogramObserver",
    "IMatrixMSEObserver",
    "MemorylessMSEObserver",
    "MemorylessMinMaxObserver",
    "MinMaxObserver",
    "MinMaxTuple",
    "MovingAverageMSEObserver",
    "MovingAverageMinMaxObserver",
    "MovingAverageObserverBase",
    "NVFP4ExpandedIMatrixObserver",
    "NVFP4ExpandedMSEObserver",
    "Observation",
    "Observer",
    "ObserverOptions",
    "OptimalObserver",
    "ScaleZpTuple",
    "StaticMinMaxObserver",
    "Statistic",
    "flatten_for_calibration",
    "get_observer_token_count",
]
