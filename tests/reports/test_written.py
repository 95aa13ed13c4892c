"""The report that a checkpoint is left with, whole and in blocks, by a call and by the command."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import calipers
from calipers.cli.app import app
from calipers.demo import MODEL_PATH
from calipers.errors import CalipersError
from calipers.reports import FILE_NAME, read_report

TEXTS = ["Once upon a time there was a cat.", "It sat on a mat and slept."]


@pytest.mark.parametrize("memory", ["whole", "blocks"])
def test_a_call_leaves_it_beside_the_checkpoint(memory: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = calipers.calibrate(
        MODEL_PATH, "FP8", data=TEXTS, memory=memory, out=out, observer="memoryless_minmax"
    )
    told = read_report(out)
    assert told["scheme"] == "FP8"
    assert told["observer"] == "memoryless_minmax"
    assert told["modules"] == report.to_dict()["modules"]
    assert told["modules"][0]["activation_measures"]["input"]["sqnr_db"] > 10
    assert not list(out.glob(".*"))
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert bool(loaded(torch.arange(8).unsqueeze(0)).logits.isfinite().all())


def test_the_command_adds_what_it_judged_by(tmp_path: Path) -> None:
    out = tmp_path / "out"
    given = ["calibrate", "--out", str(out), "--samples", "4", "--eval-samples", "4"]
    given += ["--sequence-length", "64", "--scheme", "W8A8", "--until-stable", "0.9"]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 0, result.output
    assert "KL divergence" in result.output
    told = read_report(out / FILE_NAME)
    found = told["measures"]["perplexity"]
    assert found["sequences"] == 4
    assert 0 <= found["kl"] < 0.1
    assert found["top1"] > 0.9
    assert told["model"] == "demo"
    assert told["stability"]["limit"] == 0.9


def test_blocks_do_not_end_early(tmp_path: Path) -> None:
    with pytest.raises(CalipersError, match="needs memory='whole'"):
        calipers.calibrate(
            MODEL_PATH, "FP8", data=TEXTS, memory="blocks", out=tmp_path / "a", until_stable=0.1
        )
