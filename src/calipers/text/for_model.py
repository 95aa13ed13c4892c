"""`batches_for_model`: data as `Calibration.run` takes it, whether it is text or batches."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
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

__all__ = ["batches_for_model", "fitting_length", "is_stream", "model_inputs", "read_samples"]


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
    if is_processor(tokenizer) and not is_stream(data):
        dtype = getattr(model, "dtype", torch.float32)
        found: list[Any] = read_samples(
            data,
            tokenizer_of(tokenizer),
            lambda: tokenizer,
            sequence_length=length,
            samples=samples,
            dtype=dtype,
        )
    else:
        found = list(read_batches(data, tokenizer, sequence_length=length, samples=samples))
    return model_inputs(found, model)


def is_stream(data: Any) -> bool:
    """Whether data is a file of text alone."""
    return isinstance(data, (str, Path)) and Path(data).suffix.lower() == ".txt"


def read_samples(
    data: Any,
    tokenizer: Any,
    processor: Callable[[], Any],
    *,
    sequence_length: int,
    samples: int | None,
    dtype: torch.dtype,
) -> list[Tensor | dict[str, Any]]:
    """Read samples of text, of which some have images, videos or sounds as well.

    Args:
        data: Samples as `read_batches` takes them. Files that samples of a file name are looked for
            from its folder on.
        tokenizer: The model's, for samples of text alone.
        processor: Gives the model's processor; asked for once, by the first sample that needs it.
        sequence_length: Most tokens of a sample of text; others are not cut.
        samples: Most samples; None takes all.
        dtype: What images and sounds are cast to.

    Returns:
        For each sample token ids of shape (1, tokens), or the arguments of the model for one with
        images, videos or sounds.

    Raises:
        CalipersError: As `read_batches`; a sample that the processor does not take, or a file that
            there is not.
    """
    data = Path(data) if isinstance(data, str) else data
    check_text(data, tokenizer, sequence_length, samples)
    name, found = find_samples(data, MEDIA)
    folder = data.parent if isinstance(data, Path) and data.is_file() else None
    loaded = functools.cache(processor)

    def encode(sample: Sample) -> Tensor | dict[str, Any] | None:
        if has_media(sample.value):
            return in_dtype(process(sample, loaded(), folder), dtype)
        ids = encode_sample(sample, tokenizer, sequence_length)
        return ids[None] if ids.numel() > 1 else None

    batches: list[Tensor | dict[str, Any]] = encode_samples(found, name, encode, samples)
    if not batches:
        raise CalipersError(f"{name}: holds no sample of at least two tokens")
    return batches


def model_inputs(
    batches: Iterable[Tensor | Mapping[str, Any]], model: torch.nn.Module
) -> list[dict[str, Any]]:
    """Batches as arguments of a model that shall fill no cache.

    Args:
        batches: Token ids, shape (batch, tokens) each, or arguments of the model.
        model: The model.
    """
    options = no_cache(model)
    return [
        {**(each if isinstance(each, Mapping) else {"input_ids": each}), **options}
        for each in batches
    ]


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
