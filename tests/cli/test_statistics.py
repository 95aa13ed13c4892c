"""`calipers observe`, `merge`, `inspect`, `convert`, and `calibrate --statistics`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from calipers.cli import app
from cli.conftest import Calipers
from cli.test_pipe import RUN
from streaming.conftest import expect_same


@pytest.fixture(scope="module")
def observed(llama: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("observed") / "stats.safetensors"
    args = (llama, "--data", texts / "text.jsonl", "--histograms", "--kv", "--out", out)
    result = CliRunner().invoke(app, ["observe", *map(str, args)])
    assert result.exit_code == 0, result.output
    return out


def test_what_it_prints(llama: Path, texts: Path, tmp_path: Path, calipers: Calipers) -> None:
    out = tmp_path / "stats.safetensors"
    args = ("observe", llama, "--data", texts / "text.jsonl", "--out", out)
    told = json.loads(calipers(*args, "--json").stdout)
    assert told["modules"] == 14
    assert told["without_tokens"] == []
    assert told["bytes"] == out.stat().st_size
    assert told["data"]["sequences"] == 3
    result = calipers("observe", llama, "--out", out)
    assert result.exit_code == 1
    assert "exists: choose another place, or replace it with force (--force)" in result.stderr
    assert calipers("observe", llama, "--samples", 2, "--out", out, "--force").exit_code == 0


@pytest.mark.parametrize(
    "options",
    [
        ("--scheme", "W4A16", "--option", "objective=imatrix"),
        ("--scheme", "FP8", "--activation-observer", "histogram", "--kv-cache", "fp8-head"),
    ],
)
def test_calibrate_gives_the_same_checkpoint(
    options: tuple[str, ...],
    llama: Path,
    texts: Path,
    observed: Path,
    tmp_path: Path,
    calipers: Calipers,
) -> None:
    common = ("calibrate", llama, *options, "--no-eval", "--json", "--no-load-check")
    by_file = calipers(*common, "--statistics", observed, "--out", tmp_path / "by-file")
    assert by_file.exit_code == 0, by_file.output
    data = ("--data", texts / "text.jsonl")
    by_data = calipers(*common, *data, "--out", tmp_path / "by-data")
    for name in ("model.safetensors", "config.json"):
        expected = (tmp_path / "by-data" / name).read_bytes()
        assert (tmp_path / "by-file" / name).read_bytes() == expected
    common = ("quantize", llama, *options, "--json", "--no-load-check")
    streamed = calipers(*common, "--statistics", observed, "--out", tmp_path / "streamed")
    assert streamed.exit_code == 0, streamed.output
    assert json.loads(streamed.stdout)["statistics"] == str(observed)
    expect_same(tmp_path / "by-file", tmp_path / "streamed")
    told, other = json.loads(by_file.stdout), json.loads(by_data.stdout)
    assert told["statistics"] == str(observed)
    found, expected = (each["calibration"]["modules"] for each in (told, other))
    for row in (*found, *expected):  # a file holds no tokens to measure activations on
        row["activation_measures"] = row["plots"] = None
    assert found == expected
    assert (told["data"], other["statistics"]) == (None, None)


def test_statistics_stand_in_for_data(
    llama: Path, narrow: Path, texts: Path, observed: Path, calipers: Calipers
) -> None:
    def error(*args: Any) -> str:
        result = calipers("calibrate", *args, "--statistics", observed, "--no-eval")
        assert result.exit_code == 1
        return result.stderr

    assert "there cannot be data" in error(llama, "--data", texts / "text.jsonl")
    assert "--no-data exclude each other" in error(llama, "--no-data")
    assert "shadows (--shadow) need data" in error(llama, "--shadow", "mse")
    assert "of another model" in error(narrow)
    assert "--products 128" in error(llama, "--option", "objective=hessian")


def test_quantize_refuses_what_calibrate_refuses(
    llama: Path, narrow: Path, texts: Path, observed: Path, tmp_path: Path, calipers: Calipers
) -> None:
    def error(*args: Any) -> str:
        result = calipers("quantize", *args, "--out", tmp_path / "out", "--no-load-check")
        assert result.exit_code == 1
        assert not (tmp_path / "out").exists()
        return result.stderr

    given = ("--statistics", observed)
    assert "of another model" in error(narrow, *given, "--group-size", 64)
    assert "--products 128" in error(llama, *given, "--option", "objective=hessian")
    assert "no such statistics file" in error(llama, "--statistics", texts / "none")
    assert "--on-missing" in error(llama, *given, "--on-missing", "never")
    assert "give statistics" in error(llama, "--scheme", "FP8").lower()
    assert "observe with outputs" in error(llama, *given, "--scheme", _outputs(tmp_path))


def _outputs(folder: Path) -> Path:
    path = folder / "outputs.yaml"
    path.write_text(
        "config_groups:\n  group_0:\n    targets: [Linear]\n"
        "    output_activations: {num_bits: 8, type: float, symmetric: true, strategy: tensor}\n"
    )
    return path


def test_merge_and_inspect(
    llama: Path, texts: Path, observed: Path, tmp_path: Path, calipers: Calipers
) -> None:
    second, both = tmp_path / "second.safetensors", tmp_path / "both.safetensors"
    data = ("--data", texts / "text.txt")
    calipers("observe", llama, *data, "--histograms", "--kv", "--out", second)
    told = json.loads(calipers("merge", observed, second, "--out", both, "--json").stdout)
    assert told["modules"] == 16  # 14 layers, and 2 attention modules
    assert "exists" in calipers("merge", observed, second, "--out", both).stderr
    again = calipers("merge", both, observed, "--out", both, "--force")
    assert "hold the same data" in again.stderr
    shown = json.loads(calipers("inspect", both, "--json").stdout)
    assert [each["name"] for each in shown["data"]] == [str(texts / n) for n in _NAMES]
    assert shown["states"]["model.layers.0.mlp.up_proj.input"] == ["extremes", "histogram"]
    parts = [json.loads(calipers("inspect", p, "--json").stdout) for p in (observed, second)]
    for name, each in shown["modules"].items():
        assert each["tokens"] == sum(part["modules"][name]["tokens"] for part in parts)
    lines = calipers("inspect", both).stdout
    assert "model.layers.*.mlp.up_proj" in lines
    assert "weight moments, input extremes, input histogram" in lines
    assert "LlamaForCausalLM, fingerprint" in lines


_NAMES = ("text.jsonl", "text.txt")


def test_a_damaged_file(observed: Path, tmp_path: Path, calipers: Calipers) -> None:
    path = tmp_path / "cut.safetensors"
    path.write_bytes(observed.read_bytes()[:-1])
    for args in (("inspect", path), ("merge", path, observed, "--out", tmp_path / "x")):
        result = calipers(*args)
        assert result.exit_code == 1
        assert "cut.safetensors: is damaged" in result.stderr
        assert len(result.stderr.splitlines()) == 1


def test_convert(llama: Path, observed: Path, tmp_path: Path, calipers: Calipers) -> None:
    pytest.importorskip("gguf")
    one, back, two = (tmp_path / name for name in ("1.gguf", "back.safetensors", "2.gguf"))
    told = json.loads(calipers("convert", observed, "--out", one, "--json").stdout)
    assert told["bytes"] == one.stat().st_size
    result = calipers("convert", one, "--model", llama, "--out", back)
    assert "14, 14 of them with tokens" in result.stdout
    calipers("convert", back, "--out", two)
    assert two.stat().st_size > 14 * 128 * 4
    result = calipers("calibrate", llama, "--statistics", back, "--no-eval")
    assert result.exit_code == 0, result.output
    assert (
        "--model: an imatrix does not say"
        in calipers("convert", one, "--out", two.with_suffix(".safetensors")).stderr
    )
    assert "must be an imatrix" in calipers("convert", one, "--out", tmp_path / "3.gguf").stderr
    model = ("--model", llama, "--out", tmp_path / "3.gguf")
    assert "says itself" in calipers("convert", observed, *model).stderr


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="sends SIGKILL")
def test_a_killed_command_goes_on(tmp_path: Path) -> None:
    out, whole = tmp_path / "stats.safetensors", tmp_path / "whole.safetensors"
    options = ["--samples", "96", "--every", "0", "--products", "128", "--histograms"]
    subprocess.run([*RUN, "observe", *options, "--out", str(whole)], check=True)
    command = [*RUN, "observe", *options, "--out", str(out)]
    for steps in (1, 2):
        process = subprocess.Popen(command)
        while not len(list(tmp_path.rglob("journal/*.json"))) >= steps:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "going on after" in done.stderr
    assert out.read_bytes() == whole.read_bytes()
    assert sorted(each.name for each in tmp_path.iterdir()) == [out.name, whole.name]
