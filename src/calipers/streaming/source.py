"""`SourceCheckpoint`: a model without weights, and where on the disk each of its tensors lies."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from safetensors import safe_open
from safetensors.torch import _TYPES as DTYPES
from torch import Tensor

from calipers._quiet import no_progress_bars
from calipers._words import listing
from calipers.calibration.experts import joins_experts
from calipers.checkpoint.loading import loading_experts
from calipers.checkpoint.opening import class_to_load, refuse_incomplete
from calipers.errors import CalipersError

__all__ = ["Load", "Place", "Reader", "SourceCheckpoint"]

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
#: Bytes that are read through one mapping of a file: the pages of a mapping count as memory of the
#: process until it is closed.
_MAPPED = 2**26


@dataclass(frozen=True)
class Load:
    """Something that is read from the disk as a whole: one tensor, or what is made of several.

    Attributes:
        target: The parameter of the model that it makes, or the first of them.
        keys: Tensors on the disk, each with the pattern of the converter that it goes to.
        dtype: In which they are read.
        index: Which one along the first dimension is read of a single tensor; None for all.
        nbytes: Bytes in memory.
    """

    target: str
    keys: tuple[tuple[str, str | None], ...]
    dtype: torch.dtype
    index: int | None
    nbytes: int

    @property
    def is_converted(self) -> bool:
        """Whether transformers makes the parameters of what is read."""
        return self.keys[0][1] is not None


@dataclass(frozen=True)
class Place:
    """Where one tensor of the model comes from.

    Attributes:
        load: What is read for it.
        name: Which of the parameters that `load` makes.
        view: Size, stride and offset in that parameter; None for the whole.
    """

    load: Load
    name: str
    view: tuple[torch.Size, tuple[int, ...], int] | None = None


class SourceCheckpoint:
    """A checkpoint of safetensors, and the model that transformers makes of it on the meta device.

    Args:
        path: A local transformers folder.
        dtype: "auto" for that of the checkpoint, or the name of a torch dtype.

    Attributes:
        path: The folder.
        model: The model; its parameters are on the meta device.
        files: Files with weights, by name; their keys in the order in which they lie there.
        missing: Parameters that the checkpoint lacks (a pooler).

    Raises:
        CalipersError: No such folder, no safetensors in it, weights that are missing, or a
            checkpoint that is quantized already.
    """

    def __init__(self, path: Path, dtype: str = "auto") -> None:
        self.path = path
        config = _read_config(path)
        if "quantization_config" in config:
            raise CalipersError(
                f"{path}: is quantized already (its config.json has a quantization_config); give "
                "the checkpoint that it was made from"
            )
        self.files = _weight_files(path)
        self._shapes: dict[str, tuple[torch.Size, torch.dtype]] = {}
        self._file_of: dict[str, str] = {}
        for name, file in self.files.items():
            for key, shape in _shapes_of(file):
                self._shapes[key], self._file_of[key] = shape, name
        self.order = {key: place for place, key in enumerate(self._file_of)}
        kind = class_to_load(path)
        with no_progress_bars(), loading_experts():
            self.model, info = kind.from_pretrained(
                path,
                dtype=dtype if dtype == "auto" else getattr(torch, dtype),
                device_map={"": "meta"},
                local_files_only=True,
                output_loading_info=True,
            )
        self.model.eval()
        self.model.__dict__.pop("hf_device_map", None)
        refuse_incomplete(path, info)
        self.missing = set(info["missing_keys"])
        if info["unexpected_keys"]:
            logger.warning(
                "{} tensors of the checkpoint belong to no module of {} and are left out: {}",
                len(info["unexpected_keys"]),
                type(self.model).__name__,
                listing(sorted(info["unexpected_keys"]), 3),
            )
        self._converters: dict[str, Any] = {}
        self._owners: dict[int, tuple[str, Tensor]] = {}
        self._loads = dict(self._find_loads())
        self._tie_what_is_equal()
        self._remember_storages()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors on the disk."""
        return sum(_nbytes(*each) for each in self._shapes.values())

    def fingerprint(self) -> dict[str, Any]:
        """What tells this checkpoint from another, or from itself after a change."""
        config = (self.path / "config.json").read_bytes()
        files = {
            name: [file.stat().st_size, file.stat().st_mtime_ns]
            for name, file in sorted(self.files.items())
        }
        return {"config": hashlib.sha256(config).hexdigest(), "files": files}

    def place_of(self, tensor: Tensor) -> Place | None:
        """Where a parameter or buffer of the model comes from; None of what it does not load.

        Args:
            tensor: On the meta device; one of the model as it was loaded, or a view of one, as the
                layers are that experts are taken apart into.
        """
        name, whole = self._owners.get(tensor.untyped_storage()._cdata, (None, None))
        if name is None or whole is None:
            return None
        load = self._loads.get(name)
        if load is None:
            raise CalipersError(f"{self.path}: lacks {name}, which is to be written")
        if tensor.shape == whole.shape and tensor.stride() == whole.stride():
            return Place(load, name)
        view = (tensor.size(), tensor.stride(), int(tensor.storage_offset()))
        return self._part(load, name, whole, view)

    def _part(
        self,
        load: Load,
        name: str,
        whole: Tensor,
        view: tuple[torch.Size, tuple[int, ...], int],
    ) -> Place:
        """A part of a parameter: read alone where it can be."""
        size, stride, offset = view
        step = whole.stride(0)
        expert = offset // step if whole.ndim > 1 else 0
        if not load.is_converted and load.index is None and whole.ndim > 1:
            shape = self._shapes[load.keys[0][0]][0]
            nbytes = _nbytes(shape[1:], load.dtype)
            one = Load(name, load.keys, load.dtype, expert, nbytes)
            return Place(one, name, (size, stride, offset - expert * step))
        converter = self._converters.get(load.target)
        if converter is not None and _only_stacks(converter) and stride == (size[-1], 1):
            patterns = list(converter.source_patterns)
            number, rest = divmod(offset - expert * step, size.numel())
            own = [key for key, pattern in load.keys if pattern == patterns[number]]
            if rest == 0 and len(own) == len(whole) and self._shapes[own[expert]][0] == size:
                key = own[expert]
                nbytes = _nbytes(size, load.dtype)
                return Place(Load(key, ((key, None),), load.dtype, None, nbytes), key)
        return Place(load, name, view)

    def _find_loads(self) -> Iterator[tuple[str, Load]]:
        """For each parameter what is read, as `from_pretrained` would."""
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )

        used = getattr(self.model, "_weight_conversions", None) or []
        renamings = [each for each in used if isinstance(each, WeightRenaming)]
        converters = [each for each in used if isinstance(each, WeightConverter)]
        by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
        state = self.model.state_dict()
        prefix = self.model.base_model_prefix
        keys: dict[str, list[tuple[str, str | None]]] = {}
        for key in sorted(self._shapes, key=dot_natural_key):
            target, pattern = rename_source_key(key, renamings, converters, prefix, state)
            if target not in state and key in state:
                target, pattern = rename_source_key(
                    key, [], [], base_model_prefix=prefix, meta_state_dict=state
                )
            if target in state:
                keys.setdefault(target, []).append((key, pattern))
        for target, own in keys.items():
            dtype = state[target].dtype
            sources = own if own[0][1] is not None else own[:1]
            nbytes = sum(_nbytes(self._shapes[key][0], dtype) for key, _ in sources)
            load = Load(target, tuple(sources), dtype, None, nbytes)
            if own[0][1] is None:
                yield target, load
                continue
            self._converters[target] = by_pattern[own[0][1]]
            empty = {
                key: torch.empty(self._shapes[key][0], dtype=dtype, device="meta")
                for key, _ in sources
            }
            for name in self.convert(load, empty):
                yield name, load

    def convert(self, load: Load, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parameters that a load makes, by name.

        Args:
            load: One that `place_of` gave.
            tensors: What was read, by key.
        """
        if not load.is_converted:
            return {load.target: tensors[load.keys[0][0]]}
        converter = copy.deepcopy(self._converters[load.target])
        for key, pattern in load.keys:
            converter.add_tensor(load.target, key, pattern, tensors[key])
        made = converter.convert(load.target, model=self.model, config=self.model.config)
        return {
            name: value[0] if isinstance(value, list) else value for name, value in made.items()
        }

    def _tie_what_is_equal(self) -> None:
        """Tie what is declared tied and lies on the disk twice, where the two are equal.

        transformers does that as well, but not on the meta device.
        """
        model = self.model
        for target, source in list(model.all_tied_weights_keys.items()):
            one, other = (model.get_parameter_or_buffer(name) for name in (target, source))
            if one is other or not {target, source} <= self._loads.keys():
                continue
            reader = Reader(self)
            equal = torch.equal(
                *(
                    self.convert(load, reader.read(load))[name]
                    for name, load in ((each, self._loads[each]) for each in (target, source))
                )
            )
            if not equal:
                logger.warning(
                    "{} and {} are declared tied, but differ in the checkpoint: they are not tied",
                    target,
                    source,
                )
                del model.all_tied_weights_keys[target]
                continue
            parent, _, local = target.rpartition(".")
            setattr(model.get_submodule(parent), local, other)

    def _remember_storages(self) -> None:
        named = [
            *self.model.named_parameters(remove_duplicate=False),
            *self.model.named_buffers(remove_duplicate=False),
        ]
        for name, tensor in named:
            if tensor.is_meta and name not in self.missing:
                known = self._owners.get(tensor.untyped_storage()._cdata)
                if known is None or known[0] not in self._loads:
                    self._owners[tensor.untyped_storage()._cdata] = (name, tensor)

    def file_of(self, key: str) -> Path:
        """The file that holds a tensor."""
        return self.files[self._file_of[key]]


class Reader:
    """Reads tensors, through mappings that are closed again before they hold much memory."""

    def __init__(self, source: SourceCheckpoint) -> None:
        self._source = source
        self._path: Path | None = None
        self._opened: Any = None
        self._read = 0

    def read(self, load: Load) -> dict[str, Tensor]:
        """The tensors of a load by key, in memory of their own."""
        return {key: value.to(load.dtype, copy=True) for key, value in self.mapped(load).items()}

    def mapped(self, load: Load) -> dict[str, Tensor]:
        """The tensors of a load by key, as they lie in the file; read when they are looked at."""
        return {key: self._mapped(key, load) for key, _ in load.keys}

    def _mapped(self, key: str, load: Load) -> Tensor:
        path = self._source.file_of(key)
        if path != self._path or self._read > _MAPPED:
            self._opened, self._path, self._read = safe_open(path, "pt"), path, 0
        if load.index is None:
            mapped: Tensor = self._opened.get_tensor(key)
        else:
            mapped = self._opened.get_slice(key)[load.index]
        self._read += mapped.nbytes
        return mapped


def _only_stacks(converter: Any) -> bool:
    """Whether a converter makes one parameter of all experts, whose layers are rows of it."""
    steps = [(type(each).__name__, getattr(each, "dim", None)) for each in converter.operations]
    plain = [("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)]
    return steps in plain and joins_experts(converter)


def _nbytes(shape: Iterable[int], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def _read_config(path: Path) -> dict[str, Any]:
    if not (path / "config.json").is_file():
        raise CalipersError(f"{path}: expected a local transformers directory with a config.json")
    try:
        return dict(json.loads((path / "config.json").read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise CalipersError(f"{path}: its config.json cannot be read: {error}") from None


def _weight_files(path: Path) -> dict[str, Path]:
    if (path / _INDEX).is_file():
        index = json.loads((path / _INDEX).read_text(encoding="utf-8"))
        names = sorted(set(index["weight_map"].values()))
    else:
        names = [_SINGLE]
    absent = [name for name in names if not (path / name).is_file()]
    if absent:
        raise CalipersError(
            f"{path}: expected weights in safetensors ({_INDEX} or {_SINGLE}); {absent[0]} is not "
            "there"
        )
    return {name: path / name for name in names}


def _shapes_of(file: Path) -> Iterator[tuple[str, tuple[torch.Size, torch.dtype]]]:
    try:
        with safe_open(file, "pt") as opened:
            for key in opened.offset_keys():
                part = opened.get_slice(key)
                dtype: Any = DTYPES[part.get_dtype()]
                yield key, (torch.Size(part.get_shape()), dtype)
    except Exception as error:
        raise CalipersError(f"{file}: cannot be read: {error}") from error
