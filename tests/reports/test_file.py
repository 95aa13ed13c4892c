"""`calipers-report.json`: written whole, read back, and refused where it is something else."""

import json
import math
from pathlib import Path

import pytest

from calipers.calibration.report import CalibrationReport, ModuleReport
from calipers.errors import CalipersError
from calipers.reports import FILE_NAME, read_report, write_report


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    report = CalibrationReport(modules=[ModuleReport("a.b", "mse", 4, 0.25)], batches=2)
    write_report(report, tmp_path, model=Path("somewhere"), measures={"perplexity": None})
    told = read_report(tmp_path)
    assert told == read_report(tmp_path / FILE_NAME)
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]
    assert told["format"] == 1
    assert told["model"] == "somewhere"
    assert told["batches"] == 2
    assert told["modules"][0]["weight_error"] == 0.25


def test_numbers_that_json_does_not_have_are_null(tmp_path: Path) -> None:
    report = CalibrationReport(modules=[ModuleReport("a", weight_error=math.nan)], seconds=math.inf)
    told = json.loads(write_report(report, tmp_path).read_text())
    assert told["modules"][0]["weight_error"] is None
    assert told["seconds"] is None


def test_what_is_no_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CalipersError, match="one without"):
        read_report(tmp_path)
    file = tmp_path / FILE_NAME
    with pytest.raises(CalipersError, match="No such file"):
        read_report(file)
    for text, why in (
        ("{", "expected a report"),
        ("[]", "other JSON"),
        ('{"format": 1}', "list of modules"),
        ('{"format": 2, "modules": []}', "format 1 or earlier, got 2"),
        ('{"modules": []}', "got None"),
    ):
        file.write_text(text)
        with pytest.raises(CalipersError, match=why):
            read_report(file)


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    write_report(CalibrationReport(batches=1), tmp_path)

    class Unprintable:
        def __str__(self) -> str:
            raise RuntimeError("no text")

    with pytest.raises(RuntimeError):
        write_report(CalibrationReport(batches=2), tmp_path, model=Unprintable())
    assert read_report(tmp_path)["batches"] == 1
    assert len(list(tmp_path.iterdir())) == 1
