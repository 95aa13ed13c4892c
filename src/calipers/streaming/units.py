"""`find_units`: what of a checkpoint is read, quantized and written together."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from calipers.calibration.fused import find_fused_groups
from calipers.calibration.observed import ObservedModule
from calipers.calibration.targets import has_global_scale
from calipers.checkpoint.tensors import SavedPart, saved_state, without_shared_memory
from calipers.streaming.source import Load, Place, SourceCheckpoint

__all__ = ["Unit", "find_units", "stored_tensors"]

#: Shape and dtype of a tensor.
Kind = tuple[torch.Size, torch.dtype]


@dataclass(eq=False)
class Unit:
    """Some modules that are read, quantized and written together.

    Attributes:
        parts: What is saved.
        group: Those of them that are quantized.
        places: Where their tensors come from: by the id of the module, by local name.
        loads: What is read for them, in the order of the disk.
        outputs: Shapes and dtypes of what is written, by name.
    """

    parts: list[SavedPart]
    group: list[ObservedModule] = field(default_factory=list)
    places: dict[int, dict[str, Place]] = field(default_factory=dict)
    loads: list[Load] = field(default_factory=list)
    outputs: dict[str, Kind] = field(default_factory=dict)

    @property
    def bytes_read(self) -> int:
        """Bytes of what is read, as it lies in memory."""
        return sum(each.nbytes for each in self.loads)

    @property
    def bytes_written(self) -> int:
        """Bytes of what is written."""
        return sum(shape.numel() * dtype.itemsize for shape, dtype in self.outputs.values())


def find_units(
    source: SourceCheckpoint,
    parts: Iterable[SavedPart],
    observed: Sequence[ObservedModule],
    dtype: torch.dtype | None,
) -> list[Unit]:
    """Split a planned model into units, in the order in which they lie on the disk.

    A unit is one module, or those that cannot do without each other: layers that share a global
    scale, and tensors that transformers makes of each other when it loads or saves.

    Args:
        source: The checkpoint; its model carries the quantization that it will have.
        parts: What a checkpoint of that model stores, see `saved_parts`.
        observed: The modules that are quantized.
        dtype: See `saved_state`.
    """
    parts = [each for each in parts if not _is_empty(each, source.missing)]
    places = {id(each.module): _places(source, each.module) for each in parts}
    names = _OutputNames(source.model)
    kinds: dict[object, dict[str, Tensor]] = {}
    links = _Links(len(parts))
    for number, part in enumerate(parts):
        links.join(number, id(part.module))
        for place in places[id(part.module)].values():
            if place.load.is_converted or place.load.index is not None:
                links.join(number, place.load)
        for key in _meta_state(part, dtype, kinds):
            made = names.made_with(_join(part.prefix, key))
            if made is not None and key not in part.tied:
                links.join(number, made)
    numbers: dict[str, list[int]] = {}
    for number, part in enumerate(parts):
        numbers.setdefault(part.prefix, []).append(number)
    by_name = {each.name: each for each in observed}
    sharing = [name for name, each in by_name.items() if _shares_scale(each)]
    for group in find_fused_groups(sharing):
        for name in group:
            for number in numbers[name]:
                links.join(number, (group[0],))
    units = []
    for together in links.groups():
        own = [parts[number] for number in together]
        unit = Unit(own, [by_name[each.prefix] for each in own if each.prefix in by_name])
        unit.places = {id(each.module): places[id(each.module)] for each in own}
        loads = {place.load: None for each in unit.places.values() for place in each.values()}
        unit.loads = sorted(loads, key=lambda load: source.order[load.keys[0][0]])
        unit.outputs = {
            name: (tensor.shape, tensor.dtype)
            for name, tensor in names.of_state(_joined(own, dtype, kinds)).items()
        }
        units.append(unit)
    first = {id(unit): _first_key(source, unit) for unit in units}
    return sorted(units, key=lambda unit: first[id(unit)])


def stored_tensors(
    model: Any, parts: Iterable[SavedPart], dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """What a checkpoint stores of some modules whose tensors are at hand, under its own names.

    Args:
        model: The model.
        parts: All modules of a unit.
        dtype: See `saved_state`.

    Raises:
        CheckpointError: A module cannot be compressed.
    """
    tensors = {}
    for part in parts:
        for key, value in saved_state(part, dtype).items():
            if key not in part.tied:
                tensors[_join(part.prefix, key)] = value.cpu()
    made = _OutputNames(model).of_state(without_shared_memory(tensors))
    return {name: value.contiguous() for name, value in made.items()}


class _OutputNames:
    """How `save_pretrained` names, joins and leaves out tensors."""

    def __init__(self, model: Any) -> None:
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        self._model = model
        self._left_out = set(model._keys_to_ignore_on_save or ())
        conversions = getattr(model, "_weight_conversions", None) or []
        backwards = [each.reverse_transform() for each in reversed(conversions)]
        self._renamings = [each for each in backwards if isinstance(each, WeightRenaming)]
        self._converters = [each for each in backwards if isinstance(each, WeightConverter)]

    def made_with(self, name: str) -> tuple[str, str] | None:
        """What tensors have in common that are joined or split together; None of one that stays."""
        from transformers.core_model_loading import rename_source_key

        if not self._converters:
            return None
        target, pattern = rename_source_key(name, self._renamings, self._converters, reverse=True)
        return None if pattern is None else ("made", target)

    def of_state(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors that are written for some of the model's own, complete ones."""
        from transformers.core_model_loading import revert_weight_conversion

        kept = {name: value for name, value in tensors.items() if name not in self._left_out}
        if not self._renamings and not self._converters:
            return kept
        return dict(revert_weight_conversion(self._model, kept))


