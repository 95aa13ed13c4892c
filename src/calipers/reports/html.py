"""Pieces of HTML: text, numbers, tables and sections."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

__all__ = [
    "Cell",
    "Column",
    "escape",
    "figures",
    "in_percent",
    "missing",
    "percent",
    "plain",
    "section",
    "table",
]


@dataclass(frozen=True)
class Column:
    """A column of a table: its head, whether it holds numbers, and what they are."""

    name: str
    numeric: bool = True
    hint: str = ""


@dataclass(frozen=True)
class Cell:
    """A cell: its text or HTML, and what it is sorted by (None: last, whichever way)."""

    html: str
    value: float | None = None
    style: str = ""
    classes: str = ""


def plain(text: object) -> Cell:
    """A cell of text."""
    return Cell(escape(str(text)))


def missing() -> Cell:
    """A cell of a number that is not known."""
    return Cell('<span class="none" title="not measured">-</span>')


def figures(value: float | None, shown: str, factor: float = 1.0, unit: str = "") -> Cell:
    """A cell of a number, `shown` being a format such as ".1f"."""
    if value is None:
        return missing()
    return Cell(f"{value * factor:{shown}}{unit}", value)


def percent(value: float | None) -> Cell:
    """A cell of a share in percent, to three figures."""
    return missing() if value is None else Cell(f"{in_percent(value)}%", value)


def in_percent(value: float) -> str:
    """A share in percent without its sign, to three figures and without an exponent."""
    found = 100 * value
    if found == 0:
        return "0"
    if abs(found) < 0.001:
        return "<0.001" if found > 0 else "0"
    digits = 0 if abs(found) >= 100 else 1 if abs(found) >= 10 else 2 if abs(found) >= 1 else 3
    return f"{found:.{digits}f}"


def table(
    columns: Sequence[Column],
    rows: Iterable[Sequence[Cell]],
    caption: str,
    *,
    name: str = "",
    sortable: bool = True,
) -> str:
    """A table in a box of its own that scrolls; the first cell of a row is its head.

    Args:
        columns: One for each cell of a row.
        rows: Cells, in the order that is shown without JavaScript.
        caption: What the table shows, HTML.
        name: Its id.
        sortable: Whether a click on a head sorts it.
    """
    heads = "".join(
        f'<th scope="col"{_classes("n" if each.numeric else "")}'
        f"{_attribute('title', each.hint)}>{_breakable(each.name)}</th>"
        for each in columns
    )
    body = "".join(
        f"<tr>{''.join(map(_cell, row, columns, (True, *[False] * (len(columns) - 1))))}</tr>\n"
        for row in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(_text(caption))}">'
        f"<table{_attribute('id', name)}{_classes('sortable' if sortable else '')}>"
        f"<caption>{caption}</caption><thead><tr>{heads}</tr></thead>\n<tbody>{body}</tbody>"
        "</table></div>\n"
    )


def _cell(cell: Cell, column: Column, first: bool) -> str:
    classes = " ".join(filter(None, ("n" if column.numeric else "", cell.classes)))
    value = ""
    if column.numeric:
        value = f' data-v="{"" if cell.value is None else f"{cell.value:.6g}"}"'
    rest = f"{_classes(classes)}{_attribute('style', cell.style)}{value}>{cell.html}"
    return f'<th scope="row"{rest}</th>' if first else f"<td{rest}</td>"


def _breakable(name: str) -> str:
    """A name that may go on in another line after each point."""
    return escape(name).replace(".", ".<wbr>")


def _classes(names: str) -> str:
    return _attribute("class", names)


def _attribute(name: str, value: str) -> str:
    return f' {name}="{escape(value)}"' if value else ""


def _text(html: str) -> str:
    """HTML without its tags."""
    return re.sub(r"<[^>]*>", "", html)


def section(name: str, title: str, lead: str, *parts: str) -> str:
    """A section with a heading and a sentence or two, HTML; nothing without parts."""
    if not any(parts):
        return ""
    return (
        f'<section id="{name}" aria-labelledby="{name}-title"><h2 id="{name}-title">'
        f'{escape(title)}</h2>\n<p class="lead">{lead}</p>\n{"".join(parts)}</section>\n'
    )
