"""`CheckpointStore`: blocks read from a checkpoint, and written once they are quantized."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from compressed_tensors.quantization.utils import is_module_quantized
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from calipers.calibration.blocks import OUTSIDE, block_of
from calipers.calibration.report import ModuleReport
from calipers.calibration.session import Record
from calipers.checkpoint.journal import Staging
from calipers.checkpoint.names import are_renamed
from calipers.checkpoint.save import refuse_unusable_scales
from calipers.checkpoint.tensors import SavedPart, without_shared_memory
from calipers.errors import CalipersError
from calipers.streaming.plan import StreamPlan
from calipers.streaming.quantize import weights_in_place
from calipers.streaming.source import Reader
from calipers.streaming.units import Unit, stored_tensors

__all__ = ["CheckpointStore", "fill_buffers"]

_ROWS = TypeAdapter(list[ModuleReport])
_SUFFIX = ".safetensors"


class CheckpointStore:
    """The store of a model on the meta device, whose weights lie in a checkpoint.

    A block is read when it is brought, written to the scratch folder of a staging when it is kept,
    and empty again afterwards. What lies outside of all blocks is in memory all the time.

    Args:
        plan: What will be done to the checkpoint, with the model on the meta device.
        blocks: Names of the blocks.
        staging: Where blocks are kept.
        device: Where the model runs.
        writes: Whether this process keeps blocks; another one does where it does not.
    """

    def __init__(
        self,
        plan: StreamPlan,
        blocks: Iterable[str],
        staging: Staging,
        device: torch.device,
        *,
        writes: bool = True,
    ) -> None:
        self._writes = writes
        self._plan = plan
        self._staging = staging
        self._device = device
        model = plan.source.model
        self._dtype = plan.dtype if are_renamed(model) else None
        self._reader = Reader(plan.source)
        self._units: dict[str, list[Unit]] = {name: [] for name in (*blocks, OUTSIDE)}
        for unit in (unit for shard in plan.shards for unit in shard.units):
            homes = {block_of(part.prefix, self._units) for part in unit.parts}
            self._units[homes.pop() if len(homes) == 1 else OUTSIDE].append(unit)
        #: Of blocks that were kept before this run, which all ranks know alike.
        self._records: dict[str, Record | None] = {
            name: self._read_record(_key(name)) if staging.done(_key(name)) else None
            for name in self._units
        }

    def record(self, block: str) -> Record | None:
        """What a run that was killed did to this block."""
        return self._records[block]

    def _read_record(self, key: str) -> Record:
        note = self._staging.note(key)
        return Record(
            rows=_ROWS.validate_python(note["rows"]),
            reasons=note["reasons"],
            tokens=note["tokens"],
            unmasked=note["unmasked"],
            qparams=load_file(self._staging.scratch / f"{key}.qparams{_SUFFIX}"),
        )

    @contextmanager
    def bring(self, block: str) -> Iterator[None]:
        """The weights of a block, read from the checkpoint; empty again at the end."""
        with ExitStack() as stack:
            for unit in self._units[block]:
                tensors = {load: self._reader.read(load) for load in unit.loads}
                stack.enter_context(
                    weights_in_place(self._plan, unit, tensors, self._device, whole=True)
                )
                tensors.clear()
            if block == OUTSIDE:
                _tie(self._plan.source.model)
            yield

    def keep(self, block: str, record: Record) -> None:
        """Write what a checkpoint stores of a block, and what `record` gives back."""
        if not self._writes:
            return
        tensors: dict[str, Tensor] = {}
        for unit in self._units[block]:
            parts = [_as_quantized(part) for part in unit.parts]
            tensors |= stored_tensors(self._plan.source.model, parts, self._dtype)
        key = _key(block)
        qparams = without_shared_memory(
            {name: value.detach().cpu() for name, value in record.qparams.items()}
        )
        self._staging.write(
            key,
            scratch={
                f"{key}{_SUFFIX}": lambda path: save_file(tensors, path, {"format": "pt"}),
                f"{key}.qparams{_SUFFIX}": lambda path: save_file(qparams, path),
            },
            note={
                "rows": json.loads(_ROWS.dump_json(record.rows)),
                "reasons": record.reasons,
                "tokens": record.tokens,
                "unmasked": record.unmasked,
            },
        )

    @property
    def files(self) -> list[Path]:
        """The files of all blocks that were kept, in the model's order."""
        return [self._staging.scratch / f"{_key(block)}{_SUFFIX}" for block in self._units]


def _tie(model: Any) -> None:
    """Let weights that are tied, of which a unit has one alone, be the same again."""
    for target, source in model.all_tied_weights_keys.items():
        parent, _, key = target.rpartition(".")
        module = model.get_submodule(parent)
        if module.get_parameter(key).is_meta:
            module._parameters[key] = model.get_parameter(source)


def fill_buffers(model: Any, device: torch.device) -> None:
    """Give a model on the meta device the buffers that no checkpoint holds (of rotary embeddings).

    Raises:
        CalipersError: The model does not say how to make one of them.
    """
    wanted = [
        (name, module)
        for name, module in model.named_modules()
        if any(_is_unfilled(module, key) for key in module._non_persistent_buffers_set)
    ]
    for name, module in wanted:
        unfilled = [key for key in module._non_persistent_buffers_set if _is_unfilled(module, key)]
        for key in unfilled:
            meta = module.get_buffer(key)
            # NaN shows where nothing fills it
            fill = torch.nan if meta.is_floating_point() else 0
            module._buffers[key] = torch.full(meta.shape, fill, dtype=meta.dtype, device=device)
        with torch.no_grad():
            model._init_weights(module)
        for key in unfilled:
            if bool(module.get_buffer(key).isnan().any()):
                raise CalipersError(
                    f"{name}.{key}: {type(model).__name__} does not say how this buffer is made, "
                    "so that its blocks cannot be loaded one by one: use memory='whole'"
                )


def _is_unfilled(module: nn.Module, key: str) -> bool:
    value = module._buffers.get(key)
    return value is not None and value.is_meta


def _as_quantized(part: SavedPart) -> SavedPart:
    """The module as it is saved: what saw no data may have been left as it was."""
    if part.scheme is None or not is_module_quantized(part.module):
        return replace(part, scheme=None)
    refuse_unusable_scales(part.prefix, part.module)
    return part


def _key(block: str) -> str:
    """The name of a block's step and files."""
    return quote(block, safe=" ") if block else "outside"
