"""Statistics files in place of data: the checkpoint that `calibrate` gives, without a model."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import architectures
import calipers
from calipers import MissingDataError, SchemeError, Statistics, StatisticsError
from calipers.calibration.experts import separated_experts
from calipers.checkpoint.opening import load_model
from calipers.statistics_files import Fingerprint
from calipers.streaming import quantize_checkpoint
from calipers.streaming.source import Reader, SourceCheckpoint
from calipers.streaming.statistics import digests_of
from streaming.conftest import calibrate_and_save, expect_same, save_architecture

GROUPS = {"scheme_options": {"group_size": 32}}
IMATRIX = {"observer_options": {"objective": "imatrix"}}
HESSIAN = {"observer_options": {"objective": "hessian"}}
HISTOGRAM = {"activation_observer": "histogram"}
WAYS: dict[str, tuple[Any, ...]] = {
    "W4A16": ("W4A16", None, GROUPS),
    "W4A16_ASYM hessian": ("W4A16_ASYM", "optimal", {**GROUPS, **HESSIAN}),
    "FP8": ("FP8", None, {}),
    "FP8 histogram": ("FP8", "memoryless_minmax", HISTOGRAM),
    "NVFP4": ("NVFP4", None, IMATRIX),
    "FP8 cache": ("FP8_DYNAMIC", None, {"kv_cache": "FP8"}),
    "FP8 cache by head": (None, None, {"kv_cache": "FP8_HEAD", **HISTOGRAM}),
}
#: Those that are run with experts in every test run.
EXPERTS = ("W4A16", "NVFP4")
SMALL: dict[str, Any] = {"shard_bytes": 100_000, "load_check": False}


def data_for(model: Any, batches: int = 3) -> list[dict[str, torch.Tensor]]:
    return [architectures.example_inputs(model, seed) for seed in range(batches)]


def observe(source: Path, out: Path, *, batches: int = 3, **options: Any) -> Path:
    model = load_model(source, device="cpu", dtype="auto")
    everything = {"products": 32, "histograms": True, "kv": True, **options}
    calipers.observe(model, data_for(model, batches), out, **everything)
    return out


@pytest.fixture(scope="module")
def files(checkpoints: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Gives an architecture's checkpoint and its statistics file, made once."""
    made: dict[str, Path] = {}

    def give(name: str) -> tuple[Path, Path]:
        source = checkpoints(name)
        if name not in made:
            out = tmp_path_factory.mktemp("statistics") / f"{name}.safetensors"
            made[name] = observe(source, out)
        return source, made[name]

    return give


