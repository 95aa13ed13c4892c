"""`calipers report`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cli.conftest import Calipers, error_of, succeeded
from reports import fabricated

pytest.importorskip("matplotlib")


def folder(path: Path, told: dict[str, Any]) -> Path:
    path.mkdir(parents=True)
    (path / "calipers-report.json").write_text(json.dumps(told), encoding="utf-8")
    return path


@pytest.fixture
def first(tmp_path: Path) -> Path:
    return folder(tmp_path / "W4A16", fabricated.report(layers=2))


@pytest.fixture
def second(tmp_path: Path) -> Path:
    return folder(tmp_path / "NVFP4", fabricated.report(layers=2, scheme="NVFP4", level=0.3))


def test_a_page_of_one_report(calipers: Calipers, first: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    told = succeeded(calipers("report", first, "--out", out, "--json"))
    assert told["bytes"] == out.stat().st_size
    assert told["compared"] is None
    (only,) = told["reports"]
    assert (only["name"], only["modules"], only["missing"]) == ("W4A16", 14, [])
    assert only["verdict"].startswith("+20.0% perplexity: usual for int4")
    assert out.read_text("utf-8").startswith("<!doctype html>")


def test_two_reports(calipers: Calipers, first: Path, second: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    args = ("report", first / "calipers-report.json", "--compare", second, "--out", out)
    told = succeeded(calipers(*args, "--json"))
    assert told["compared"]["best"] == {"calipers-report": 14, "NVFP4": 0}
    assert [each["best"] for each in told["compared"]["kinds"]] == ["calipers-report"] * 7
    assert "14 modules in common" in out.read_text("utf-8")
    printed = calipers(*args, "--force").stdout
    assert "better   by output error, modules: calipers-report 14, NVFP4 0" in printed


def test_folders_of_one_name(calipers: Calipers, first: Path, tmp_path: Path) -> None:
    other = folder(tmp_path / "other" / "W4A16", fabricated.of_an_earlier_calipers())
    out = tmp_path / "page.html"
    told = succeeded(calipers("report", first, "--compare", other, "--out", out, "--json"))
    assert [each["name"] for each in told["reports"]] == [str(first), str(other)]
    assert len(told["reports"][1]["missing"]) == 3
    same = error_of(calipers("report", first, "--compare", first, "--out", tmp_path / "b.html"))
    assert same == f"error: --compare: expected other folders than DIR, got {first} twice"


def test_a_folder_without_a_report_says_who_writes_it(calipers: Calipers, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    (tmp_path / "empty").mkdir()
    message = error_of(calipers("report", tmp_path / "empty", "--out", out))
    assert "expected a folder with calipers-report.json in it" in message
    assert "calipers calibrate" in message
    assert not out.exists()


def test_a_page_is_not_replaced_by_itself(calipers: Calipers, first: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    out.write_text("mine", encoding="utf-8")
    assert "replace it with --force" in error_of(calipers("report", first, "--out", out))
    assert out.read_text("utf-8") == "mine"
