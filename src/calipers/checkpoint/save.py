"""Saving a quantized model as a compressed-tensors checkpoint, atomically."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.distributed import get_source_rank, is_source_process
from compressed_tensors.modeling import IMPL_ATTR
from compressed_tensors.offload import as_single_threaded
from compressed_tensors.quantization import QuantizationStatus
from loguru import logger
from safetensors import SafetensorError
from torch import nn

from calipers._unwrap import unwrap, without_wrappers
from calipers._words import listing
from calipers.calibration.attention import CACHE_STATES, STATES, is_attention
from calipers.checkpoint.global_scales import refuse_unequal
from calipers.checkpoint.load_check import refuse_unloadable
from calipers.checkpoint.replace import recover, refuse_unwritable, replacing
from calipers.checkpoint.source import carry_files, refuse_source, source_folder
from calipers.checkpoint.tensors import checkpoint_bytes, quantized_modules
from calipers.checkpoint.write import write_checkpoint
from calipers.errors import CheckpointError

__all__ = ["CannotWriteError", "compressed_size", "refuse_taken", "refuse_unusable_scales", "save"]

_LISTED = 20


class CannotWriteError(CheckpointError, OSError):
    """The system refused to write; an OSError too, as it was."""


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    force: bool = False,
    load_check: bool = True,
) -> Path:
    """Writes a compressed-tensors checkpoint that transformers and vLLM load.

    The model in memory keeps its weights, scales and status: modules are compressed one at a time
    into a new state dict. The checkpoint is written to a folder beside the target and moved into
    place when it is complete, in one step; on any failure that folder is removed, and what was at
    the target is as it was. What killed saves to this target left behind is removed.

    Args:
        model: A transformers model whose modules carry compressed-tensors quantization, with scales
            set and status FROZEN, as `calipers.calibrate` leaves them. Offloaded modules are read
            where they lie. Of a wrapper (torch.compile, DataParallel, or any module around one
            model) the model inside is saved.
        path: Folder to write. Missing parents are made. An empty folder may exist already.
        tokenizer: Saved into the same folder where given; anything with `save_pretrained`. Without
            it the tokenizer's files are copied from where the model was loaded from, as those of
            processors, chat templates and custom code are in any case.
        force: Replace an existing folder, with all that is in it; its permissions are kept.
        load_check: Try before anything is written whether the installed transformers loads such a
            checkpoint back: on a small random twin of the model, in seconds. What cannot be tried
            (custom code, say) is saved, with a line in the log.

    Returns:
        The path that was written.

    Raises:
        CheckpointError: The path is taken, or is the folder that the model was loaded from, lies
            inside of it or holds it; it cannot be written (a full disk); no module is quantized; a
            quantized module is not frozen, or holds a scale that is NaN, infinite or not positive;
            layers that engines fuse have unequal global scales (NVFP4); a module cannot be
            compressed, or would not load back.

    Where the output head is tied to the embedding and one of the two is quantized, the checkpoint
    stores both and its config.json says that they are not tied, since a loader would overwrite one
    of them. Where compressed-tensors decompresses a format to another dtype than the model's,
    config.json names that dtype, for the model and each model inside of it, with a warning in the
    log. A generation config that transformers calls invalid is saved as it is, with a line in the
    log. A model under the preset UNQUANTIZED is saved as it is. Where torch.distributed is
    initialised rank 0 writes, with or without the others, for which a call does nothing.
    """
    inner = _model_to_save(model)
    target = Path(path).expanduser()
    if not is_source_process():
        logger.info("{} is left to rank {} to write", target, get_source_rank())
        return target
    with as_single_threaded(), without_wrappers(inner):
        _refuse_unready(inner)
        refuse_source(target, source_folder(inner))
        refuse_taken(target, force=force)
        if load_check:
            refuse_unloadable(inner)
        place = target.resolve()
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with replacing(place, force=force) as folder:
                write_checkpoint(inner, folder)
                if tokenizer is not None:
                    _save_tokenizer(tokenizer, folder)
                carry_files(inner, folder, tokenizer=tokenizer is None)
        except (OSError, SafetensorError) as error:
            raise CannotWriteError(f"{target} cannot be written: {error}") from error
    return target


def compressed_size(model: nn.Module) -> int:
    """Bytes of the tensors that `save` would write for this model, tied ones counted once.

    Nothing is written, and of modules alike only one is compressed. The files add some kilobytes of
    names and config.

    Raises:
        CheckpointError: As for `save`, the path aside.
    """
    inner = unwrap(model)
    with without_wrappers(inner):
        _refuse_unready(inner)
        return checkpoint_bytes(inner)


def _model_to_save(model: nn.Module) -> nn.Module:
    """The transformers model inside of wrappers: torch's own, or any around just one child."""
    inner = unwrap(model)
    while not callable(getattr(inner, "save_pretrained", None)):
        children = list(inner.children())
        if len(children) != 1 or inner._parameters or inner._buffers:
            raise CheckpointError(
                "save writes transformers models, which have save_pretrained; "
                f"got {type(model).__name__}"
            )
        inner = unwrap(children[0])
    return inner


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        # The tokenizers library tells of a full disk by a plain Exception.
        if type(error) is Exception:
            raise OSError(f"the tokenizer cannot be saved: {error}") from error
        raise