@pytest.mark.parametrize(
    ("name", "way"),
    [
        *(("tied_llama", way) for way in WAYS),
        *(
            pytest.param("qwen3_moe", way, marks=[pytest.mark.slow] * (way not in EXPERTS))
            for way in WAYS
        ),
    ],
)
def test_the_checkpoint_of_calibrate(files: Any, tmp_path: Path, name: str, way: str) -> None:
    source, file = files(name)
    scheme, observer, options = WAYS[way]
    calibrate_and_save(source, tmp_path / "file", scheme, observer, statistics=file, **options)
    data = data_for(load_model(source, device="cpu", dtype="auto"))
    calibrate_and_save(source, tmp_path / "data", scheme, observer, data=data, **options)
    quantize_checkpoint(
        source, tmp_path / "out", scheme, observer, statistics=file, **SMALL, **options
    )
    expect_same(tmp_path / "file", tmp_path / "out")
    expect_same(tmp_path / "data", tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3", "mixtral", "gemma3_text", "phi3"])
def test_other_architectures(files: Any, tmp_path: Path, name: str, way: str) -> None:
    if (name, way) == ("deepseek_v3", "FP8 cache by head"):  # one latent for all heads
        source, file = files(name)
        scheme, observer, options = WAYS[way]
        with pytest.raises(SchemeError, match="latent"):
            quantize_checkpoint(
                source, tmp_path / "out", scheme, observer, statistics=file, **options
            )
        return
    test_the_checkpoint_of_calibrate(files, tmp_path, name, way)


def test_statistics_in_memory_are_as_good_as_a_file(files: Any, tmp_path: Path) -> None:
    source, file = files("tied_llama")
    found = Statistics.load(file)
    before = copy.deepcopy(found.states)
    for name, given in (("file", str(file)), ("memory", found)):
        quantize_checkpoint(source, tmp_path / name, "FP8", statistics=given, **SMALL)
    expect_same(tmp_path / "file", tmp_path / "memory")
    for key, kinds in before.items():
        for kind, entries in kinds.items():
            for entry, value in entries.items():
                assert torch.equal(found.states[key][kind][entry], value)


@pytest.mark.parametrize("few", ["shrink", "pooled", "own"])
def test_experts_with_few_tokens(checkpoints: Any, tmp_path: Path, few: str) -> None:
    source = checkpoints("qwen3_moe")
    file = observe(source, tmp_path / "stats.safetensors", batches=1)
    options: dict[str, Any] = {
        "statistics": file, "on_few_tokens": few, "enough_tokens": 20, "on_missing": "fallback",
    }  # fmt: skip
    tokens = [each.tokens for each in Statistics.load(file).modules.values()]
    assert any(0 < each < 20 for each in tokens)
    calibrate_and_save(source, tmp_path / "whole", "W4A16", **GROUPS, **options)
    quantize_checkpoint(source, tmp_path / "out", "W4A16", **GROUPS, **SMALL, **options)
    expect_same(tmp_path / "whole", tmp_path / "out")
    if few != "own":
        options["on_few_tokens"] = "own"
        quantize_checkpoint(source, tmp_path / "own", "W4A16", **GROUPS, **SMALL, **options)
        with pytest.raises(AssertionError):
            expect_same(tmp_path / "own", tmp_path / "out")


@pytest.mark.parametrize("missing", ["skip", "fallback"])
def test_modules_without_tokens(tmp_path: Path, missing: str) -> None:
    model = architectures.spread_weights(architectures.qwen3_moe(num_experts=16)).bfloat16()
    source = tmp_path / "source"
    model.save_pretrained(source)
    file = observe(source, tmp_path / "stats.safetensors", batches=1)
    assert any(not each.tokens for each in Statistics.load(file).modules.values())
    options: dict[str, Any] = {"statistics": file, "on_few_tokens": "own"}
    with pytest.raises(MissingDataError, match="no data reached these tensors in 1 batches"):
        quantize_checkpoint(source, tmp_path / "out", "FP8", **SMALL, **options)
    assert not (tmp_path / "out").exists()
    options["on_missing"] = missing
    calibrate_and_save(source, tmp_path / "whole", "FP8", **options)
    quantize_checkpoint(source, tmp_path / "out", "FP8", **SMALL, **options)
    expect_same(tmp_path / "whole", tmp_path / "out")


@pytest.mark.parametrize(
    "name", ["tied_llama", "qwen3_moe", "gpt_oss", "deepseek_v3", "phi3", "mixtral", "qwen2_vl"]
)
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_a_checkpoint_has_the_fingerprint_of_its_model(
    checkpoints: Any, name: str, dtype: str
) -> None:
    source = checkpoints(name)
    model = load_model(source, device="cpu", dtype=dtype)
    opened = SourceCheckpoint(source, dtype)
    with separated_experts(model), separated_experts(opened.model):
        known = Fingerprint.of(model)
        found = Fingerprint.of(opened.model, digests_of(opened))
    assert known.differences(found) == []
    assert (known.tensors, known.digest) == (found.tensors, found.digest)


def test_nothing_is_copied_for_the_fingerprint(
    checkpoints: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: Any) -> None:
        raise AssertionError("reads a whole tensor")

    opened = SourceCheckpoint(checkpoints("qwen3_moe"))
    monkeypatch.setattr(Reader, "read", read)
    with separated_experts(opened.model):
        assert len(digests_of(opened)) == 45


def test_statistics_of_another_model_are_refused(files: Any, tmp_path: Path) -> None:
    _, file = files("tied_llama")
    source = save_architecture("tied_llama", tmp_path / "source", shard="10GB")
    tensors = load_file(source / "model.safetensors")
    changed = "model.layers.1.mlp.up_proj.weight"
    tensors[changed] = tensors[changed] * 2
    save_file(tensors, source / "model.safetensors", {"format": "pt"})

    def refused(message: str, **options: Any) -> None:
        with pytest.raises(StatisticsError, match=message):
            quantize_checkpoint(source, tmp_path / "out", "W4A16", statistics=file, **options)
        assert not (tmp_path / "out").exists()

    refused(r"weights of 1 of \d+ modules are others: model\.layers\.1\.mlp\.up_proj", **GROUPS)
    save_architecture("tied_llama", source, shard="10GB")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    refused("of another model: its config differs", **GROUPS)
    (source / "config.json").write_text(json.dumps(config))
    refused("of another model", dtype="float32", **GROUPS)
    refused("--products 16", observer_options={"objective": "hessian"},
            scheme_options={"group_size": 16})  # fmt: skip
    with pytest.raises(StatisticsError, match="no such statistics file"):
        quantize_checkpoint(source, tmp_path / "out", "W4A16", statistics=tmp_path / "none")
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(StatisticsError, match="is damaged"):
        quantize_checkpoint(source, tmp_path / "out", "W4A16", statistics=damaged)


def test_without_statistics_the_way_to_them_is_told(checkpoints: Any, tmp_path: Path) -> None:
    with pytest.raises(MissingDataError, match=r"--statistics FILE, of `calipers observe`"):
        quantize_checkpoint(checkpoints("tied_llama"), tmp_path / "out", "FP8", **SMALL)


def test_files_of_other_statistics_are_not_taken_over(
    files: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from calipers.streaming import quantize as module

    source, file = files("tied_llama")
    other = observe(source, tmp_path / "other.safetensors", batches=2)
    save, done = module.save_file, []

    def failing(*args: Any) -> None:
        if len(done) == 2:
            raise OSError("disk full")
        done.append(args)
        save(*args)

    options = {**GROUPS, **SMALL}
    with monkeypatch.context() as patch:
        patch.setattr(module, "save_file", failing)
        with pytest.raises(calipers.CheckpointError, match="disk full"):
            quantize_checkpoint(source, tmp_path / "out", "W4A16", statistics=file, **options)
    report = quantize_checkpoint(source, tmp_path / "out", "W4A16", statistics=other, **options)
    assert report.resumed == 0
    report = quantize_checkpoint(source, tmp_path / "again", "W4A16", statistics=file, **options)
    with pytest.raises(AssertionError):
        expect_same(tmp_path / "out", tmp_path / "again")
