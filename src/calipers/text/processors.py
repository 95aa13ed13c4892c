"""Processors of transformers in place of tokenizers: text with images, videos or sounds."""

from __future__ import annotations

from collections.abc import Mapping
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


def process(sample: Sample, processor: Any) -> dict[str, Any]:
    """Arguments of a model for one sample, as a batch of one.

    Args:
        sample: With "text" and "images", "videos" or "audio" (and "sampling_rate"), which are
            handed to the processor under these names; or with "messages" that hold such parts,
            for its chat template. It is not cut: places of an image cannot be.
        processor: The model's processor.

    Raises:
        CalipersError: The processor does not take the sample; says why.
    """
    value: Any = sample.value
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


def in_dtype(inputs: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The inputs with images and sounds, which processors make in float32, in a model's dtype."""
    return {
        name: value.to(dtype)
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for name, value in inputs.items()
    }
