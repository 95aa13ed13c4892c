"""A model's life with observers: attach, run batches, freeze, detach; or `calibrate` for all."""

from __future__ import annotations

from calipers.calibration.calibrate import attach, calibrate
from calipers.calibration.checks import check_scheme
from calipers.calibration.config import resolve_config
from calipers.calibration.report import (
    CalibrationReport,
    ExpertCoverage,
    LeftAlone,
    ModuleReport,
    ShadowReport,
)
from calipers.calibration.session import Calibration

__all__ = [
    "Calibration",
    "CalibrationReport",
    "ExpertCoverage",
    "LeftAlone",
    "ModuleReport",
    "ShadowReport",
    "attach",
    "calibrate",
    "check_scheme",
    "resolve_config",
]
