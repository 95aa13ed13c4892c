"""Statistics files: what is refused, and why."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from calibration.tiny_models import tiny_llama, token_batches
from calipers import Statistics, StatisticsError, observe
from calipers.statistics_files import file as statistics_file
from calipers.statistics_files import weight_digest

KEY = "calipers.statistics"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("statistics") / "whole.safetensors"
    observe(tiny_llama(), token_batches(), path, histograms=True, kv=True, name="some tokens")
    return path


def contents(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    with safe_open(path, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        told = json.loads(opened.metadata()[KEY])
        return tensors | {name: tensors[as_] for name, as_ in told["same"].items()}, told


def rewritten(tmp_path: Path, tensors: dict[str, torch.Tensor], told: dict[str, Any]) -> Path:
    """A file whose checksum fits what it holds."""
    told["same"] = {}
    digests = {name: statistics_file._digest(value) for name, value in tensors.items()}
    told["sha256"] = statistics_file._checksum(told["manifest"], digests)
    path = tmp_path / "other.safetensors"
    apart = {name: value.clone() for name, value in tensors.items()}
    save_file(apart, path, {KEY: json.dumps(told)})
    return path


def test_what_is_written_is_read(whole: Path) -> None:
    found, again = (
        Statistics.load(whole),
        observe(tiny_llama(), token_batches(), histograms=True, kv=True, name="some tokens"),
    )
    assert found.manifest == again.manifest
    assert found.states.keys() == again.states.keys()
    for key, kinds in again.states.items():
        for kind, state in kinds.items():
            assert found.states[key][kind].keys() == state.keys()
            for entry, value in state.items():
                assert torch.equal(found.states[key][kind][entry], value)
                assert found.states[key][kind][entry].dtype == value.dtype


def test_the_same_statistics_are_the_same_bytes(whole: Path, tmp_path: Path) -> None:
    Statistics.load(whole).save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == whole.read_bytes()
    assert os.listdir(tmp_path) == ["again.safetensors"]


@pytest.mark.skipif(os.name != "posix", reason="has no such modes")
def test_others_may_read_it(whole: Path) -> None:
    plain = whole.with_name("plain")
    plain.touch()
    assert whole.stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize("kept", [0, 7, 500, -1])
def test_a_truncated_file(whole: Path, tmp_path: Path, kept: int) -> None:
    path = tmp_path / "cut.safetensors"
    path.write_bytes(whole.read_bytes()[:kept])
    with pytest.raises(StatisticsError, match=r"cut\.safetensors: is damaged"):
        Statistics.load(path)


@pytest.mark.parametrize("place", [0.2, 0.5, 0.8, 0.999])
def test_one_wrong_bit_among_the_numbers(whole: Path, tmp_path: Path, place: float) -> None:
    data = bytearray(whole.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[start + int((len(data) - start) * place)] ^= 1
    path = tmp_path / "flipped.safetensors"
    path.write_bytes(data)
    with pytest.raises(StatisticsError, match="is damaged: its checksum does not fit"):
        Statistics.load(path)


def test_what_modules_share_is_stored_once(whole: Path, tmp_path: Path) -> None:
    """Histograms of the inputs of q, k and v are one, and a file that lacks it is damaged."""
    with safe_open(whole, framework="pt") as opened:
        told = json.loads(opened.metadata()[KEY])
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    name = "model.layers.0.self_attn.{}_proj.input/histogram/counts.values"
    stored = name.format("k")
    assert told["same"][name.format("q")] == told["same"][name.format("v")] == stored
    del tensors[stored]
    path = tmp_path / "less.safetensors"
    save_file(tensors, path, {KEY: json.dumps(told)})
    with pytest.raises(StatisticsError, match="is damaged: it lacks entries that several modules"):
        Statistics.load(path)


def test_a_changed_manifest(whole: Path, tmp_path: Path) -> None:
    tensors, told = contents(whole)
    next(iter(told["manifest"]["modules"].values()))["tokens"] += 1
    told["same"] = {}
    path = tmp_path / "changed.safetensors"
    apart = {name: value.clone() for name, value in tensors.items()}
    save_file(apart, path, {KEY: json.dumps(told)})
    with pytest.raises(StatisticsError, match="its checksum does not fit"):
        Statistics.load(path)


def test_a_later_format(whole: Path, tmp_path: Path) -> None:
    tensors, told = contents(whole)
    told["format"] = 2
    told["manifest"]["versions"]["calipers"] = ["9.0"]
    path = rewritten(tmp_path, tensors, told)
    with pytest.raises(
        StatisticsError, match=r"format 2, written by calipers 9\.0.*up to format 1"
    ):
        Statistics.load(path)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.up_proj.weight/moments/kurtosis",
        "model.layers.0.mlp.up_proj.weight/spectrum/input_square_sum",
        "model.layers.7.mlp.up_proj.weight/moments/input_square_sum",
        "model.layers.0.mlp.up_proj.bias/moments/input_square_sum",
        "something",
    ],
)
def test_unknown_entries(whole: Path, tmp_path: Path, name: str) -> None:
    tensors, told = contents(whole)
    tensors[name] = torch.zeros(2)
    path = rewritten(tmp_path, tensors, told)
    with pytest.raises(StatisticsError, match=f"1 entries that are not known here: {name}"):
        Statistics.load(path)


def test_an_unknown_field_of_the_manifest(whole: Path, tmp_path: Path) -> None:
    tensors, told = contents(whole)
    told["manifest"]["mood"] = "good"
    path = rewritten(tmp_path, tensors, told)
    with pytest.raises(StatisticsError, match="manifest cannot be read: mood: Extra inputs"):
        Statistics.load(path)


def test_a_checkpoint_is_none(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(StatisticsError, match="a safetensors file without statistics"):
        Statistics.load(path)
    with pytest.raises(StatisticsError, match="no such statistics file"):
        Statistics.load(tmp_path / "nothing.safetensors")


def test_a_file_that_cannot_be_written_leaves_the_old_one(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "old.safetensors"
    old.write_bytes(b"old")
    found = Statistics.load(whole)

    def full(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"a part of it")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(statistics_file, "save_file", full)
    with pytest.raises(OSError, match=r"old\.safetensors\.tmp cannot be written: No space left"):
        found.save(old)
    assert old.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["old.safetensors"]


def test_weights_of_a_checkpoint_are_known_again(whole: Path) -> None:
    found, model = Statistics.load(whole), tiny_llama()
    name = "model.layers.0.mlp.up_proj"
    weight = model.get_submodule(name).weight
    found.refuse_other_weight(name, weight)
    found.refuse_other_weight(name, weight.detach().T.contiguous().T)
    with pytest.raises(StatisticsError, match=r"of another model: .*up_proj.*torch\.bfloat16"):
        found.refuse_other_weight(name, weight.bfloat16())
    with pytest.raises(StatisticsError, match="has no module elsewhere"):
        found.refuse_other_weight("elsewhere", weight)


@pytest.mark.parametrize("shape", [(), (1,), (3,), (40, 50), (3, 40, 50)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8])
def test_digests(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    values = torch.linspace(1, 100, torch.Size(shape).numel()).reshape(shape).to(dtype)
    digest = weight_digest(values)
    assert len(digest) == 32
    assert weight_digest(values.clone()) == digest
    assert weight_digest((values.float() / 2).to(dtype)) != digest
    assert weight_digest(values.unsqueeze(0)) != digest
    if len(shape) > 1:
        assert weight_digest(values.transpose(0, 1).contiguous().transpose(0, 1)) == digest


def test_small_tensors_are_read_whole() -> None:
    values = torch.arange(1024.0)
    for place in range(1024):
        other = values.clone()
        other[place] += 0.5
        assert weight_digest(other) != weight_digest(values)


def test_what_a_linear_costs() -> None:
    """The sizes that docs/statistics-files.md names, in bytes."""
    model = torch.nn.Sequential(torch.nn.Linear(1024, 8)).to(torch.bfloat16)
    data = [torch.randn(3, 1024, generator=torch.Generator().manual_seed(0)).bfloat16()]
    for products, most in ((None, 0), (64, 64.5), (512, 160.5), (0, 288.5)):
        found = observe(model, data, histograms=True, products=products)
        moments = found.states["0.weight"]["moments"]
        sums = {k: v.nbytes for k, v in moments.items() if v.dim()}
        assert sums.pop("input_square_sum") == 8 * 1024
        assert sum(sums.values()) == 8 * 1024 * most
        assert bool(sums) == (products is not None)
        extremes = found.states["0.input"]["extremes"]
        assert sum(v.nbytes for v in extremes.values() if v.dim()) == 2 * 1024 * 2
        packed = found.states["0.input"]["histogram"]
        patterns = len(data[0].unique())
        assert packed["counts.where"].nbytes + packed["counts.values"].nbytes == 12 * patterns
