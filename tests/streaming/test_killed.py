"""Killed at any moment, the same command goes on and ends with the same bytes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import architectures
from calipers.errors import CalipersError
from calipers.streaming import quantize as module
from calipers.streaming import quantize_checkpoint
from streaming.conftest import expect_same, other_files

posix_only = pytest.mark.skipif(os.name != "posix", reason="sends SIGKILL")

CHILD = """
import sys
from loguru import logger
logger.remove()
from calipers.streaming import quantize_checkpoint

def tell(stage, done, total):
    print(stage, done, total, flush=True)

report = quantize_checkpoint(
    sys.argv[1], sys.argv[2], "W4A16", "optimal", observer_options={"objective": "mse"},
    load_check=False, shard_bytes=1_000_000, progress=tell,
)
print("resumed", report.resumed, report.shards)
"""


def start(source: Path, out: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(source), str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 40 MB in bfloat16, in many layers."""
    folder = tmp_path_factory.mktemp("large")
    sizes = {**architectures.GROUPED, "hidden_size": 512, "intermediate_size": 1024}
    sizes["num_hidden_layers"] = 8
    model = architectures.tiny("LlamaForCausalLM", "LlamaConfig", **sizes).bfloat16()
    model.save_pretrained(folder / "source", max_shard_size="10MB")
    return folder


@pytest.fixture(scope="module")
def whole(large: Path) -> tuple[Path, float]:
    """What comes of it undisturbed, and how many seconds that takes from the first step on."""
    child = start(large / "source", large / "whole")
    assert child.stdout is not None
    child.stdout.readline()
    began = time.monotonic()
    out, errors = child.communicate(timeout=300)
    assert child.returncode == 0, errors
    resumed, shards = map(int, out.splitlines()[-1].split()[1:])
    assert resumed == 0
    assert shards > 5
    return large / "whole", time.monotonic() - began


def kill_until_done(source: Path, out: Path, seconds: float, kills: int, seed: int) -> list[int]:
    """Kill so many runs at random moments, let one end; gives what the runs had done before."""
    generator = random.Random(seed)
    for _ in range(kills):
        child = start(source, out)
        assert child.stdout is not None
        child.stdout.readline()  # planned: the first step comes now
        time.sleep(generator.uniform(0, seconds))
        child.send_signal(signal.SIGKILL)
        child.communicate(timeout=300)
        if out.exists():
            return []
    child = start(source, out)
    told, errors = child.communicate(timeout=300)
    assert child.returncode == 0, errors
    return [int(told.splitlines()[-1].split()[1])]


@posix_only
def test_killed_twice_it_goes_on(large: Path, whole: tuple[Path, float], tmp_path: Path) -> None:
    resumed = kill_until_done(large / "source", tmp_path / "out", whole[1] * 0.7, 2, seed=1)
    expect_same(whole[0], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert resumed == [] or resumed[0] >= 0


@posix_only
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_killed_at_random_moments_nothing_is_lost(
    large: Path, whole: tuple[Path, float], tmp_path: Path, seed: int
) -> None:
    kill_until_done(large / "source", tmp_path / "out", whole[1], 5, seed)
    expect_same(whole[0], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Let the step after so many raise, as a full disk would."""
    save, done = module.save_file, []

    def failing(*args: Any) -> None:
        if len(done) == steps:
            raise OSError("disk full")
        done.append(args)
        save(*args)

    monkeypatch.setattr(module, "save_file", failing)


def test_complete_shards_are_not_done_again(
    checkpoints: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = checkpoints("tied_llama"), tmp_path / "out"
    options: dict[str, Any] = {"load_check": False, "shard_bytes": 50_000}
    quantize_checkpoint(source, tmp_path / "whole", "FP8_DYNAMIC", **options)
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(CalipersError, match="out cannot be written: disk full"):
            quantize_checkpoint(source, out, "FP8_DYNAMIC", **options)
    assert not out.exists()
    # another command begins anew, and leaves the first one's work alone
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(CalipersError, match="disk full"):
            quantize_checkpoint(source, out, "W8A16", **options)
    stages: list[tuple[int, int | None]] = []
    report = quantize_checkpoint(
        source, out, "FP8_DYNAMIC", progress=lambda _, done, total: stages.append((done, total)),
        **options,
    )  # fmt: skip
    assert report.resumed == 3
    expect_same(tmp_path / "whole", out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


@pytest.mark.parametrize("change", ["config", "weights", "options"])
def test_steps_of_another_source_or_other_options_are_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    model = architectures.spread_weights(architectures.llama()).bfloat16()
    source, out = tmp_path / "source", tmp_path / "out"
    model.save_pretrained(source)
    options: dict[str, Any] = {"load_check": False, "shard_bytes": 50_000}
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(CalipersError, match="disk full"):
            quantize_checkpoint(source, out, "W8A16", "memoryless_mse", **options)
    more: dict[str, Any] = {}
    if change == "config":
        config = source / "config.json"
        changed = {**json.loads(config.read_text()), "initializer_range": 0.5}
        config.write_text(json.dumps(changed))
    elif change == "weights":
        model.model.layers[0].mlp.up_proj.weight.data.mul_(2)
        model.save_pretrained(source)
    else:
        more = {"observer_options": {"maxshrink": 0.5}}
    report = quantize_checkpoint(source, out, "W8A16", "memoryless_mse", **options, **more)
    assert report.resumed == 0
    quantize_checkpoint(source, tmp_path / "whole", "W8A16", "memoryless_mse", **options, **more)
    expect_same(tmp_path / "whole", out)
    assert other_files(out)["config.json"]
