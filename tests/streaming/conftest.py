"""Checkpoints on disk, and what two of them have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import architectures
import calipers
from calipers.checkpoint.opening import load_model


def read_checkpoint(folder: Path) -> dict[str, tuple[Any, ...]]:
    """Dtype, shape and bytes of every tensor in a folder's files, by name."""
    found: dict[str, tuple[Any, ...]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for key in opened.offset_keys():
                assert key not in found, f"{key} is stored twice"
                value = opened.get_tensor(key)
                raw = value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
                found[key] = (value.dtype, tuple(value.shape), raw)
    return found


def other_files(folder: Path) -> dict[str, bytes]:
    """Contents of all other files but the index and the report, by name."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
        and ".safetensors" not in path.name
        and path.name != "calipers-report.json"  # which has times in it
    }


def expect_same(one: Path, other: Path) -> None:
    """Two checkpoints hold the same tensors and files; how tensors are distributed may differ."""
    left, right = read_checkpoint(one), read_checkpoint(other)
    assert left.keys() == right.keys()
    assert [name for name in left if left[name] != right[name]] == []
    assert other_files(one) == other_files(other)


def calibrate_and_save(
    source: Path, out: Path, scheme: Any, observer: str | None = None, **options: Any
) -> None:
    """The way by a model in memory."""
    model = load_model(source, device="cpu", dtype="auto")
    calipers.calibrate(model, scheme, observer, **options)
    calipers.save(model, out, load_check=False)


def save_architecture(
    name: str, folder: Path, dtype: torch.dtype = torch.bfloat16, shard: str = "200KB"
) -> Path:
    """A tiny random checkpoint of one of `tests/architectures.py`."""
    model = architectures.spread_weights(getattr(architectures, name)()).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Gives the folder of an architecture's checkpoint, made once."""
    made: dict[str, Path] = {}

    def give(name: str) -> Path:
        if name not in made:
            made[name] = save_architecture(name, tmp_path_factory.mktemp("models") / name)
        return made[name]

    return give
