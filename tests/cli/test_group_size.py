"""`calipers calibrate` on a model whose columns the group size of the preset does not divide."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from cli.conftest import Calipers, error_of, succeeded


def group_size_of(checkpoint: Path) -> int:
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    return config["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"]


def test_without_a_scheme_a_size_that_fits_is_chosen_and_said(
    calipers: Calipers, narrow: Path, tmp_path: Path
) -> None:
    fast = ("--samples", 8, "--no-eval")
    result = calipers("calibrate", narrow, *fast, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    told = " ".join(result.stdout.split())
    assert "scheme W4A16" in told
    assert "group size 64, since 128 does not divide the columns of 12 of 14 modules" in told
    assert group_size_of(tmp_path / "out") == 64
    assert succeeded(calipers("calibrate", narrow, *fast, "--json"))["group_size"] == 64


@pytest.mark.parametrize(
    ("scheme", "size"), [("W4A16", 128), ("FP8_DYNAMIC", None), ("NVFP4", None)]
)
def test_a_size_that_is_a_choice_is_said(
    calipers: Calipers, llama: Path, scheme: str, size: int | None
) -> None:
    given = ("calibrate", llama, "--scheme", scheme, "--samples", 2, "--no-eval")
    line = re.search("^group size +(.*)$", calipers(*given).stdout, re.MULTILINE)
    assert (line and line[1]) == (size and str(size))
    assert succeeded(calipers(*given, "--json"))["group_size"] == size


def test_a_scheme_that_was_asked_for_is_refused_with_the_way_out(
    calipers: Calipers, narrow: Path
) -> None:
    message = error_of(calipers("calibrate", narrow, "--scheme", "W4A16"))
    assert len(message.splitlines()) == 4
    assert "model.layers.*.self_attn.q_proj (2)" in message
    assert "--group-size 64" in message


def test_a_group_size_of_ones_own(calipers: Calipers, narrow: Path, tmp_path: Path) -> None:
    options = ("--scheme", "W4A16", "--group-size", 32, "--samples", 8, "--no-eval")
    options = (*options, "--out", tmp_path / "out", "--json")
    assert succeeded(calipers("calibrate", narrow, *options))["group_size"] == 32
    assert group_size_of(tmp_path / "out") == 32


def test_a_group_size_that_nothing_can_take(calipers: Calipers, narrow: Path) -> None:
    message = error_of(calipers("calibrate", narrow, "--scheme", "FP8_DYNAMIC", "--group-size", 64))
    assert "no weights in groups" in message
    assert "--group-size" in message
    assert calipers("calibrate", narrow, "--group-size", 0).exit_code == 2


def test_under_skip_the_size_stays(calipers: Calipers, narrow: Path) -> None:
    result = succeeded(calipers("calibrate", narrow, "--on-unfit", "skip", "--no-eval", "--json"))
    assert result["group_size"] == 128
    assert {row["reason"] for row in result["calibration"]["left_alone"]} >= {"shape"}
