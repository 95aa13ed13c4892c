"""`calipers evaluate`: how good checkpoints are, how large, and whether they load."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.filesize import decimal
from torch import Tensor

from calipers._words import first_line
from calipers.agreement import ReferenceLogits
from calipers.calibration.batches import Progress
from calipers.checkpoint.opening import load_model, load_tokenizer
from calipers.checkpoint.replace import recover
from calipers.cli.console import plain_errors, print_json, print_lines, print_table, show_progress
from calipers.cli.judging import (
    Measured,
    agreement_text,
    change_json,
    compare_measured,
    figure_json,
    figure_text,
    measure,
    measures_json,
    reference_for,
)
from calipers.cli.options import Device, Dtype, EvalFile, EvalSamples, Json, SequenceLength
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
    json: Json = False,
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
            except _TextError:
                raise
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


class _TextError(CalipersError):
    """The text cannot be read: an error of the whole command, not of one model."""


@dataclass
class _First:
    """The first model that was judged: what the others are compared with."""

    tokenizer: Any = None
    batches: list[Tensor] = field(default_factory=list)
    measured: Measured | None = None
    reference: ReferenceLogits | None = None


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
        return text.read(tokenizer, length, samples)
    except CalipersError as error:
        raise _TextError(str(error)) from None


def _judge(model: Any, read: TokenizedText, first: _First, progress: Progress) -> dict[str, Any]:
    batches = read.batches
    others = [ids.tolist() for ids in batches] != [ids.tolist() for ids in first.batches]
    see = None
    if first.measured is None:
        first.reference = reference_for(batches)
        see = first.reference.keep
    elif first.reference is not None and not others and isinstance(first.measured, Perplexity):
        see = first.reference.compare
    measured = measure(model, batches, progress, see)
    found: dict[str, Any] = {"sequences": read.sequences, "tokens": read.tokens}
    if isinstance(measured, Perplexity):
        found["perplexity"] = measured
    if first.measured is None:
        first.measured, first.batches = measured, batches
    elif others:
        found["note"] = "other tokens than the first one's: no difference"
    elif type(measured) is not type(first.measured):
        found["note"] = "one of the two has no language head: no difference"
    else:
        found["change"] = compare_measured(first.measured, measured)
        found["agreement"] = first.reference.agreement() if first.reference and see else None
        found["measures"] = measures_json(
            first.measured, measured, found["change"], found["agreement"]
        )
    return found


def _as_json(row: dict[str, Any]) -> dict[str, Any]:
    plain = ("path", "loads", "problem", "note", "bytes", "sequences", "tokens")
    return {
        **{name: row.get(name) for name in plain},
        "perplexity": figure_json(row.get("perplexity")),
        **change_json(row.get("change")),
        "measures": row.get("measures"),
    }


def print_evaluation(text: str, rows: list[dict[str, Any]]) -> None:
    """Print the table of an evaluation, and under it what went wrong."""
    changes = [row["change"] for row in rows if "change" in row]
    outputs = any(isinstance(each, OutputError) for each in changes)
    columns = ["model", "loads", "size", "perplexity", "output error" if outputs else "change"]
    cells = [
        [
            row["path"],
            "yes" if row["loads"] else "no",
            decimal(row["bytes"]) if row.get("bytes") else "-",
            *(figure_text(row[key]) if key in row else "-" for key in ("perplexity", "change")),
        ]
        for row in rows
    ]
    if not changes:
        columns, cells = columns[:-1], [row[:-1] for row in cells]
    if any(row.get("agreement") for row in rows):
        columns += ["KL divergence", "top-1"]
        told = (agreement_text(row.get("agreement")) or ("-", "-") for row in rows)
        cells = [[*row, *more] for row, more in zip(cells, told, strict=True)]
    print_table(f"Judged by {text}", columns, cells, right=columns[2:], fold=False)
    judged = [row for row in rows if "tokens" in row]
    lines = [("sequences", f"{row['sequences']}, {row['tokens']:,} tokens") for row in judged[:1]]
    lines += [("note", f"{row['path']}: {row['note']}") for row in rows if row.get("note")]
    lines += [
        ("problem", f"{row['path']}: {row['problem'].removeprefix(row['path'] + ': ')}")
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
