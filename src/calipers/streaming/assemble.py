"""`assemble`: the files of a checkpoint, copied together from files of its blocks."""

from __future__ import annotations

import inspect
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import _TYPES as DTYPES
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["INDEX", "assemble"]

INDEX = "model.safetensors.index.json"
_PATTERN = "model{suffix}.safetensors"
_METADATA = {"format": "pt"}


@dataclass(frozen=True)
class _Stored:
    """A tensor in a file: where its bytes lie, and what the header says of it."""

    file: Path
    start: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]

    def empty(self) -> Tensor:
        """A tensor like it, on the meta device."""
        return torch.empty(self.shape, dtype=DTYPES[self.dtype], device="meta")


def assemble(files: Iterable[Path], folder: Path, model: Any) -> None:
    """Write files of weights, and their index, as `save_pretrained` distributes and names them.

    Bytes are copied from file to file; no tensor is in memory. The files are those that
    `save_pretrained` would write, byte for byte.

    Args:
        files: Safetensors with all tensors of the checkpoint, each in one of them.
        folder: Where to write.
        model: Names the size of shards, by the default of its `save_pretrained`, and its number of
            parameters.
    """
    stored = {name: each for file in files for name, each in _read_header(file).items()}
    limit = inspect.signature(model.save_pretrained).parameters["max_shard_size"].default
    split = split_torch_state_dict_into_shards(
        {name: each.empty() for name, each in stored.items()},
        filename_pattern=_PATTERN,
        max_shard_size=limit,
    )
    for file_name, names in split.filename_to_tensors.items():
        _write_file(folder / file_name, {name: stored[name] for name in names})
    if split.is_sharded:
        index = {
            "metadata": {"total_parameters": model.num_parameters(), **split.metadata},
            "weight_map": split.tensor_to_filename,
        }
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / INDEX).write_text(text, encoding="utf-8")


def _read_header(file: Path) -> dict[str, _Stored]:
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
    header.pop("__metadata__", None)
    return {
        name: _Stored(
            file,
            8 + size + each["data_offsets"][0],
            each["data_offsets"][1] - each["data_offsets"][0],
            each["dtype"],
            tuple(each["shape"]),
        )
        for name, each in header.items()
    }


def _write_file(path: Path, tensors: Mapping[str, _Stored]) -> None:
    order = _order(tensors)
    header: dict[str, Any] = {"__metadata__": _METADATA}
    place = 0
    for name in order:
        each = tensors[name]
        end = place + each.nbytes
        header[name] = {"dtype": each.dtype, "shape": each.shape, "data_offsets": [place, end]}
        place = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        out.flush()
        for name in order:
            _copy(tensors[name], out.fileno())


def _order(tensors: Mapping[str, _Stored]) -> list[str]:
    """The order in which safetensors writes tensors of these names and dtypes."""
    ones = {
        name: torch.zeros(1, dtype=DTYPES[each.dtype], device="cpu")
        for name, each in tensors.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "order.safetensors"
        save_file(ones, file, _METADATA)
        return list(_read_header(file))


def _copy(stored: _Stored, out: int) -> None:
    """Append the bytes of a tensor to an open file, by the system where it can."""
    start, left = stored.start, stored.nbytes
    with stored.file.open("rb") as opened:
        while left:
            if hasattr(os, "sendfile"):
                done = os.sendfile(out, opened.fileno(), start, left)
            else:
                opened.seek(start)
                done = os.write(out, opened.read(min(left, 2**24)))
            if not done:
                raise OSError(f"{stored.file} ends too early")
            start, left = start + done, left - done
