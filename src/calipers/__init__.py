"""calipers: observers that measure tensors and pick quantization scales."""

from calipers import _guard as _guard  # first: importing compressed_tensors must not touch loguru

# isort: split
from calipers.calibrating import calibrate
from calipers.calibration import Calibration, CalibrationReport, attach
from calipers.checkpoint import loading_experts, save
from calipers.errors import (
    CalipersError,
    CheckpointError,
    MissingDataError,
    SchemeError,
    StatisticsError,
    UnknownObserverError,
)
from calipers.evaluation import perplexity
from calipers.observers import Observer
from calipers.observing import observe
from calipers.planning import SchemePlan, plan_schemes
from calipers.statistics_files import Statistics
from calipers.streaming import quantize_checkpoint

__version__ = "0.1.0"

__all__ = [
    "Calibration",
    "CalibrationReport",
    "CalipersError",
    "CheckpointError",
    "MissingDataError",
    "Observer",
    "SchemeError",
    "SchemePlan",
    "Statistics",
    "StatisticsError",
    "UnknownObserverError",
    "__version__",
    "attach",
    "calibrate",
    "loading_experts",
    "observe",
    "perplexity",
    "plan_schemes",
    "quantize_checkpoint",
    "save",
]
