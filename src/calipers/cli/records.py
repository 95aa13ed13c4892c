"""`print_records`: a table, or where that does not fit the terminal, one block for each row."""

from __future__ import annotations

from collections.abc import Sequence

from calipers.cli.console import print_lines, print_table, terminal_width

__all__ = ["print_records"]


def print_records(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    right: Sequence[str] = (),
) -> None:
    """Print rows as a table where all of it fits beside each other, else one below the other.

    A figure and its standard error that are broken over three lines cannot be read.

    Args:
        title: Line above it.
        columns: Headings.
        rows: Cells, as many as headings; in blocks the first one is the heading of the block, and
            cells that are "-" or empty are left out.
        right: Headings of the columns of numbers, which are aligned to the right.
    """
    width = terminal_width()
    needed = 1 + sum(3 + max(map(len, column)) for column in zip(columns, *rows, strict=True))
    if width is None or needed <= width:
        print_table(title, columns, rows, right=right)
        return
    lines: list[tuple[str, str]] = []
    for row in rows:
        lines.append((columns[0], row[0]))
        lines += [
            (f"  {column}", cell)
            for column, cell in zip(columns[1:], row[1:], strict=True)
            if cell not in ("", "-")
        ]
    print_lines([(title, "")])
    print_lines(lines)
