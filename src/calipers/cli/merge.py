"""`calipers merge`: statistics files of several passes into one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.filesize import decimal

from calipers.cli import options
from calipers.cli.console import plain_errors, print_json, print_lines
from calipers.errors import CalipersError
from calipers.statistics_files import Statistics

__all__ = ["merge", "refuse_existing"]


def merge(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="Statistics files of one model.")
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where to write what all know.")],
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
    json: options.Json = False,
) -> None:
    """Put statistics of the same model, gathered on different data, together in one file.

    Extremes, counts and histograms come out as from one pass over all the data; sums are added in
    float64, in the order of the files.

    Examples:
      calipers merge code.safetensors chat.safetensors --out both.safetensors
    """
    with plain_errors():
        refuse_existing(out, force=force)
        first, *others = [Statistics.load(path) for path in files]
        merged = first.merge(*others)
        merged.save(out)
        result = {
            "files": [str(path) for path in files],
            "out": str(out),
            "bytes": out.stat().st_size,
            "batches": merged.manifest.batches,
            "modules": len(merged.modules),
        }
    if json:
        print_json(result)
        return
    print_lines(
        [
            ("statistics", f"{out}, {decimal(out.stat().st_size)}"),
            ("merged", f"{len(files)} files, {merged.manifest.batches:,} batches"),
            ("modules", str(len(merged.modules))),
        ]
    )


def refuse_existing(out: Path, *, force: bool) -> None:
    """Refuse a file that is there already, unless it may be replaced.

    Raises:
        CalipersError: Says so.
    """
    if out.exists() and not force:
        raise CalipersError(f"{out} exists: choose another place, or replace it with --force")
    if not out.resolve().parent.is_dir():
        raise CalipersError(f"{out}: there is no folder {out.resolve().parent}")
