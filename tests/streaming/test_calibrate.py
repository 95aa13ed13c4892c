"""`calibrate` from a path: whole and in blocks give the same bytes, and a killed run goes on."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch

import architectures
import calipers
from calipers.calibration import session
from calipers.checkpoint.opening import load_model
from calipers.errors import CalipersError, CheckpointError
from calipers.streaming import blocks as stored_blocks
from calipers.streaming import sizes as sizes_module
from calipers.streaming.sizes import Sizes, available_memory, measure_sizes


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "calipers-report.json"  # which has times in it
    }


def inputs(name: str, count: int = 4) -> list[dict[str, torch.Tensor]]:
    model = getattr(architectures, name)()
    found = [architectures.example_inputs(model, seed) for seed in range(count)]
    return [
        {
            key: value.bfloat16() if value.is_floating_point() else value
            for key, value in batch.items()
        }
        for batch in found
    ]


CASES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "llama W4A16": ("llama", "W4A16", {}),
    "llama FP8": ("llama", "FP8", {"kv_cache": "FP8"}),
    "llama NVFP4": ("llama", "NVFP4", {}),
    "llama min/max": ("llama", "W4A16", {"observer": "memoryless_minmax"}),
    "tied": ("tied_llama", "W4A16", {}),
    "experts W4A16": ("qwen3_moe", "W4A16", {}),
    "experts NVFP4": ("mixtral", "NVFP4", {}),
    "shadows": ("qwen3", "W4A16", {"shadow": "mse", "pick": "best"}),
}
MORE = {
    f"{name} {scheme}": (name, scheme, {"on_missing": "skip"})
    for name in """
        gemma3_text olmo2 phi3 gpt_oss deepseek_v3 glm4_moe qwen3_next granite_moe llama4 qwen2_vl
        qwen3_vl gemma3 clip siglip vit bert roberta modernbert t5 whisper jamba mamba
    """.split()  # noqa: SIM905
    for scheme in ("W4A16", "FP8")
}


def both_ways(
    source: Path, folder: Path, data: Any, scheme: Any, options: dict[str, Any]
) -> list[dict[str, Any]]:
    reports = []
    for memory in ("whole", "blocks"):
        report = calipers.calibrate(
            source, scheme, data=data, memory=memory, out=folder / memory, **options
        )
        reports.append({**report.to_dict(), "seconds": 0})
    return reports


@pytest.mark.parametrize("case", CASES)
def test_both_ways_write_the_same_bytes(case: str, checkpoints: Any, tmp_path: Path) -> None:
    name, scheme, options = CASES[case]
    whole, blocks = both_ways(checkpoints(name), tmp_path, inputs(name), scheme, options)
    assert digests(tmp_path / "whole") == digests(tmp_path / "blocks")
    assert whole == blocks


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE)
def test_of_every_architecture(case: str, checkpoints: Any, tmp_path: Path) -> None:
    name, scheme, options = MORE[case]
    source, data = checkpoints(name), inputs(name)
    try:
        calipers.calibrate(
            source, scheme, data=data, memory="whole", out=tmp_path / "try", **options
        )
    except CalipersError as error:
        pytest.skip(f"refused as a whole: {error}")
    whole, blocks = both_ways(source, tmp_path, data, scheme, options)
    assert digests(tmp_path / "whole") == digests(tmp_path / "blocks")
    assert whole == blocks


@pytest.mark.parametrize("propagate", [False, True])
@pytest.mark.parametrize("scheme", ["W4A16", "FP8"])
def test_a_run_that_was_broken_off_goes_on(
    checkpoints: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    propagate: bool,
    scheme: str,
) -> None:
    source, data = checkpoints("qwen3"), inputs("qwen3")

    def run(out: Path) -> dict[str, Any]:
        report = calipers.calibrate(
            source, scheme, data=data, memory="blocks", out=out, propagate=propagate
        )
        return {**report.to_dict(), "seconds": 0}

    whole = run(tmp_path / "whole")
    keep = stored_blocks.CheckpointStore.keep
    kept: list[str] = []

    def breaking(self: Any, block: str, record: Any) -> None:
        if kept:
            raise KeyboardInterrupt
        kept.append(block)
        keep(self, block, record)

    monkeypatch.setattr(stored_blocks.CheckpointStore, "keep", breaking)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken")
    monkeypatch.undo()
    assert not (tmp_path / "broken").exists()

    derived: list[int] = []
    derive = session.Calibration.derive

    def counting(self: Any, observed: Any, *args: Any, **kwargs: Any) -> None:
        derived.append(len(observed))
        derive(self, observed, *args, **kwargs)

    monkeypatch.setattr(session.Calibration, "derive", counting)
    assert run(tmp_path / "broken") == whole
    assert sum(derived) == 7  # of the second block alone
    assert digests(tmp_path / "whole") == digests(tmp_path / "broken")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "whole"]


def test_what_another_command_left_is_not_used(
    checkpoints: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, data = checkpoints("qwen3"), inputs("qwen3")
    out = tmp_path / "out"

    def broken(self: Any, block: str, record: Any) -> None:
        if block.endswith("1"):
            raise KeyboardInterrupt
        keep(self, block, record)

    keep = stored_blocks.CheckpointStore.keep
    monkeypatch.setattr(stored_blocks.CheckpointStore, "keep", broken)
    with pytest.raises(KeyboardInterrupt):
        calipers.calibrate(source, "W4A16", data=data, memory="blocks", out=out)
    monkeypatch.undo()
    calipers.calibrate(source, "W4A16", data=data[:2], memory="blocks", out=out)
    calipers.calibrate(source, "W4A16", data=data[:2], memory="blocks", out=tmp_path / "fresh")
    assert digests(out) == digests(tmp_path / "fresh")


def test_what_is_written_loads_with_equal_logits(checkpoints: Any, tmp_path: Path) -> None:
    source = checkpoints("llama")
    calipers.calibrate(source, "W4A16", data=inputs("llama"), memory="blocks", out=tmp_path / "out")
    model = load_model(source)
    calipers.calibrate(model, "W4A16", data=inputs("llama"))
    ids = inputs("llama")[0]["input_ids"]
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "out")(ids).logits, model(ids).logits)


def test_wrong_calls_are_refused(checkpoints: Any, tmp_path: Path) -> None:
    source = checkpoints("llama")
    with pytest.raises(CalipersError, match="out: expected the folder"):
        calipers.calibrate(source, "W4A16")
    with pytest.raises(CheckpointError, match="is the folder"):
        calipers.calibrate(source, "W4A16", out=source, force=True)
    with pytest.raises(CalipersError, match="memory"):
        calipers.calibrate(source, "W4A16", out=tmp_path / "out", memory="some")
    with pytest.raises(CalipersError, match="propagate"):
        calipers.calibrate(source, "W4A16", out=tmp_path / "out", memory="whole", propagate=True)
    with pytest.raises(TypeError, match="obsever"):
        calipers.calibrate(source, "W4A16", out=tmp_path / "out", obsever="mse")
    with pytest.raises(CalipersError, match="out: a model is quantized in place"):
        calipers.calibrate(load_model(source), "W4A16", out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_auto_opens_a_checkpoint_once_and_only_where_it_may_not_fit(
    checkpoints: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Path] = []
    real = sizes_module.SourceCheckpoint

    def opening(path: Path, dtype: str) -> Any:
        opened.append(path)
        return real(path, dtype)

    for module in ("sizes", "calibrating"):
        place = "calipers.calibrating" if module == "calibrating" else "calipers.streaming.sizes"
        monkeypatch.setattr(f"{place}.SourceCheckpoint", opening)
    source, data = checkpoints("llama"), inputs("llama")
    calipers.calibrate(source, "W4A16", data=data, out=tmp_path / "whole")
    assert opened == []
    monkeypatch.setattr(sizes_module, "available_memory", lambda device: 10**6)
    calipers.calibrate(source, "W4A16", data=data, out=tmp_path / "blocks")
    assert opened == [source]
    assert digests(tmp_path / "whole") == digests(tmp_path / "blocks")


def test_auto_takes_blocks_where_the_whole_does_not_fit() -> None:
    sizes = Sizes(model=10 * 2**30, blocks=40, block=2**28, outside=2**28, hidden=0, free=4 * 2**30)
    assert sizes.way == "blocks"
    assert Sizes(**{**vars(sizes), "free": 20 * 2**30}).way == "whole"
    assert Sizes(**{**vars(sizes), "blocks": 0}).way == "whole"
    assert "4.3 GB are free" in sizes.reason
    model = architectures.llama()
    found = measure_sizes(model, tokens=100)
    assert found.model == sum(each.nbytes for each in model.parameters())
    assert found.blocks == 2
    assert found.hidden == 100 * 128 * 4
    assert 0 < available_memory() == pytest.approx(found.free, rel=0.2)
