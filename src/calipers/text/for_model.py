"""`batches_for_model`: data as `Calibration.run` takes it, whether it is text or batches."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calipers.calibration.batches import no_cache
from calipers.errors import CalipersError
from calipers.text.batches import check_text, encode_samples, find_samples, read_batches
from calipers.text.datasets import dataset_columns, is_dataset
from calipers.text.processors import (
    MEDIA,
    has_media,
    in_dtype,
    is_processor,
    process,
    tokenizer_of,
)
from calipers.text.samples import Sample, encode_sample, is_sample

__all__ = ["batches_for_model", "fitting_length", "model_inputs"]


def batches_for_model(
    data: Any,
    model: torch.nn.Module,
    tokenizer: Any,
    *,
    samples: int = 128,
    sequence_length: int = 512,
) -> Iterable[Any]:
    """Arguments of a model for text, as `read_batches` takes it; other data comes back as it is.

    Sequences get no longer than the positions that the model's config names. Samples with images,
    videos or sounds go through the processor, where there is one in place of the tokenizer.

    Raises:
        CalipersError: As `read_batches`; text without a tokenizer; a sample that the processor
            does not take.
    """
    text, data = _find_text(data, media=is_processor(tokenizer))
    if not text:
        return data  # type: ignore[no-any-return]
    length = fitting_length(model, sequence_length)
    if is_processor(tokenizer) and not _is_stream(data):
        return _processed(data, model, tokenizer, length, samples)
    found = read_batches(data, tokenizer, sequence_length=length, samples=samples)
    return model_inputs(found, model)


def _is_stream(data: Any) -> bool:
    """Whether data is a file of text alone."""
    return isinstance(data, (str, Path)) and Path(data).suffix.lower() == ".txt"


def _processed(
    data: Any, model: torch.nn.Module, processor: Any, length: int, samples: int
) -> list[dict[str, Any]]:
    """Batches of one sample each; those of text alone go through the processor's tokenizer."""
    data = Path(data) if isinstance(data, str) else data
    tokenizer = tokenizer_of(processor)
    check_text(data, tokenizer, length, samples)
    name, found = find_samples(data, MEDIA)
    options, dtype = no_cache(model), getattr(model, "dtype", torch.float32)

    def encode(sample: Sample) -> dict[str, Any] | None:
        if has_media(sample.value):
            return {**in_dtype(process(sample, processor), dtype), **options}
        ids = encode_sample(sample, tokenizer, length)
        return {"input_ids": ids[None], **options} if ids.numel() > 1 else None

    batches = encode_samples(found, name, encode, samples)
    if not batches:
        raise CalipersError(f"{name}: holds no sample of at least two tokens")
    return batches


def model_inputs(batches: Iterable[Tensor], model: torch.nn.Module) -> list[dict[str, Any]]:
    """Token ids, shape (batch, tokens) each, as arguments of a model that shall fill no cache."""
    return [{"input_ids": ids, **no_cache(model)} for ids in batches]


def fitting_length(model: Any, sequence_length: int) -> int:
    """The length of a sequence, at most the positions that the model's config names, if any."""
    config = getattr(model, "config", None)
    of_text = getattr(config, "get_text_config", None)  # of a model that sees or hears as well
    if callable(of_text):
        config = of_text()
    limit = getattr(config, "max_position_embeddings", None)
    return min(sequence_length, limit) if isinstance(limit, int) and limit else sequence_length


def _find_text(data: Any, *, media: bool) -> tuple[bool, Any]:
    """Whether data is text, and the data; an iterator's first value is looked at and put back.

    Args:
        data: As `batches_for_model` takes it.
        media: Whether samples may have images or sounds, with text or without.
    """
    if isinstance(data, (str, Path)):
        return True, data
    if is_dataset(data):
        return "input_ids" not in dataset_columns(data), data
    if isinstance(data, Iterator):
        first = list(itertools.islice(data, 1))
        return _starts_with_text(first, media), itertools.chain(first, data)
    if not isinstance(data, Tensor) and callable(getattr(data, "tolist", None)):
        values = data.tolist()  # a column of pandas, an array
        if isinstance(values, list) and _starts_with_text(values, media):
            return True, values
    return isinstance(data, (list, tuple)) and _starts_with_text(data, media), data


def _starts_with_text(values: Any, media: bool) -> bool:
    return len(values) > 0 and (is_sample(values[0]) or (media and has_media(values[0])))
