"""Statistics files: safetensors, with the manifest and a checksum of everything in the metadata."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from calipers._files import replacing
from calipers._words import first_line, listing
from calipers.errors import StatisticsError
from calipers.grouping import BASE_NAMES
from calipers.statistics_files.kinds import KINDS, State, stored_entries
from calipers.statistics_files.manifest import Manifest

__all__ = ["FORMAT", "read_file", "replace_file", "write_file"]

#: Version of the format; a file of a later one is refused.
FORMAT = 1
#: The one key of the metadata: safetensors keeps several in no fixed order.
_KEY = "calipers.statistics"
#: Bytes of a tensor from which it is stored once, where several are equal.
_LARGE = 2**12

States = Mapping[str, Mapping[str, State]]


def write_file(path: Path, manifest: Manifest, states: States) -> None:
    """Write a statistics file at `path`, which is not whole until this returns.

    Raises:
        OSError: It cannot be written.
    """
    tensors = {
        f"{key}/{kind}/{entry}": value
        for key, kinds in states.items()
        for kind, state in kinds.items()
        for entry, value in state.items()
    }
    told = manifest.model_dump(mode="json")
    digests = {name: _digest(value) for name, value in tensors.items()}
    same = _alike(tensors, digests)
    digest = _checksum(told, digests)
    metadata = {"format": FORMAT, "manifest": told, "same": same, "sha256": digest}
    path.touch()
    mode = path.stat().st_mode
    try:
        # safetensors refuses memory that is shared, as that of modules that read the same input
        stored = {
            name: value.clone() if value.nbytes < _LARGE else value
            for name, value in tensors.items()
            if name not in same
        }
        save_file(stored, path, {_KEY: json.dumps(metadata, sort_keys=True)})
    except SafetensorError as error:  # what the system says, as a text
        raise OSError(f"{path} cannot be written: {error}") from None
    path.chmod(mode)  # safetensors lets nobody but the owner read


def replace_file(path: Path, manifest: Manifest, states: States) -> None:
    """As `write_file`, beside `path`, which is replaced in one step once that is whole."""
    with replacing(path) as beside:
        write_file(beside, manifest, states)


def read_file(path: Path) -> tuple[Manifest, dict[str, dict[str, State]]]:
    """Read a statistics file, and check all of it.

    Raises:
        StatisticsError: Says what is wrong with it.
        OSError: It cannot be read.
    """
    if not path.is_file():
        raise StatisticsError(f"no such statistics file: {path}")
    try:
        with safe_open(path, framework="pt") as opened:
            metadata = (opened.metadata() or {}).get(_KEY)
            if metadata is None:
                raise StatisticsError(
                    f"{path}: is a safetensors file without statistics of calipers"
                )
            told = _read_metadata(path, metadata)
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise StatisticsError(
            f"{path}: is damaged, or no safetensors file: {first_line(error)}"
        ) from None
    same = told["same"]
    if not (tensors.keys().isdisjoint(same) and tensors.keys() >= set(same.values())):
        raise StatisticsError(f"{path}: is damaged: it lacks entries that several modules share")
    tensors |= {name: tensors[stored] for name, stored in same.items()}
    digests = {name: _digest(value) for name, value in tensors.items() if name not in same}
    digests |= {name: digests[stored] for name, stored in same.items()}
    if _checksum(told["manifest"], digests) != told["sha256"]:
        raise StatisticsError(f"{path}: is damaged: its checksum does not fit what it holds")
    try:
        manifest = Manifest.model_validate(told["manifest"])
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise StatisticsError(f"{path}: its manifest cannot be read: {problems}") from None
    return manifest, _sorted_in(path, manifest, tensors)


def _read_metadata(path: Path, text: str) -> dict[str, Any]:
    try:
        told: dict[str, Any] = json.loads(text)
        known = told["format"]
    except (ValueError, KeyError, TypeError):
        raise StatisticsError(f"{path}: is damaged: its metadata cannot be read") from None
    if not isinstance(known, int) or known > FORMAT:
        written = told.get("manifest", {}).get("versions", {}).get("calipers", ["a later one"])
        raise StatisticsError(
            f"{path}: is of format {known}, written by calipers {', '.join(written)}; this version "
            f"reads up to format {FORMAT}"
        )
    if told.keys() != {"format", "manifest", "same", "sha256"}:
        raise StatisticsError(f"{path}: has unknown metadata {sorted(told)}")
    return told


def _sorted_in(
    path: Path, manifest: Manifest, tensors: Mapping[str, Tensor]
) -> dict[str, dict[str, State]]:
    states: dict[str, dict[str, State]] = {}
    unknown = []
    for name, value in tensors.items():
        key, kind, entry = name.split("/") if name.count("/") == 2 else ("", "", "")
        module, _, base_name = key.rpartition(".")
        known = module in manifest.modules and base_name in BASE_NAMES and kind in KINDS
        if not known or entry not in stored_entries(kind):
            unknown.append(name)
            continue
        states.setdefault(key, {}).setdefault(kind, {})[entry] = value
    if unknown:
        raise StatisticsError(
            f"{path}: has {len(unknown)} entries that are not known here: "
            f"{listing(sorted(unknown), 3)}"
        )
    return states


def _alike(tensors: Mapping[str, Tensor], digests: Mapping[str, str]) -> dict[str, str]:
    """Large tensors that equal an earlier one: by name that of the one to store."""
    first: dict[str, str] = {}
    same = {}
    for name in sorted(tensors):
        if tensors[name].nbytes >= _LARGE and first.setdefault(digests[name], name) != name:
            same[name] = first[digests[name]]
    return same


def _digest(value: Tensor) -> str:
    """Digest of dtype, shape and bytes of a tensor."""
    digest = hashlib.sha256(f"{value.dtype} {tuple(value.shape)}\n".encode())
    if value.numel():
        plain = value.contiguous().reshape(-1).view(torch.uint8)
        digest.update(cast(Any, plain.numpy()))  # a buffer, of which mypy does not know
    return digest.hexdigest()


def _checksum(manifest: Any, digests: Mapping[str, str]) -> str:
    """Digest of the manifest and of all tensors, by name."""
    told = {"manifest": manifest, "tensors": digests}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
