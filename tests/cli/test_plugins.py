"""`--plugin`: observers of one's own on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli.conftest import Calipers, error_of, succeeded
from observers.test_plugins import SOURCE


def test_an_observer_of_ones_own_calibrates_and_is_listed(
    calipers: Calipers, llama: Path, tmp_path: Path
) -> None:
    file = tmp_path / "own.py"
    file.write_text(SOURCE.format(name="own_of_cli"), encoding="utf-8")
    assert "unknown observer 'own_of_cli'" in error_of(
        calipers("calibrate", llama, "--observer", "own_of_cli")
    )
    options = ("--plugin", file, "--observer", "own_of_cli", "--json")
    result = succeeded(calipers("calibrate", llama, *options))
    rows = result["calibration"]["modules"]
    assert {row["weight_observer"] for row in rows} == {"own_of_cli"}
    listed = succeeded(calipers("observers", "--plugin", file, "--json"))
    assert "own_of_cli" in {each["name"] for each in listed}


@pytest.mark.parametrize("command", ["calibrate", "observers"])
def test_a_plugin_that_cannot_be_imported(calipers: Calipers, command: str) -> None:
    message = error_of(calipers(command, "--plugin", "json", "--plugin", "none.py"))
    assert message == "error: plugin none.py: no such file"
