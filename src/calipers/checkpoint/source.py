"""The folder that a model was loaded from: never overwritten, and its small files carried along."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator
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
_TEMPLATES = "additional_chat_templates"
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

    Symbolic links are followed in both paths. Without a source nothing is refused.

    Raises:
        CheckpointError: Says which of the three it is.
    """
    if source is None:
        return
    place, origin = path.expanduser().resolve(), source.expanduser().resolve()
    if _same(place, origin):
        how = "is"
    elif any(_same(parent, origin) for parent in place.parents):
        how = "lies inside"
    elif any(_same(place, parent) for parent in origin.parents):
        how = "holds"
    else:
        return
    raise CheckpointError(
        f"{path} {how} the folder that the model was loaded from ({source}); choose a path "
        "outside of it"
    )


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
    What the checkpoint in `folder` holds already stays.

    Raises:
        OSError: A file cannot be copied.
    """
    names = (*_CARRIED, *(_OF_TOKENIZERS if tokenizer else ()))
    endings = _OF_TOKENIZERS_TOO if tokenizer else ()
    source = source_folder(model)
    if source is None:
        files = list(_cached_files(model, names))
    else:
        files = [
            file
            for file in sorted(source.iterdir())
            if file.name in names or file.suffix in endings or _CODE.fullmatch(file.name)
        ]
        template = source / _TEMPLATES
        if template.is_dir() and not (folder / _TEMPLATES).exists():
            shutil.copytree(template, folder / _TEMPLATES)
    for file in files:
        if file.is_file() and not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)


def _cached_files(model: Any, names: Iterable[str]) -> Iterator[Path]:
    """Those of these files of a model's repository that lie in the local cache of the hub."""
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
