"""`batches_for_model`: data as `Calibration.run` takes it, whether it is text or batches."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calipers.text.batches import read_batches
from calipers.text.datasets import dataset_columns, is_dataset
from calipers.text.samples import is_sample

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

    Sequences get no longer than the positions that the model's config names.

    Raises:
        CalipersError: As `read_batches`; text without a tokenizer.
    """
    text, data = _find_text(data)
    if not text:
        return data  # type: ignore[no-any-return]
    length = fitting_length(model, sequence_length)
    found = read_batches(data, tokenizer, sequence_length=length, samples=samples)
    return model_inputs(found, model)


def model_inputs(batches: Iterable[Tensor], model: torch.nn.Module) -> list[dict[str, Any]]:
    """Token ids, shape (batch, tokens) each, as arguments of a model that shall fill no cache."""
    caches = "use_cache" in inspect.signature(model.forward).parameters
    options = {"use_cache": False} if caches else {}
    return [{"input_ids": ids, **options} for ids in batches]


def fitting_length(model: Any, sequence_length: int) -> int:
    """The length of a sequence, at most the positions that the model's config names, if any."""
    config = getattr(model, "config", None)
    of_text = getattr(config, "get_text_config", None)  # of a model that sees or hears as well
    if callable(of_text):
        config = of_text()
    limit = getattr(config, "max_position_embeddings", None)
    return min(sequence_length, limit) if isinstance(limit, int) and limit else sequence_length


def _find_text(data: Any) -> tuple[bool, Any]:
    """Whether data is text, and the data; an iterator's first value is looked at and put back."""
    if isinstance(data, (str, Path)):
        return True, data
    if is_dataset(data):
        return "input_ids" not in dataset_columns(data), data
    if isinstance(data, Iterator):
        first = list(itertools.islice(data, 1))
        return _starts_with_text(first), itertools.chain(first, data)
    if not isinstance(data, Tensor) and callable(getattr(data, "tolist", None)):
        values = data.tolist()  # a column of pandas, an array
        if isinstance(values, list) and _starts_with_text(values):
            return True, values
    return isinstance(data, (list, tuple)) and _starts_with_text(data), data


def _starts_with_text(values: Any) -> bool:
    return len(values) > 0 and is_sample(values[0])
