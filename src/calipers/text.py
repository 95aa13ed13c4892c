"""Token batches from text files, for calibration and evaluation."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calipers.errors import CalipersError

__all__ = ["read_batches"]


def read_batches(
    path: str | Path,
    tokenizer: Any,
    *,
    sequence_length: int,
    samples: int | None = None,
    batch_size: int = 8,
) -> list[Tensor]:
    """Read a file into batches of token ids.

    A `.txt` file is one stream of tokens, cut into sequences of `sequence_length`; where fewer
    samples are wanted than it holds, they are spread evenly over it. A `.jsonl` file holds one
    sample in each line, under "text", or under "messages" for the tokenizer's chat template; each
    is cut to `sequence_length` and is a batch of its own.

    Args:
        path: The file, UTF-8.
        tokenizer: A transformers tokenizer.
        sequence_length: Most tokens of a sequence, at least 2.
        samples: Most sequences; None takes all.
        batch_size: Sequences of a batch, for text files.

    Returns:
        Tensors of token ids, int64, shape (batch, tokens).

    Raises:
        CalipersError: No such file, another suffix, a line that is no sample, or too little text.
    """
    path = Path(path)
    if not path.is_file():
        raise CalipersError(f"{path}: no such file")
    if sequence_length < 2:
        raise CalipersError(f"sequence length: expected at least 2, got {sequence_length}")
    if path.suffix == ".jsonl":
        batches = [ids[None, :sequence_length] for ids in _read_lines(path, tokenizer, samples)]
        batches = [ids for ids in batches if ids.shape[1] > 1]
    elif path.suffix == ".txt":
        batches = _cut_stream(_read_text(path, tokenizer), sequence_length, samples, batch_size)
    else:
        raise CalipersError(f"{path}: expected a .txt or .jsonl file")
    if not batches:
        raise CalipersError(f"{path}: holds no sequence of at least two tokens")
    return batches


def _read_text(path: Path, tokenizer: Any) -> Tensor:
    text = path.read_text(encoding="utf-8")
    # The stream is cut afterwards, so its length says nothing: no warning about the model's limit.
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.long)


def _cut_stream(ids: Tensor, length: int, samples: int | None, batch_size: int) -> list[Tensor]:
    if ids.numel() < length:
        return [ids[None]] if ids.numel() > 1 else []
    sequences = ids[: ids.numel() // length * length].view(-1, length)
    if samples is not None and samples < len(sequences):
        picked = torch.linspace(0, len(sequences) - 1, samples).round().long()
        sequences = sequences[picked]
    return list(sequences.split(batch_size))


def _read_lines(path: Path, tokenizer: Any, samples: int | None) -> Iterator[Tensor]:
    with path.open(encoding="utf-8") as file:
        number_of_samples = 0
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            if samples is not None and number_of_samples >= samples:
                return
            number_of_samples += 1
            text = _sample_text(line, f"{path}, line {number}", tokenizer)
            yield torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.long)


def _sample_text(line: str, where: str, tokenizer: Any) -> str:
    try:
        sample = json.loads(line)
    except json.JSONDecodeError as error:
        raise CalipersError(f"{where}: not JSON: {error}") from None
    if isinstance(sample, dict) and isinstance(sample.get("text"), str):
        return str(sample["text"])
    if isinstance(sample, dict) and isinstance(sample.get("messages"), list):
        if not getattr(tokenizer, "chat_template", None):
            raise CalipersError(f"{where}: has 'messages', but the tokenizer has no chat template")
        return str(tokenizer.apply_chat_template(sample["messages"], tokenize=False))
    raise CalipersError(f"{where}: expected an object with 'text' or 'messages'")
