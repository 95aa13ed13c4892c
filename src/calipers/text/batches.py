"""`read_batches`: token batches from files, datasets and Python values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from loguru import logger
from torch import Tensor

from calipers.errors import CalipersError
from calipers.text.datasets import is_dataset, iterate_dataset
from calipers.text.files import decode, open_samples
from calipers.text.processors import has_media, tokenizer_of
from calipers.text.samples import Sample, encode_sample, encode_text

__all__ = ["check_text", "encode_samples", "find_samples", "read_batches"]

Encoded = TypeVar("Encoded")


def read_batches(
    path: str | Path | Iterable[Any],
    tokenizer: Any,
    *,
    sequence_length: int,
    samples: int | None = None,
    batch_size: int = 8,
) -> list[Tensor]:
    """Read text into batches of token ids.

    A `.txt` file is one stream of tokens, cut into sequences of `sequence_length`; where fewer
    samples are wanted than it holds, they are spread evenly over it.

    All else holds samples: a `.jsonl` file one in each line, a `.json` file a list of them (or
    `{"data": [...]}`), a `.csv` or `.parquet` file one in each row, and so does a folder that
    `datasets` saved by `save_to_disk` (its split "train", or its only one; "folder:test" is the
    split "test"). In Python: a list or any iterable of samples, or a dataset of `datasets`. The
    first `samples` of them are taken, and no more are read. Each is cut to `sequence_length` and
    is a batch of its own. Those that are empty, or shorter than two tokens, are left out, and a
    warning says how many.

    A sample is a string or has fields: "text"; or "messages", for the tokenizer's
    chat template; or a pair such as "prompt" and "response" ("prompt" and "completion",
    "instruction" with "input" and "output", "question" and "answer"), which goes through the chat
    template where there is one and is joined by a line break where there is none.

    Args:
        path: The file, UTF-8, the folder, or the samples themselves.
        tokenizer: A transformers tokenizer, or a processor that holds one.
        sequence_length: Most tokens of a sequence, at least 2.
        samples: Most sequences; None takes all.
        batch_size: Sequences of a batch, for `.txt` files.

    Returns:
        Tensors of token ids, int64, shape (batch, tokens).

    Raises:
        CalipersError: No such file, another kind of file, bytes that are not UTF-8, a line or row
            that is no sample, too little text, or a package missing that the file needs
            (`pip install 'calipers[data]'`).

    Example:
        >>> from transformers import AutoTokenizer
        >>> from calipers.demo import MODEL_PATH
        >>> tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH)
        >>> samples = ["Once upon a time", {"prompt": "Who sat?", "response": "A cat."}]
        >>> read_batches(samples, tokenizer, sequence_length=3)
        [tensor([[ 0, 49, 80]]), tensor([[ 0, 57, 539]])]
    """
    if isinstance(path, str):
        path = Path(path)
    tokenizer = tokenizer_of(tokenizer)
    check_text(path, tokenizer, sequence_length, samples)
    if isinstance(path, Path) and path.suffix.lower() == ".txt" and path.is_file():
        text = decode(path.read_bytes(), path).replace("\r\n", "\n").replace("\r", "\n")
        batches = _cut_stream(encode_text(text, tokenizer), sequence_length, samples, batch_size)
        name = str(path)
    else:
        name, found = find_samples(path)
        told: list[str] = []

        def encode(sample: Sample) -> Tensor | None:
            if has_media(sample.value) and not told:
                told.append(sample.where)
                logger.warning(
                    "{}: of a sample with images, videos or sounds its text alone is used; to "
                    "calibrate with them pass the model's processor as tokenizer= (the command "
                    "takes it from the model's folder)",
                    sample.where,
                )
            ids = encode_sample(sample, tokenizer, sequence_length)
            return ids[None] if ids.numel() > 1 else None

        batches = encode_samples(found, name, encode, samples)
    if not batches:
        raise CalipersError(f"{name}: holds no sequence of at least two tokens")
    return batches


def check_text(path: object, tokenizer: Any, sequence_length: int, samples: int | None) -> None:
    """Refuse arguments of `read_batches` before anything is read.

    Raises:
        CalipersError: Names the argument, what was expected and what came.
    """
    if tokenizer is None:
        raise CalipersError("text needs the model's tokenizer, got None: pass tokenizer=")
    if sequence_length < 2:
        raise CalipersError(f"sequence length: expected at least 2, got {sequence_length}")
    if samples is not None and samples < 1:
        raise CalipersError(f"samples: expected at least 1, got {samples}")
    one = isinstance(path, (bytes, Tensor)) or (isinstance(path, Mapping) and not is_dataset(path))
    if one or not isinstance(path, (Path, Iterable)):
        raise CalipersError(
            "data: expected a path, a list of strings or of objects, or a dataset, "
            f"got {type(path).__name__}"
        )


def find_samples(
    path: Path | Iterable[Any], media: Sequence[str] = ()
) -> tuple[str, Iterator[Sample]]:
    """What the data is called in errors, and its samples.

    Args:
        path: A file of samples, a saved folder, a dataset, or the samples themselves.
        media: Columns of a dataset, saved or not, that are kept beside those of text.
    """
    if isinstance(path, Path):
        return str(path), open_samples(path, media)
    if is_dataset(path):
        return "dataset", iterate_dataset(path, "dataset", media=media)
    return "data", (Sample(value, f"data[{place}]") for place, value in enumerate(path))


def encode_samples(
    found: Iterable[Sample],
    name: str,
    encode: Callable[[Sample], Encoded | None],
    samples: int | None,
) -> list[Encoded]:
    """The first samples, encoded; those that `encode` gives None for are left out and counted."""
    batches: list[Encoded] = []
    left_out = 0
    for sample in found:
        encoded = encode(sample)
        if encoded is None:
            left_out += 1
            continue
        batches.append(encoded)
        if len(batches) == samples:
            break
    if left_out:
        logger.warning(
            "{}: left out {} of {} samples: empty, or shorter than two tokens",
            name,
            left_out,
            left_out + len(batches),
        )
    return batches


def _cut_stream(ids: Tensor, length: int, samples: int | None, batch_size: int) -> list[Tensor]:
    if ids.numel() < length:
        return [ids[None]] if ids.numel() > 1 else []
    sequences = ids[: ids.numel() // length * length].view(-1, length)
    if samples is not None and samples < len(sequences):
        picked = torch.linspace(0, len(sequences) - 1, samples).round().long()
        sequences = sequences[picked]
    return list(sequences.split(batch_size))
