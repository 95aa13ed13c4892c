"""`calipers convert`: statistics files from and to the imatrix of llama.cpp."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.filesize import decimal

from calipers.checkpoint.opening import load_model
from calipers.cli import options
from calipers.cli.console import plain_errors, print_json, print_lines
from calipers.cli.merge import refuse_existing
from calipers.errors import CalipersError
from calipers.observing import statistics_from_imatrix
from calipers.statistics_files import Statistics, write_imatrix

__all__ = ["convert"]

_GGUF = ".gguf"


def convert(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="An imatrix (.gguf) or a statistics file.")
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where to write the other kind.")],
    model: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The model that an imatrix is of, which it does not say."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
    json: options.Json = False,
) -> None:
    """Turn an imatrix of llama.cpp into a statistics file, or the other way round.

    An imatrix holds the sums of squares of inputs alone, as float32: what `optimal` and
    `imatrix_mse` need for weights, and nothing about activations.

    Examples:
      calipers convert imatrix.gguf --model ./Llama-3-8B --out stats.safetensors

      calipers convert stats.safetensors --out imatrix.gguf
    """
    with plain_errors():
        refuse_existing(out, force=force)
        if (file.suffix == _GGUF) == (out.suffix == _GGUF):
            raise CalipersError(
                f"one of {file} and {out} must be an imatrix, by its ending {_GGUF}, and one not"
            )
        if file.suffix == _GGUF:
            if model is None:
                raise CalipersError("--model: an imatrix does not say which model it is of")
            found = statistics_from_imatrix(file, load_model(model, device="cpu", dtype="auto"))
            found.save(out)
        else:
            if model is not None:
                raise CalipersError("--model: a statistics file says itself which model it is of")
            found = Statistics.load(file)
            write_imatrix(found, out)
        with_tokens = sum(each.tokens > 0 for each in found.modules.values())
        result: dict[str, Any] = {
            "file": str(file),
            "out": str(out),
            "bytes": out.stat().st_size,
            "modules": len(found.modules),
            "with_tokens": with_tokens,
        }
    if json:
        print_json(result)
        return
    print_lines(
        [
            ("written", f"{out}, {decimal(result['bytes'])}"),
            ("modules", f"{len(found.modules)}, {with_tokens} of them with tokens"),
        ]
    )
