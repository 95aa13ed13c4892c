"""The folder that a model was loaded from: never overwritten, and its small files carried along."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from calipers.errors import CheckpointError

__all__ = ["carry_files", "refuse_source", "source_folder"]

#: Files beside the weights that a checkpoint needs: of processors, of chat templates, of tokenizers
#: and custom code.
_CARRIED = (
    "preprocessor_config.json",
    "processor_config.json",
    "image_processor_config.json",
    "video_preprocessor_config.json",
    "feature_extractor_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
_OF_TOKENIZERS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "source.spm",
    "target.spm",
    "normalizer.json",
    "tekken.json",
    "vocab.bpe",
)
_OF_TOKENIZERS_TOO = (".model", ".tiktoken")
_FOLDERS = ("additional_chat_templates",)
_CODE = re.compile(r"[A-Za-z_]\w*\.py")


def source_folder(model: Any) -> Path | None:
    """The local folder that a transformers model was loaded from; None where there is none."""
    config = getattr(model, "config", None)
    for name in (getattr(model, "name_or_path", None), getattr(config, "_name_or_path", None)):
        if isinstance(name, (str, os.PathLike)) and name and Path(name).is_dir():
            return Path(name)
    return None


def refuse_source(path: Path, source: Path | None) -> None:
    """Refuse to write to the folder that a model was loaded from, inside of it or above it.

    Args:
        path: Where a checkpoint is to be written.
        source: The model's folder; None refuses nothing. Symbolic links are followed in both.

    Raises:
        CheckpointError: Says which of the three it is.
    """
    if source is None:
        return
    place, origin = path.expanduser().resolve(), source.expanduser().resolve()
    if _same(place, origin):
        how = f"is the folder that the model was loaded from ({source})"
    elif any(_same(parent, origin) for parent in place.parents):
        how = f"lies inside the folder that the model was loaded from ({source})"
    elif any(_same(place, parent) for parent in origin.parents):
        how = f"holds the folder that the model was loaded from ({source})"
    else:
        return
    raise CheckpointError(f"{path} {how}; choose a path outside of it")


def _same(one: Path, other: Path) -> bool:
    """Whether two paths are one folder, under another mount or in other letter case included."""
    try:
        return one == other or one.samefile(other)
    except OSError:
        return False


def carry_files(model: nn.Module, folder: Path, *, tokenizer: bool) -> None:
    """Copy what belongs to a model but is not written with it, from its source into a checkpoint.

    That is processors, chat templates, custom code (`*.py`) and, with `tokenizer`, the files of the
    tokenizer: from the folder that the model was loaded from, or from the local cache of the hub.
    What the checkpoint holds already stays.

    Args:
        model: A transformers model.
        folder: The checkpoint.
        tokenizer: Whether to carry the tokenizer's files along, which were not saved otherwise.

    Raises:
        OSError: A file cannot be copied.
    """
    for file in _files(model, [*_CARRIED, *(_OF_TOKENIZERS if tokenizer else ())]):
        _copy(file, folder / file.name)
    source = source_folder(model)
    if source is None:
        return
    for name in _FOLDERS:
        if (source / name).is_dir() and not (folder / name).exists():
            shutil.copytree(source / name, folder / name)


def _files(model: Any, names: list[str]) -> Iterator[Path]:
    source = source_folder(model)
    if source is not None:
        yield from (source / name for name in names if (source / name).is_file())
        endings = _OF_TOKENIZERS_TOO if set(_OF_TOKENIZERS) <= set(names) else ()
        for file in sorted(source.iterdir()):
            if file.is_file() and (_CODE.fullmatch(file.name) or file.suffix in endings):
                yield file
        return
    name = getattr(model, "name_or_path", None)
    if not isinstance(name, str) or name.count("/") > 1 or not name:
        return
    from huggingface_hub import try_to_load_from_cache

    revision = getattr(model.config, "_commit_hash", None)
    for each in names:
        try:
            cached = try_to_load_from_cache(name, each, revision=revision)
        except ValueError:  # a name that no repository has
            return
        if isinstance(cached, str):
            yield Path(cached)


def _copy(file: Path, to: Path) -> None:
    if not to.exists():
        shutil.copyfile(file, to)
