"""`calipers evaluate`: how good checkpoints are, how large, and whether they load."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.filesize import decimal
from torch import Tensor

from calipers._words import first_line
from calipers.checkpoint.replace import recover
from calipers.cli.console import plain_errors, print_json, print_lines, show_progress
from calipers.cli.judging import (
    Measured,
    change_json,
    change_text,
    compare_measured,
    measure,
    measured_json,
    plus_minus,
)
from calipers.cli.models import load_model, load_tokenizer
from calipers.cli.options import Device, Dtype, EvalFile, EvalSamples, SequenceLength
from calipers.cli.records import print_records
from calipers.cli.texts import Text, TokenizedText, heldout_text
from calipers.errors import CalipersError
from calipers.evaluation import OutputError, Perplexity
from calipers.text.for_model import fitting_length

__all__ = ["evaluate"]

#: Files of weights, the first kind that a folder has.
_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")


def evaluate(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="DIR...", help="Local transformers directories, quantized or not."),
    ],
    eval_file: EvalFile = None,
    samples: EvalSamples = 128,
    sequence_length: SequenceLength = 512,
    device: Device = None,
    dtype: Dtype = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Measure the perplexity of checkpoints, and compare them with the first one.

    Models without a language head are judged by how far their outputs are from the first one's.
    The exit status is 1 where one of them does not load or run.

    Examples:
      calipers evaluate ./model

      calipers evaluate ./model ./model-W4A16 ./model-NVFP4

      calipers evaluate ./model ./model-W4A16 --eval heldout.txt --samples 32 --json
    """
    with plain_errors(), show_progress() as progress:
        text = heldout_text(eval_file)
        rows: list[dict[str, Any]] = []
        first = _First()
        for done, folder in enumerate(folders):
            if len(folders) > 1:
                progress("models", done, len(folders))
            row: dict[str, Any] = {"path": str(folder), "loads": False, "problem": None}
            try:
                recover(folder.expanduser().resolve())
                model = load_model(folder, device=device, dtype=dtype)
                row |= {"loads": True, "bytes": bytes_on_disk(folder)}
                read = _read(folder, text, model, first, sequence_length, samples)
                row |= _judge(model, read, first, progress)
            except _TextError as error:
                raise CalipersError(str(error)) from None
            except Exception as error:  # whatever transformers and its plug-ins raise
                row["problem"] = first_line(error)
            rows.append(row)
            model = None  # before the next one is loaded
    if json:
        print_json({"eval": text.name, "models": [_as_json(row) for row in rows]})
    else:
        print_evaluation(text.name, rows)
    if any(row["problem"] for row in rows):
        raise typer.Exit(1)


class _TextError(Exception):
    """The text cannot be read: an error of the whole command, not of one model."""


class _First:
    """The first model that was judged: what the others are compared with."""

    def __init__(self) -> None:
        self.path: Path | None = None
        self.tokenizer: Any = None
        self.batches: list[Tensor] = []
        self.measured: Measured | None = None


def _read(
    folder: Path, text: Text, model: Any, first: _First, sequence_length: int, samples: int
) -> TokenizedText:
    """The text in the model's own tokens; in the first one's where it has no tokenizer."""
    try:
        tokenizer = load_tokenizer(folder)
    except Exception as error:
        if first.tokenizer is None:
            raise CalipersError(f"its tokenizer does not load: {first_line(error)}") from None
        tokenizer = first.tokenizer
    if first.tokenizer is None:
        first.tokenizer = tokenizer
    length = fitting_length(model, sequence_length)
    try:
        return text.read(tokenizer, sequence_length=length, samples=samples)
    except CalipersError as error:
        raise _TextError(str(error)) from None


def _judge(
    model: Any,
    read: TokenizedText,
    first: _First,
    progress: Callable[[str, int, int | None], object],
) -> dict[str, Any]:
    batches = read.batches
    measured = measure(model, batches, progress)
    found: dict[str, Any] = {"sequences": read.sequences, "tokens": read.tokens}
    if isinstance(measured, Perplexity):
        found["perplexity"] = measured
    if first.measured is None:
        first.measured, first.batches = measured, batches
    elif not _same_tokens(batches, first.batches):
        found["note"] = "other tokens than the first one's: no difference"
    elif type(measured) is not type(first.measured):
        found["note"] = "one of the two has no language head: no difference"
    else:
        found["change"] = compare_measured(first.measured, measured)
    return found


def _same_tokens(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a, b) for a, b in zip(one, other, strict=True)
    )


def _as_json(row: dict[str, Any]) -> dict[str, Any]:
    perplexity: Perplexity | None = row.get("perplexity")
    return {
        "path": row["path"],
        "loads": row["loads"],
        "problem": row["problem"],
        "note": row.get("note"),
        "bytes": row.get("bytes"),
        "sequences": row.get("sequences"),
        "tokens": row.get("tokens"),
        "perplexity": None
        if perplexity is None
        else measured_json(perplexity.value, perplexity.standard_error),
        **change_json(row.get("change")),
    }


def print_evaluation(text: str, rows: list[dict[str, Any]]) -> None:
    """Print the table of an evaluation, and under it what went wrong."""
    outputs = any(isinstance(row.get("change"), OutputError) for row in rows)
    heading = "output error" if outputs else "change"
    columns = ["model", "loads", "size", "perplexity", heading]
    judged = [row for row in rows if "tokens" in row]
    cells: list[tuple[str, ...]] = []
    for row in rows:
        perplexity: Perplexity | None = row.get("perplexity")
        change = row.get("change")
        figure = "-"
        if perplexity is not None:
            figure = plus_minus(perplexity.value, perplexity.standard_error, ".3f")
        cells.append(
            (
                row["path"],
                "yes" if row["loads"] else "no",
                decimal(row["bytes"]) if row.get("bytes") else "-",
                figure,
                change_text(change) if change else "-",
            )
        )
    if not any("change" in row for row in rows):
        columns, cells = columns[:-1], [row[:-1] for row in cells]
    print_records(f"Judged by {text}", columns, cells, right=columns[2:])
    lines = [("sequences", f"{row['sequences']}, {row['tokens']:,} tokens") for row in judged[:1]]
    lines += [("note", f"{row['path']}: {row['note']}") for row in rows if row.get("note")]
    lines += [
        ("problem", f"{row['path']}: {row['problem'].removeprefix(str(row['path']) + ': ')}")
        for row in rows
        if row["problem"]
    ]
    print_lines(lines)


def bytes_on_disk(folder: Path) -> int:
    """Bytes of the files of weights in a transformers directory."""
    for pattern in _WEIGHTS:
        sizes = [file.stat().st_size for file in folder.glob(pattern)]
        if sizes:
            return sum(sizes)
    return 0
