"""A model's life with observers: attach, run batches, freeze, detach; or `calibrate` for all."""

from __future__ import annotations

from calipers.calibration.calibrate import attach, calibrate
from calipers.calibration.checks import check_scheme
from calipers.calibration.config import resolve_config
from calipers.calibration.report import (
    ActivationMeasures,
    CalibrationReport,
    ExpertCoverage,
    LeftAlone,
    ModuleReport,
    ShadowReport,
    Stability,
    WeightMeasures,
)
from calipers.calibration.session import Calibration

__all__ = [
    "ActivationMeasures",
    "Calibration",
    "CalibrationReport",
    "ExpertCoverage",
    "LeftAlone",
    "ModuleReport",
    "ShadowReport",
    "Stability",
    "WeightMeasures",
    "attach",
    "calibrate",
    "check_scheme",
    "resolve_config",
]
