"""`write_checkpoint`: the files of a quantized model, written into an empty folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.base import TRANSFORM_CONFIG_NAME
from compressed_tensors.compressors import ModelCompressor
from loguru import logger
from torch import Tensor, nn

from calipers._quiet import no_progress_bars
from calipers.checkpoint.saved_config import saved_config
from calipers.checkpoint.tensors import checkpoint_tensors, has_broken_ties, loading_dtype

__all__ = ["write_checkpoint", "write_files"]


def write_checkpoint(model: nn.Module, folder: Path, *, tell: bool = True) -> None:
    """Write config.json, generation_config.json and the compressed weights of a frozen model.

    The model stays as it is. What is unusual about the checkpoint is logged, with `tell`.

    Raises:
        CheckpointError: A module cannot be compressed, or the config would not mean the model.
        OSError: The folder cannot be written to.
    """
    dtype = loading_dtype(model)
    write_files(model, folder, checkpoint_tensors(model, dtype), dtype, tell=tell)


def write_files(
    model: nn.Module,
    folder: Path,
    tensors: dict[str, Tensor],
    dtype: torch.dtype | None,
    *,
    tell: bool = True,
) -> None:
    """As `write_checkpoint`, with these tensors and this `loading_dtype`."""
    save_pretrained: Any = model.save_pretrained
    config = saved_config(model)
    changes = {} if dtype is None else {"dtype": str(dtype).removeprefix("torch.")}
    if changes and tell:
        logger.warning(
            "compressed-tensors decompresses this scheme to {0} only, so config.json says dtype "
            "{0}: loaded by transformers the model runs in it. Calibrate in {0} to get the same "
            "logits.",
            changes["dtype"],
        )
    with _as_before_saving(model, tell=tell) as invalid, no_progress_bars():
        save_pretrained(folder, state_dict=tensors)
    if invalid is not None:
        invalid.to_json_file(folder / "generation_config.json")
    transforms = getattr(model, TRANSFORM_CONFIG_NAME, None)
    compressor = ModelCompressor(quantization_config=config, transform_config=transforms)
    compressor.update_config(str(folder))
    _change_config(folder / "config.json", changes, untied=has_broken_ties(model))


def _change_config(config_file: Path, changes: dict[str, str], *, untied: bool) -> None:
    if not changes and not untied:
        return
    config = json.loads(config_file.read_text(encoding="utf-8"))
    for each in _with_sub_configs(config):
        each.update(changes)
    for each in (config, config.get("text_config")) if untied else ():
        if isinstance(each, dict):
            each["tie_word_embeddings"] = False
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    config_file.write_text(text, encoding="utf-8")


def _with_sub_configs(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The config and those of the models inside: a part keeps its own dtype when it is loaded."""
    yield config
    for key, value in config.items():
        if isinstance(value, dict) and key != "quantization_config" and "model_type" in value:
            yield from _with_sub_configs(value)


@contextmanager
def _as_before_saving(model: nn.Module, *, tell: bool) -> Iterator[Any]:
    """Hides what would make save_pretrained fail or drop our state dict, and undoes its changes.

    A model that was loaded from a quantized checkpoint has an `hf_quantizer`, whose state dict
    replaces the one that is passed in; `hf_device_map` makes it read the weights from the model
    again. It also writes dtype and architectures into the config of the model in memory, and it
    raises for a generation config that transformers loads without a word: where that is so the
    config is yielded, to be written as it is, else None.
    """
    hidden: dict[str, Any] = {
        key: vars(model).pop(key) for key in ("hf_quantizer", "hf_device_map") if key in vars(model)
    }
    config: Any = model.config
    before = dict(vars(config))
    own = vars(model).get("generation_config")
    invalid = own if _is_invalid(own, tell=tell) else None
    try:
        if invalid is not None:
            vars(model)["generation_config"] = type(invalid)()
        yield invalid
    finally:
        if invalid is not None:
            vars(model)["generation_config"] = own
        vars(config).clear()
        vars(config).update(before)
        vars(model).update(hidden)


def _is_invalid(generation_config: Any, *, tell: bool) -> bool:
    if generation_config is None:
        return False
    try:
        generation_config.validate(strict=True)
    except ValueError as error:
        if tell:
            logger.warning("generation_config.json is saved as it is, though invalid: {}", error)
        return True
    return False
