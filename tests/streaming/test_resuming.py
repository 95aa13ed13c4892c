"""Broken off, the same command goes on after the files that are complete."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import architectures
from calipers.errors import CalipersError
from calipers.streaming import quantize as module
from calipers.streaming import quantize_checkpoint
from streaming.conftest import expect_same, other_files


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
