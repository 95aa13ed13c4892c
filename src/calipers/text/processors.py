"""Processors of transformers in place of tokenizers: text with images, videos or sounds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from calipers._words import first_line
from calipers.errors import CalipersError
from calipers.text.samples import Sample

__all__ = [
    "MEDIA",
    "has_media",
    "in_dtype",
    "is_processor",
    "process",
    "tokenizer_of",
]

#: Fields of a sample that a processor takes beside text, by the names of its arguments.
_FIELDS = ("images", "videos", "audio")
#: The same with what it takes along with them.
MEDIA = (*_FIELDS, "sampling_rate")
#: Fields of a part of a message that may name a file.
_PART_FIELDS = ("image", "video", "audio", "path", "url")


def is_processor(value: object) -> bool:
    """Whether a value is a processor: it holds a tokenizer, and is called with text and more."""
    return callable(value) and getattr(value, "tokenizer", None) is not None


def tokenizer_of(value: Any) -> Any:
    """The tokenizer of a processor; a tokenizer itself, or None, comes back as it is."""
    return value.tokenizer if is_processor(value) else value


def has_media(value: object) -> bool:
    """Whether a sample has more than text: filled fields of their names, or parts of messages."""
    if not isinstance(value, Mapping):
        return False
    return any(value.get(name) is not None for name in _FIELDS) or _in_messages(value)


def _in_messages(value: Mapping[str, Any]) -> bool:
    messages = value.get("messages")
    return isinstance(messages, list) and any(
        isinstance(part, Mapping) and part.get("type", "text") != "text"
        for message in messages
        if isinstance(message, Mapping) and isinstance(message.get("content"), list)
        for part in message["content"]
    )


def process(sample: Sample, processor: Any, folder: Path | None = None) -> dict[str, Any]:
    """Arguments of a model for one sample, as a batch of one.

    Args:
        sample: With "text" and "images", "videos" or "audio" (and "sampling_rate"), which are
            handed to the processor under these names; or with "messages" that hold such parts,
            for its chat template. It is not cut: places of an image cannot be.
        processor: The model's processor.
        folder: Where files lie that the sample names by relative paths; None for the working
            directory.

    Raises:
        CalipersError: The processor does not take the sample; says why. A file that there is not,
            or an address in its place.
    """
    value: Any = _with_files(sample, folder)
    try:
        if "messages" in value and value.get("text") is None:
            found = processor.apply_chat_template(
                value["messages"], tokenize=True, return_dict=True, return_tensors="pt"
            )
        else:
            names = ("text", *MEDIA)
            given = {name: value[name] for name in names if value.get(name) is not None}
            found = processor(**given, return_tensors="pt")
    except ImportError:
        raise
    except Exception as error:  # whatever a processor does with what it does not expect
        kind = type(processor).__name__
        raise CalipersError(
            f"{sample.where}: {kind} does not take it: {type(error).__name__}: {first_line(error)}"
        ) from None
    return dict(found)


def _with_files(sample: Sample, folder: Path | None) -> dict[str, Any]:
    """The fields of a sample with names of files as paths."""

    def find(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [find(each) for each in value]
        return _path_of(value, sample.where, folder) if isinstance(value, str) else value

    def find_in_part(part: Any) -> Any:
        if not isinstance(part, Mapping) or part.get("type", "text") == "text":
            return part
        return {key: find(part[key]) if key in _PART_FIELDS else part[key] for key in part}

    def find_in_message(message: Any) -> Any:
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), list):
            return message
        return {**message, "content": [find_in_part(part) for part in message["content"]]}

    assert isinstance(sample.value, Mapping)
    value = {key: find(v) if key in _FIELDS else v for key, v in sample.value.items()}
    if isinstance(value.get("messages"), list):
        value["messages"] = [find_in_message(each) for each in value["messages"]]
    return value


def _path_of(text: str, where: str, folder: Path | None) -> str:
    if text.startswith(("http://", "https://")):
        raise CalipersError(f"{where}: {text}: nothing is fetched; name a local file")
    if folder is None or text.startswith("data:"):
        return text
    path = folder / text
    if not path.is_file():
        raise CalipersError(f"{where}: no such file: {path}")
    return str(path)


def in_dtype(inputs: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The inputs with images and sounds, which processors make in float32, in a model's dtype."""
    return {
        name: value.to(dtype)
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for name, value in inputs.items()
    }
