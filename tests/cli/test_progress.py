"""Progress where standard error is no terminal: lines, and few of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from calipers.cli.console import show_progress
from cli.conftest import Calipers, succeeded


class Clock:
    """Goes on by so many seconds with each look at it."""

    def __init__(self, seconds: float) -> None:
        self.now, self.seconds = 1000.0, seconds

    def __call__(self) -> float:
        self.now += self.seconds
        return self.now


@pytest.fixture
def every_look_takes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[float], None]]:
    def set_clock(seconds: float) -> None:
        monkeypatch.setattr("calipers.cli.console.monotonic", Clock(seconds))

    return set_clock


def test_a_line_every_half_minute(
    every_look_takes: Callable[[float], None], capsys: pytest.CaptureFixture[str]
) -> None:
    every_look_takes(12.5)
    with show_progress() as progress:
        for done in range(8):
            progress("batches", done, 8)
        progress("weights [x]", 1, None)
    captured = capsys.readouterr()
    assert captured.out == ""
    # looks at 12.5, 25, 37.5, ... after the start; half a minute has passed at every third one
    assert captured.err.splitlines() == [
        "batches: 2 of 8 after 0:00:37",
        "batches: 5 of 8 after 0:01:15",
        "weights [x]: 1 after 0:01:52",
    ]


def test_nothing_is_said_of_quick_work(
    every_look_takes: Callable[[float], None], capsys: pytest.CaptureFixture[str]
) -> None:
    every_look_takes(0.1)
    with show_progress() as progress:
        for done in range(100):
            progress("batches", done, 100)
    assert capsys.readouterr().err == ""


def test_batches_scales_and_evaluation_are_told(
    calipers: Calipers, llama: Path, texts: Path, every_look_takes: Callable[[float], None]
) -> None:
    every_look_takes(31)
    text = texts / "text.txt"
    result = calipers("calibrate", llama, "--data", text, "--eval", text, "--json")
    succeeded(result)
    stages = re.findall(r"^(.+): \d+ of \d+ after \d+:\d\d:\d\d$", result.stderr, re.MULTILINE)
    # in order, each named once however many lines it has
    assert list(dict.fromkeys(stages)) == ["perplexity", "batches", "weights"]
    assert stages[-1] == "perplexity"
