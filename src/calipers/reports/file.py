"""`write_report` and `read_report`: what a calibration did, as `calipers-report.json`."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import calipers
from calipers._files import replacing
from calipers._words import first_line
from calipers.calibration.report import CalibrationReport
from calipers.errors import CalipersError

__all__ = ["FILE_NAME", "FORMAT", "read_report", "tell_report", "write_report"]

#: Name of the file in the folder of a checkpoint.
FILE_NAME = "calipers-report.json"
#: Version of the format; a file of a later one is refused.
FORMAT = 1


def write_report(report: CalibrationReport, directory: str | os.PathLike[str], **head: Any) -> Path:
    """Write a report into a folder as `calipers-report.json`, in one step.

    Args:
        report: What a calibration did.
        directory: An existing folder, that of the checkpoint as a rule. A report that is there is
            replaced.
        **head: What stands beside `report.to_dict()`: "model" (path or class), "scheme",
            "observer", "options", "measures" of the whole model. Anything that JSON knows; paths
            and others are written as text, NaN and infinities as null.

    Returns:
        Path of the file.

    Raises:
        OSError: The folder is not there, or cannot be written to.

    Example:
        >>> import tempfile
        >>> from calipers.calibration import CalibrationReport
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = write_report(CalibrationReport(batches=3), folder, scheme="W4A16")
        ...     told = read_report(folder)
        >>> path.name, told["scheme"], told["batches"]
        ('calipers-report.json', 'W4A16', 3)
    """
    path = Path(directory) / FILE_NAME
    told = tell_report(report, **head)
    with replacing(path) as beside:
        beside.write_text(json.dumps(told, allow_nan=False) + "\n", encoding="utf-8")
    return path


def tell_report(report: CalibrationReport, **head: Any) -> dict[str, Any]:
    """What `write_report` writes, and `read_report` gives of that."""
    told = {
        "format": FORMAT,
        "calipers": calipers.__version__,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "model": None,
        "scheme": None,
        "observer": None,
        "options": {},
        "measures": None,
        **head,
        **report.to_dict(),
    }
    plain: dict[str, Any] = _plain(told)
    return plain


def read_report(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The report that a folder holds, or that a file is.

    Args:
        path: A folder with `calipers-report.json` in it, or the file itself, of any name.

    Returns:
        What `write_report` wrote, as plain dicts, lists, strings and numbers. Files of an earlier
        calipers may lack keys.

    Raises:
        CalipersError: There is no such file; it is no report, or of a later format.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        file /= FILE_NAME
        if not file.exists():
            raise CalipersError(
                f"{path}: expected a folder with {FILE_NAME} in it, which `calipers calibrate "
                "--out` leaves beside a checkpoint; got one without"
            )
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise CalipersError(f"{file}: expected a report, {first_line(error)}") from None
    if not isinstance(told, dict) or not isinstance(told.get("modules"), list):
        raise CalipersError(f"{file}: expected a report with a list of modules, got other JSON")
    found = told.get("format")
    if isinstance(found, bool) or not isinstance(found, int) or not 1 <= found <= FORMAT:
        raise CalipersError(
            f"{file}: expected a report of format {FORMAT} or earlier, got {found!r}; a later "
            "calipers wrote it"
        )
    return told


def common_observer(report: CalibrationReport) -> str | None:
    """The observer of all weights, or of all activations where none is; None where they differ."""
    for names in (
        {row.weight_observer for row in report.modules} - {None},
        {row.activation_observer for row in report.modules} - {None},
    ):
        if names:
            return names.pop() if len(names) == 1 else None
    return None


def _plain(value: Any) -> Any:
    """The same of what JSON knows: None for NaN and infinities, text for other types."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, bool, int)) else str(value)
