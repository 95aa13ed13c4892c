"""The timing benchmarks run, and their files say what was measured where."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

Json = dict[str, Any]
Run = Callable[..., Json]


@pytest.fixture
def script() -> ModuleType:
    return importlib.import_module("benchmarks.range_search")


@pytest.fixture
def run(script: ModuleType, tmp_path: Path) -> Run:
    """Runs the script in this process, at size 64, and returns what its file holds."""

    def run(*arguments: str) -> Json:
        out, threads = tmp_path / "out.json", str(torch.get_num_threads())
        common = ["--size", "64", "--repeats", "2", "--threads", threads, "--json", str(out)]
        assert script.main([*common, *arguments]) == 0
        report: Json = json.loads(out.read_text())
        return report

    return run


def test_where_it_was_measured_is_recorded(run: Run) -> None:
    found = run("--cases", "minmax tensor float32$", "--no-peer")
    assert found["command"].startswith("python -m benchmarks.range_search --size 64 --repeats 2")
    assert "--json" not in found["command"]
    assert "cores of an " in found["machine"]
    assert platform.node() not in found["machine"]
    assert found["threads"] == torch.get_num_threads()
    assert found["versions"]["torch"] == importlib.metadata.version("torch")
    assert found["versions"].keys() >= {"python", "calipers", "compressed-tensors"}
    assert found.keys() >= {"commit", "date"}


def test_without_the_peer_ours_is_checked_and_timed_alone(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    (result,) = run("--cases", "^mse int4 g128 bfloat16$", "--no-peer")["tables"]["search"]["rows"]
    assert "timed alone" in capsys.readouterr().out
    assert result["ours_ms"] > 0
    assert result["theirs_ms"] is result["theirs_over_ours"] is result["met"] is None
    assert result["at_least"] == 25
    (check,) = result["checks"]
    assert (check["groups"], check["differ"], check["agreed"]) == (64, 0, True)
    assert 0 < result["memory_allocated_mib"] < 1
    assert result["memory_met"]


def test_min_max_is_compared_with_one_read(run: Run) -> None:
    results = run("--cases", "^minmax .*float32$", "--no-peer")["tables"]["minmax"]["rows"]
    assert [result["at_most"] for result in results] == [1.3, 1.3, 1.3, 1.7, 4.0]
    for result in results:
        assert result["theirs"] == "aminmax"
        ratio = result["ours_over_theirs"]
        assert ratio == pytest.approx(1 / result["theirs_over_ours"], rel=1e-5)
        assert result["met"] == (ratio <= result["at_most"])
        assert result["checks"][0]["differ"] == 0


def test_importance_reaches_our_observer(run: Run) -> None:
    (result,) = run("--cases", "^imatrix_mse int4 g128$", "--no-peer")["tables"]["search"]["rows"]
    assert result["correct"]


def test_another_step_is_seen_and_excused_only_as_a_tie(script: ModuleType) -> None:
    case = next(c for c in script.all_cases() if c.name == "mse int8 channel")
    setting = script.Setting.of(case, 64)
    low, high = setting.ours().range()
    same = script.compare(setting, (low, high), (low, high), "itself", True)
    assert (same.differ, same.agreed) == (0, True)
    wrong_low, wrong_high = low.clone(), high.clone()
    wrong_low[5] *= 0.9
    wrong_high[5] *= 0.9
    wrong = script.compare(setting, (wrong_low, wrong_high), (low, high), "the right one", True)
    assert (wrong.differ, wrong.agreed) == (1, False)
    assert wrong.worst_gap > 0.01


def test_a_case_that_matches_nothing_is_an_error(
    script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        script.main(["--cases", "int99"])
    assert "no case matches 'int99'" in capsys.readouterr().err


def test_memory_of_a_known_call(script: ModuleType) -> None:
    values = torch.ones(2**21)

    def known() -> torch.Tensor:
        doubled = [values * 2 for _ in range(4)]
        return doubled[0] + doubled[-1]

    assert script.peak_allocated(known) == pytest.approx(32)
    resident = script.peak_resident(known)
    assert resident is None or resident == pytest.approx(32, abs=4)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiles")
def test_cold_start_finds_the_cache_that_it_left(run: Run) -> None:
    empty, warm = run("--cold", "--engine", "native")["tables"]["cold"]["rows"]
    assert warm["first_s"] < empty["first_s"]
    assert empty["second_s"] < 1
