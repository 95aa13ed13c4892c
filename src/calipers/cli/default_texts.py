"""The texts that commands use where no file is given: the one place to change them in."""

from __future__ import annotations

from pathlib import Path

from calipers.demo import CALIBRATION_TEXT, HELDOUT_TEXT

__all__ = ["calibration_text", "heldout_text"]


def calibration_text() -> Path:
    """Text to calibrate with."""
    return CALIBRATION_TEXT


def heldout_text() -> Path:
    """Text to judge by, of other sources than `calibration_text`."""
    return HELDOUT_TEXT
