"""What every command prints, at 60 and at 120 columns and in a pipe, with fixed figures.

The texts lie in `snapshots/`; `CALIPERS_WRITE_SNAPSHOTS=1 pytest tests/cli/test_layouts.py` writes
them anew. `test_compare.py` and `test_evaluate.py` have those of their commands beside them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from calipers.calibration import CalibrationReport, ModuleReport, ShadowReport
from calipers.calibration.targets import LeftAlone
from calipers.cli import calibrate, demo, doctor, listings
from calipers.cli.runs import Run, RunResult
from calipers.cli.texts import Text, TokenizedText
from calipers.evaluation import Difference, OutputError, Perplexity
from cli.terminal import show

SNAPSHOTS = Path(__file__).parent / "snapshots"
DATA = TokenizedText("embedded calibration text", [torch.zeros(128, 500)])
JUDGED = TokenizedText("embedded held-out text", [torch.zeros(77, 460)])

Print = Callable[[], None]


def report() -> CalibrationReport:
    def module(layer: int, name: str, error: float) -> ModuleReport:
        full = f"model.layers.{layer}.{name}"
        return ModuleReport(full, "optimal", 4, error, None, 63514, (), "imatrix")

    rows = [
        module(layer, name, error + layer / 1000)
        for layer in range(3)
        for name, error in (("self_attn.q_proj", 0.11), ("mlp.down_proj", 0.1))
    ]
    left = [LeftAlone("lm_head", "Linear", "output head", 28_311_552)]
    return CalibrationReport(rows, [], left, 0.9834, 45.1, 128)


def with_shadows() -> CalibrationReport:
    observers = ("optimal", "memoryless_minmax", "optimal:objective=hessian")
    rows = [ShadowReport(o, 0.012 + i / 1000, i == 0, "held-out") for i, o in enumerate(observers)]
    inputs = [ShadowReport(o, 0.0007, o == "histogram", "held-out") for o in ("mse", "histogram")]
    given = report()
    modules = [replace(m, shadows={"weight": rows, "input": inputs}) for m in given.modules]
    return replace(given, modules=modules, held_out=16)


def calibrated(
    change: Difference | OutputError | None, given: CalibrationReport | None = None
) -> Print:
    result: dict[str, Any] = {
        "model": "./SmolLM2-135M",
        "scheme": "W4A16",
        "group_size": 64,
        "kv_cache": None,
        "memory": "whole",
        "out": None if change is None else "./SmolLM2-135M-W4A16",
        "no_text": "its tokenizer does not load: no files" if change is None else None,
        "perplexity_before": 18.72,
        "perplexity_after": 22.514,
        "verdict": "+20.3% perplexity: some words on it, and what to try next.",
        "bytes_before": 269_000_000,
        "bytes_after": 113_000_000,
        "seconds": 106.6,
        "peak_memory_bytes": 1_500_000_000,
    }
    note = "64, since 128 does not divide the columns of 180 of 210 modules"
    text = (None, None) if change is None else (DATA, JUDGED)
    return lambda: calibrate.print_result(result, given or report(), 5, note, *text, change)


def shown_demo(monkeypatch: pytest.MonkeyPatch) -> Print:
    losses = (1300.0, 1400.0)

    def run(model: Any, runs: list[Run], *args: Any, **kwargs: Any) -> list[RunResult]:
        after = Perplexity((1340.0, 1430.0), (511, 511))
        change = Difference(0.0685, 0.0049)
        return [RunResult(each, 0.1015, after, change, 1_640_000, 4.2, None) for each in runs]

    monkeypatch.setattr(demo, "execute", run)
    monkeypatch.setattr(demo, "measure", lambda *args: Perplexity(losses, (511, 511)))
    verdicts = dict.fromkeys(("W4A16", "NVFP4", "FP8"), "optimal: some words on it.")
    monkeypatch.setattr(demo, "judge_schemes", lambda results: verdicts)
    monkeypatch.setattr(Text, "read", lambda self, *args, **kwargs: JUDGED)
    return demo.demo


def shown_doctor(monkeypatch: pytest.MonkeyPatch) -> Print:
    engines = [("eager", True, "always there"), ("triton", False, "no CUDA device is available")]
    for name, value in {
        "explain_engines": lambda trial: engines,
        "choose_engine": lambda *args, **kwargs: "eager",
        "where": lambda: ("~/.cache/calipers", None),
        "version": lambda name: "1.2.3",
    }.items():
        monkeypatch.setattr(doctor, name, value)
    monkeypatch.setattr(doctor.platform, "python_version", lambda: "3.11.7")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv("CALIPERS_ENGINE", raising=False)
    return doctor.doctor


def shown_schemes(monkeypatch: pytest.MonkeyPatch) -> Print:
    # Versions of compressed-tensors have different ones.
    names = ("UNQUANTIZED", "W4A16", "W4A16_ASYM", "FP8", "FP8_DYNAMIC", "NVFP4")
    monkeypatch.setattr(listings, "PRESET_SCHEMES", names)
    return listings.schemes


def shown_observers(monkeypatch: pytest.MonkeyPatch) -> Print:
    # Other tests register observers of their own.
    names = ("histogram", "memoryless-minmax", "memoryless-mse", "optimal")
    monkeypatch.setattr(listings.Observer, "registered_names", lambda: names)
    return listings.observers


COMMANDS: dict[str, Callable[[pytest.MonkeyPatch], Print]] = {
    "calibrate": lambda _: calibrated(Difference(0.1846, 0.0084)),
    "calibrate-outputs": lambda _: calibrated(OutputError(0.405, 0.0143, 77, 34790)),
    "calibrate-no-text": lambda _: calibrated(None),
    "calibrate-shadows": lambda _: calibrated(Difference(0.1846, 0.0084), with_shadows()),
    "demo": shown_demo,
    "doctor": shown_doctor,
    "observers": shown_observers,
    "schemes": shown_schemes,
}


@pytest.mark.parametrize("width", [60, 120, None])
@pytest.mark.parametrize("command", COMMANDS)
def test_layout(monkeypatch: pytest.MonkeyPatch, command: str, width: int | None) -> None:
    text = show(monkeypatch, width, COMMANDS[command](monkeypatch)) + "\n"
    if width is not None:
        assert max(map(len, text.splitlines())) <= width
    snapshot = SNAPSHOTS / f"{command}-{width or 'pipe'}.txt"
    if os.environ.get("CALIPERS_WRITE_SNAPSHOTS"):
        snapshot.write_text(text, encoding="utf-8")
    assert text == snapshot.read_text(encoding="utf-8")
