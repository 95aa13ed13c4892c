"""What all commands share: output, progress, errors."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from time import monotonic
from typing import Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.padding import Padding
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from calipers.calibration.batches import Progress as ProgressFunction

__all__ = [
    "plain_errors",
    "print_json",
    "print_lines",
    "print_table",
    "show_progress",
]

#: Wide enough for any table where there is no terminal to fit.
_PIPE_WIDTH = 200
#: More than any table needs.
_ANY_WIDTH = 10_000
_SECONDS_BETWEEN_LINES = 30


def _console(*, stderr: bool = False) -> Console:
    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    return Console(stderr=stderr, highlight=False, width=None if terminal else _PIPE_WIDTH)


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    right: Sequence[str] = (),
    fold: bool = True,
) -> None:
    """Print a table: framed in a terminal, plain columns elsewhere.

    Where a terminal is too narrow, each row is a paragraph instead: its first cell, and below it
    the others that say something (no "-"), after their headings. With `fold` cells may be broken
    between words first; figures with their standard errors could not be read so. The columns of
    numbers, named in `right`, are aligned to the right.
    """
    console = _console()
    table = Table(
        title=title, title_justify="left", box=box.ROUNDED if console.is_terminal else None
    )
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    rows = [list(row) for row in rows]
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    widths = Measurement.get(console, console.options.update_width(_ANY_WIDTH), table)
    if not console.is_terminal or console.width >= (widths.minimum if fold else widths.maximum):
        console.print(table)
        return
    console.print(Text(title, style="italic"))
    for row in rows:
        console.print(Text(row[0], style="bold", overflow="fold"))
        pairs = zip(columns[1:], row[1:], strict=True)
        cells = [f"{heading}: {cell}" for heading, cell in pairs if cell and cell != "-"]
        for line in _filled(cells, console.width - 2):
            text = Text(line, overflow="fold")
            console.print(Padding(text, (0, 0, 0, 2), expand=False))


def _filled(cells: Iterable[str], width: int) -> list[str]:
    """As many cells a line as fit, none broken but one that is too long for any line."""
    lines: list[str] = []
    for cell in cells:
        if lines and len(lines[-1]) + len(cell) + 2 <= width:
            lines[-1] += f", {cell}"
        else:
            lines.append(cell)
    return lines


def print_lines(pairs: Iterable[tuple[str, str]]) -> None:
    """Print names and values, one pair a line, folded where a terminal is too narrow."""
    console = _console()
    if not console.is_terminal:
        pairs = list(pairs)
        width = max((len(name) for name, _ in pairs), default=0)
        for name, value in pairs:
            sys.stdout.write(f"{name:<{width}}  {value}\n")
        return
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in pairs:
        table.add_row(name, escape(value))
    console.print(table)


def print_json(data: Any) -> None:
    """Print one JSON document and nothing else to standard output."""
    sys.stdout.write(json.dumps(data, indent=2) + "\n")


@contextmanager
def show_progress() -> Iterator[ProgressFunction]:
    """Progress on standard error: bars in a terminal, elsewhere a line now and then."""
    console = _console(stderr=True)
    if console.is_terminal:
        with _bars(console) as bars:
            yield bars
    else:
        yield _lines(console)


@contextmanager
def _bars(console: Console) -> Iterator[ProgressFunction]:
    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(elapsed_when_finished=False),
        console=console,
        transient=True,
    )
    tasks: dict[str, TaskID] = {}

    def advance(stage: str, done: int, total: int | None) -> None:
        if stage not in tasks:
            tasks[stage] = bars.add_task(stage, total=total)
        elif done < bars.tasks[tasks[stage]].completed:
            bars.reset(tasks[stage], total=total)  # begun again: no second bar of that name
        bars.update(tasks[stage], completed=done, total=total)

    with bars:
        yield advance


def _lines(console: Console) -> ProgressFunction:
    """Print a line every half a minute: a log shows that work goes on, but not each step."""
    started = told = monotonic()

    def advance(stage: str, done: int, total: int | None) -> None:
        nonlocal told
        now = monotonic()
        if now - told >= _SECONDS_BETWEEN_LINES:
            told = now
            of = "" if total is None else f" of {total}"
            passed = timedelta(seconds=int(now - started))
            console.print(f"{stage}: {done}{of} after {passed}", markup=False, soft_wrap=True)

    return advance


@contextmanager
def plain_errors() -> Iterator[None]:
    """Turn an error about the input into one line on standard error and exit status 1."""
    try:
        yield
    except (ValueError, OSError) as error:
        _console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(1) from None
