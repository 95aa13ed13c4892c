"""`calipers calibrate` of a model with experts, and `calipers coverage` of its report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli.conftest import Calipers, error_of, succeeded


def test_from_a_model_to_its_coverage(
    calipers: Calipers, moe: Path, texts: Path, tmp_path: Path
) -> None:
    out, report = tmp_path / "out", tmp_path / "report.json"
    text = texts / "text.txt"
    arguments = ["--scheme", "W4A16", "--data", text, "--eval", text, "--samples", 4]
    arguments += ["--sequence-length", 16, "--enough-tokens", 40, "--out", out]
    result = succeeded(calipers("calibrate", moe, *arguments, "--json"))
    report.write_text(json.dumps(result), encoding="utf-8")
    calibration = result["calibration"]
    assert calibration["quantized_share"] > 0.99
    tokens = calibration["coverage"][0]["tokens"]
    assert sum(tokens.values()) == 2 * 64  # each token has two experts
    few = [name for name, count in tokens.items() if count < 40]
    assert calibration["coverage"][0]["few"] == few
    rows = {row["name"]: row for row in calibration["modules"]}
    for name, count in tokens.items():
        assert rows[f"{name}.gate_proj"]["shared"] == max(0.0, (40 - count) / 40)
    shown = calipers("coverage", report).stdout
    assert "Tokens that experts saw; 40 are enough" in shown
    assert "model.layers.1.mlp.experts" in shown
    assert f"{few[0].rpartition('.')[2]} ({tokens[few[0]]})" in shown
    assert succeeded(calipers("coverage", report, "--json")) == calibration["coverage"]
    given = ["--eval", text, "--sequence-length", 16]
    (judged,) = succeeded(calipers("evaluate", out, *given, "--json"))["models"]
    assert judged["perplexity"]["value"] == pytest.approx(result["perplexity_after"], rel=1e-4)


def test_every_expert_sees_every_token(calipers: Calipers, moe: Path, texts: Path) -> None:
    arguments = ["--data", texts / "text.txt", "--no-eval", "--samples", 2, "--sequence-length", 16]
    options = ["--all-experts", "--on-few-tokens", "error", "--enough-tokens", 32]
    result = succeeded(calipers("calibrate", moe, *arguments, *options, "--json"))
    coverage = result["calibration"]["coverage"]
    assert [set(each["tokens"].values()) for each in coverage] == [{32}, {32}]
    table = calipers("calibrate", moe, *arguments).stdout
    assert "saw fewer than 256 tokens" in table


def test_few_tokens_can_be_an_error(calipers: Calipers, moe: Path, texts: Path) -> None:
    arguments = ["--data", texts / "text.txt", "--no-eval", "--samples", 2, "--sequence-length", 16]
    told = error_of(calipers("calibrate", moe, *arguments, "--on-few-tokens", "error"))
    assert "experts saw fewer than 256 tokens:" in told
    assert "--all-experts" in told
    told = error_of(calipers("calibrate", moe, *arguments, "--on-few-tokens", "drop"))
    assert "on_few_tokens must be one of shrink, pooled, own, error" in told


def test_other_schemes_say_which_loader_they_need(
    calipers: Calipers, moe: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = ["--scheme", "FP8_DYNAMIC", "--no-data", "--out", out, "--sequence-length", 16]
    result = succeeded(calipers("calibrate", moe, *arguments, "--json"))
    assert result["calibration"]["coverage"] == []
    (judged,) = succeeded(calipers("evaluate", out, "--sequence-length", 16, "--json"))["models"]
    assert judged["perplexity"]["value"] == pytest.approx(result["perplexity_after"], rel=1e-4)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"coverage": 1}', '{"calibration": {}}'])
def test_what_is_no_report_is_told(calipers: Calipers, tmp_path: Path, text: str) -> None:
    file = tmp_path / "report.json"
    file.write_text(text, encoding="utf-8")
    assert "expected what `calipers calibrate --json` prints" in error_of(
        calipers("coverage", file)
    )


def test_a_report_without_experts_is_told(calipers: Calipers, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    file.write_text('{"calibration": {"coverage": []}}', encoding="utf-8")
    assert "no experts were counted" in error_of(calipers("coverage", file))