def _refuse_unready(model: nn.Module) -> None:
    modules = quantized_modules(model)
    if not modules and any(hasattr(module, "quantization_scheme") for module in model.modules()):
        return  # the preset UNQUANTIZED: nothing is compressed, and nothing can be missing
    if not modules:
        raise CheckpointError(
            f"{type(model).__name__} has no quantized module, so there is nothing to compress; "
            "calibrate it first, or save it with its own save_pretrained"
        )
    statuses = {n: getattr(m, "quantization_status", None) for n, m in modules.items()}
    open_ones = {n: s for n, s in statuses.items() if s != QuantizationStatus.FROZEN}
    if open_ones:
        told = sorted({str(getattr(s, "value", s)) for s in open_ones.values()})
        raise CheckpointError(
            f"{len(open_ones)} of {len(modules)} quantized modules are not frozen (status "
            f"{', '.join(told)}); freeze the calibration before saving: "
            f"{listing(open_ones, _LISTED)}"
        )
    bad = [name for name, module in modules.items() if not _has_usable_scales(module)]
    if bad:
        raise CheckpointError(
            f"{len(bad)} of {len(modules)} quantized modules lack a scale, or hold one that is "
            f"NaN, infinite or not positive: {listing(bad, _LISTED)}"
        )
    refuse_unequal(modules)


def refuse_unusable_scales(name: str, module: nn.Module) -> None:
    """Refuse a frozen module that lacks a scale, or holds one that nothing can be divided by.

    Raises:
        CheckpointError: Names the module.
    """
    if not _has_usable_scales(module):
        raise CheckpointError(f"{name}: a scale came out NaN, infinite or not positive")


def _has_usable_scales(module: nn.Module) -> bool:
    """Whether a frozen module has all scales that its scheme needs, finite and of a right sign."""
    scheme: Any = module.quantization_scheme
    needed = ["weight_scale"] if scheme.weights is not None else []
    if is_attention(module):
        states = STATES if hasattr(module, IMPL_ATTR) else CACHE_STATES
        needed = [f"{state}_scale" for state in states if not scheme.input_activations.dynamic]
    if any(name not in module._parameters for name in needed):
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
    options = scheme.weights.observer_kwargs or {}
    return bool(options.get("negative_scales", options.get("signed", False)))


def refuse_taken(path: Path, *, force: bool) -> None:
    """Refuse a place that `save` would not, or could not write to, before any work.

    A folder that a killed save had put aside is put back first.

    Raises:
        CheckpointError: A file, a folder that is not empty (without `force`), one that holds the
            working directory, or one that the system lets nobody write or replace.
    """
    place = path.expanduser().resolve()
    try:
        recover(place)
        if place.exists() and not place.is_dir():
            raise CheckpointError(f"{path} is a file; save writes a folder")
        if place.exists() and any(place.iterdir()):
            if not force:
                raise CheckpointError(
                    f"{path} exists and is not empty; choose another path, or pass force=True "
                    "(--force) to replace it"
                )
            here = Path.cwd().resolve()
            if place in (here, *here.parents):
                raise CheckpointError(
                    f"{path} holds the current working directory; force=True would delete all of it"
                )
        refuse_unwritable(place)
    except OSError as error:
        raise CannotWriteError(f"{path} cannot be written: {error}") from error