class _Links:
    """Which of some numbered things belong together."""

    def __init__(self, count: int) -> None:
        self._parents = list(range(count))
        self._first: dict[object, int] = {}

    def join(self, number: int, what: object) -> None:
        """Let a thing belong to all others that were joined with the same word."""
        first = self._root(self._first.setdefault(what, number))
        self._parents[self._root(number)] = first

    def groups(self) -> list[list[int]]:
        """The numbers, those together that belong together."""
        found: dict[int, list[int]] = {}
        for number in range(len(self._parents)):
            found.setdefault(self._root(number), []).append(number)
        return list(found.values())

    def _root(self, number: int) -> int:
        while self._parents[number] != number:
            self._parents[number] = self._parents[self._parents[number]]
            number = self._parents[number]
        return number


def _is_empty(part: SavedPart, missing: Collection[str]) -> bool:
    """Whether a checkpoint has nothing of a part: it holds none, or (a pooler) they are missing."""
    module = part.module
    keys = {
        key
        for key, value in (*module._parameters.items(), *module._buffers.items())
        if value is not None and key not in module._non_persistent_buffers_set
    }
    return all(_join(part.prefix, key) in missing for key in keys - part.tied)


def _places(source: SourceCheckpoint, module: nn.Module) -> dict[str, Place]:
    """Where the tensors of a module come from; those that quantizing makes come from nowhere."""
    hidden = module._non_persistent_buffers_set
    named = {**module._parameters, **{k: v for k, v in module._buffers.items() if k not in hidden}}
    found = {key: source.place_of(value) for key, value in named.items() if value is not None}
    return {key: place for key, place in found.items() if place is not None}


def _shares_scale(each: ObservedModule) -> bool:
    return any(has_global_scale(tensor.args) for tensor in each.tensors.values())


def _first_key(source: SourceCheckpoint, unit: Unit) -> int:
    return source.order[unit.loads[0].keys[0][0]] if unit.loads else len(source.order)


def _joined(
    parts: Iterable[SavedPart], dtype: torch.dtype | None, kinds: dict[object, dict[str, Tensor]]
) -> dict[str, Tensor]:
    return {
        _join(part.prefix, key): value
        for part in parts
        for key, value in _meta_state(part, dtype, kinds).items()
        if key not in part.tied
    }


def _meta_state(
    part: SavedPart, dtype: torch.dtype | None, known: dict[object, dict[str, Tensor]]
) -> dict[str, Tensor]:
    """What is stored of a module, on the meta device; modules alike are compressed once."""
    module = part.module
    shapes = [
        (key, value.shape, value.dtype)
        for key, value in (*module._parameters.items(), *module._buffers.items())
        if value is not None and key not in module._non_persistent_buffers_set
    ]
    scheme = None if part.scheme is None else id(part.scheme)
    kind = (type(module), scheme, part.stays_float32, tuple(shapes))
    if kind not in known:
        known[kind] = {key: value.to("meta") for key, value in _measured_state(part, dtype).items()}
    return known[kind]


def _measured_state(part: SavedPart, dtype: torch.dtype | None) -> dict[str, Tensor]:
    args = None if part.scheme is None else part.scheme.weights
    if args is None or args.symmetric:
        return saved_state(part, dtype)
    # compressed-tensors does not pack zero points on the meta device
    with _standing_in(part.module):
        return saved_state(part, dtype)


class _standing_in:
    """A block in which the tensors of a module are ones."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._before = dict(module._parameters)

    def __enter__(self) -> None:
        for key, value in self._before.items():
            if value is not None:
                ones = torch.ones(value.shape, dtype=value.dtype, device="cpu")
                self._module._parameters[key] = nn.Parameter(ones, requires_grad=False)

    def __exit__(self, *_: object) -> None:
        self._module._parameters.update(self._before)


def _join(prefix: str, key: str) -> str:
    return f"{prefix}.{key}" if prefix else key
