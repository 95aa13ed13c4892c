"""Saving a quantized model as a compressed-tensors checkpoint, atomically."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.base import TRANSFORM_CONFIG_NAME
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationStatus
from loguru import logger
from torch import nn

from calipers._quiet import no_progress_bars
from calipers.checkpoint.saved_config import saved_config
from calipers.checkpoint.tensors import (
    broken_ties,
    checkpoint_bytes,
    checkpoint_tensors,
    loading_dtype,
    quantized_modules,
)
from calipers.errors import CheckpointError

__all__ = ["compressed_size", "save"]

_LISTED = 20


def save(
    model: nn.Module, path: str | os.PathLike[str], *, tokenizer: Any = None, force: bool = False
) -> Path:
    """Writes a compressed-tensors checkpoint that transformers and vLLM load.

    The model in memory keeps its weights, scales and status: modules are compressed one at a time
    into a new state dict. The checkpoint is written to a folder beside the target and moved into
    place when it is complete; on any failure that folder is removed, and what was at the target is
    as it was.

    Args:
        model: A transformers model whose modules carry compressed-tensors quantization, with scales
            set and status FROZEN, as `calipers.calibrate` leaves them. Offloaded modules are read
            where they lie.
        path: Folder to write. Missing parents are made. An empty folder may exist already.
        tokenizer: Saved into the same folder where given; anything with `save_pretrained`.
        force: Replace an existing folder, with all that is in it.

    Returns:
        The path that was written.

    Raises:
        CheckpointError: The path is taken; no module is quantized; a quantized module is not
            frozen, or holds a scale that is NaN, infinite or not positive; a module cannot be
            compressed.

    Where the output head is tied to the embedding and one of the two is quantized, the checkpoint
    stores both and its config.json says that they are not tied, since a loader would overwrite one
    of them. Where compressed-tensors decompresses a format to another dtype than the model's,
    config.json names that dtype, with a warning in the log. A model under the preset UNQUANTIZED is
    saved as it is.
    """
    if not callable(getattr(model, "save_pretrained", None)):
        raise CheckpointError(
            "save writes transformers models, which have save_pretrained; "
            f"got {type(model).__name__}"
        )
    _refuse_unready(model)
    target = Path(path).expanduser()
    place = target.resolve()
    refuse_taken(target, force=force)

    place.parent.mkdir(parents=True, exist_ok=True)
    staging = place.with_name(f".{place.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        staging.mkdir()
        _write(model, staging)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        _move_into_place(staging, place)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def compressed_size(model: nn.Module) -> int:
    """Bytes of the tensors that `save` would write for this model, tied ones counted once.

    Nothing is written, and of modules alike only one is compressed. The files add some kilobytes of
    names and config.

    Raises:
        CheckpointError: As for `save`, the path aside.
    """
    _refuse_unready(model)
    return checkpoint_bytes(model)


def _refuse_unready(model: nn.Module) -> None:
    modules = quantized_modules(model)
    if not modules and any(hasattr(module, "quantization_scheme") for module in model.modules()):
        return  # the preset UNQUANTIZED: nothing is compressed, and nothing can be missing
    if not modules:
        raise CheckpointError(
            f"{type(model).__name__} has no quantized module, so there is nothing to compress; "
            "calibrate it first, or save it with its own save_pretrained"
        )
    open_ones = {
        name: getattr(module, "quantization_status", None)
        for name, module in modules.items()
        if getattr(module, "quantization_status", None) != QuantizationStatus.FROZEN
    }
    if open_ones:
        statuses = sorted({str(getattr(s, "value", s)) for s in open_ones.values()})
        raise CheckpointError(
            f"{len(open_ones)} of {len(modules)} quantized modules are not frozen (status "
            f"{', '.join(statuses)}); freeze the calibration before saving: {_listing(open_ones)}"
        )
    bad = [name for name, module in modules.items() if not _has_usable_scales(module)]
    if bad:
        raise CheckpointError(
            f"{len(bad)} of {len(modules)} quantized modules lack a scale, or hold one that is "
            f"NaN, infinite or not positive: {_listing(bad)}"
        )


def _has_usable_scales(module: nn.Module) -> bool:
    scheme: Any = module.quantization_scheme
    if scheme.weights is not None and "weight_scale" not in module._parameters:
        return False
    scales = [key for key in module._parameters if key.endswith("_scale")]
    for key in scales:
        scale = getattr(module, key)
        # The observer optimal may give symmetric integers a negative scale, on request.
        usable = scale != 0 if key == "weight_scale" and _may_be_signed(scheme) else scale > 0
        if not scale.is_meta and not bool(torch.all(torch.isfinite(scale) & usable)):
            return False
    return True


def _may_be_signed(scheme: Any) -> bool:
    return bool((scheme.weights.observer_kwargs or {}).get("signed", False))


def refuse_taken(path: Path, *, force: bool) -> None:
    """Refuse a place that `save` would not write to, before any work.

    Raises:
        CheckpointError: A file, a folder that is not empty (without `force`), or one that holds the
            working directory.
    """
    shown, place = path, path.resolve()
    if not place.exists():
        return
    if not place.is_dir():
        raise CheckpointError(f"{shown} is a file; save writes a folder")
    if not any(place.iterdir()):
        return
    if not force:
        raise CheckpointError(
            f"{shown} exists and is not empty; choose another path, or pass force=True (--force) "
            "to replace it"
        )
    here = Path.cwd().resolve()
    if place == here or place in here.parents:
        raise CheckpointError(
            f"{shown} holds the current working directory; force=True would delete all of it"
        )


def _write(model: nn.Module, folder: Path) -> None:
    save_pretrained: Any = model.save_pretrained
    config = saved_config(model)
    tensors = checkpoint_tensors(model)
    changes: dict[str, Any] = {}
    if broken_ties(model):
        changes["tie_word_embeddings"] = False
    dtype = loading_dtype(model, tensors)
    if dtype is not None:
        changes["dtype"] = str(dtype).removeprefix("torch.")
        logger.warning(
            "compressed-tensors decompresses this scheme to {} only, so config.json says dtype {}: "
            "loaded by transformers the model runs in it. Calibrate in {} to get the same logits.",
            *[changes["dtype"]] * 3,
        )
    with _as_before_saving(model), no_progress_bars():
        save_pretrained(folder, state_dict=tensors)
    ModelCompressor(
        quantization_config=config,
        transform_config=getattr(model, TRANSFORM_CONFIG_NAME, None),
    ).update_config(str(folder))
    if changes:
        _change_config(folder / "config.json", changes)


def _change_config(config_file: Path, changes: dict[str, Any]) -> None:
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config.update(changes)
    if isinstance(config.get("text_config"), dict):
        config["text_config"].update(changes)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    config_file.write_text(text, encoding="utf-8")


def _move_into_place(staging: Path, place: Path) -> None:
    if not place.exists():
        staging.rename(place)
        return
    aside = place.with_name(f".{place.name}.{uuid.uuid4().hex[:8]}.old")
    place.rename(aside)
    try:
        staging.rename(place)
    except BaseException:
        aside.rename(place)
        raise
    shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def _as_before_saving(model: nn.Module) -> Iterator[None]:
    """Hides what would make save_pretrained drop our state dict, and undoes its changes.

    A model that was loaded from a quantized checkpoint has an `hf_quantizer`, whose state dict
    replaces the one that is passed in; `hf_device_map` makes it read the weights from the model
    again. It also writes dtype and architectures into the config of the model in memory.
    """
    hidden: dict[str, Any] = {
        key: vars(model).pop(key) for key in ("hf_quantizer", "hf_device_map") if key in vars(model)
    }
    config: Any = model.config
    before = dict(vars(config))
    try:
        yield
    finally:
        vars(config).clear()
        vars(config).update(before)
        vars(model).update(hidden)


def _listing(names: Any) -> str:
    listed = list(names)
    shown = ", ".join(listed[:_LISTED])
    rest = len(listed) - _LISTED
    return f"{shown} and {rest} more" if rest > 0 else shown
