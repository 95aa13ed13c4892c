"""`report_text` and `report_html`: one screen of a calibration's report, and tables of it."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from calipers.calibration.summaries import (
    KindSummary,
    shadow_cells,
    shadow_headings,
    summarize_coverage,
    summarize_left_alone,
    summarize_modules,
    summarize_shadows,
)

if TYPE_CHECKING:
    from calipers.calibration.report import CalibrationReport

__all__ = ["report_html", "report_text"]

_COLUMNS = 80
#: With headings, the worst modules and what was left alone, 24 lines at most.
_KINDS = 8
_WORST = 5
_LEFT_ALONE = 3
#: Of several observers of the same tensors, whose table takes the place of others.
_SHADOWS, _WORST_BESIDE_SHADOWS = 6, 3
_HEADINGS = ["modules", "count", "weight error (max)", "observer", "bits", "activations"]


def report_text(report: CalibrationReport) -> str:
    """At most 24 lines of at most 80 columns: the kinds, the worst modules, what was left alone."""
    lines = [_headline(report)]
    kinds = summarize_modules(report.modules)
    shadows = _shadow_lines(report)
    most, bad = _KINDS, _WORST
    if shadows:
        bad = _WORST_BESIDE_SHADOWS
        most = min(_KINDS, _KINDS + _WORST - bad - len(shadows))
    if kinds:
        rows = [_HEADINGS, *(_cells(each) for each in kinds[:most])]
        shared, rows = _without_shared(rows)
        lines += [_shorten(shared, _COLUMNS)] if shared else []
        lines += _table(rows)
        lines += _more(len(kinds) - most, "kinds of modules")
    lines += shadows
    worst = report.worst(bad)
    if len(report.modules) > 1 and worst:
        lines.append("largest weight errors")
        width = max(len(each.name) for each in worst)
        lines += [_shorten(f"  {m.name:<{width}}", 71) + f"  {m.weight_error:.4f}" for m in worst]
    lines += [_shorten(each, _COLUMNS) for each in summarize_coverage(report.coverage)]
    left_alone = summarize_left_alone(report.left_alone)
    if left_alone:
        lines.append("left unquantized")
        lines += [_shorten(f"  {each}", _COLUMNS) for each in left_alone[:_LEFT_ALONE]]
        lines += _more(len(left_alone) - _LEFT_ALONE, "kinds (see left_alone)")
    return "\n".join(lines)


def _shadow_lines(report: CalibrationReport) -> list[str]:
    """How several observers of the same tensors compare; empty without shadows."""
    summaries = summarize_shadows(report.modules)
    if not summaries:
        return []
    rows = [shadow_headings(report.modules), *shadow_cells(summaries[:_SHADOWS])]
    return [*_table(rows), *_more(len(summaries) - _SHADOWS, "observers (see shadows)")]


def report_html(report: CalibrationReport) -> str:
    """The same as tables, for notebooks; not cut to a screen, but for the worst modules."""
    parts = [f"<p>{escape(_headline(report))}</p>"]
    kinds = [_cells(each) for each in summarize_modules(report.modules)]
    parts.append(_html_table(_HEADINGS, kinds))
    shadows = shadow_cells(summarize_shadows(report.modules))
    parts.append(_html_table(shadow_headings(report.modules), shadows))
    worst = [[m.name, f"{m.weight_error:.4f}"] for m in report.worst(_WORST)]
    parts.append(_html_table(["largest weight errors", ""], worst))
    parts += [f"<p>{escape(each)}</p>" for each in summarize_coverage(report.coverage)]
    left_alone = [[each] for each in summarize_left_alone(report.left_alone)]
    parts.append(_html_table(["left unquantized"], left_alone))
    return "\n".join(part for part in parts if part)


def _headline(report: CalibrationReport) -> str:
    count = len(report.modules)
    told = (
        f"{count} module{'s' * (count != 1)} quantized, {report.quantized_share:.1%} of the "
        f"projection weights"
    )
    if report.batches:
        told += f"; {report.batches} batch{'es' * (report.batches != 1)}"
        if report.stability is not None and report.stability.reached:
            told += ", then settled"
    return f"{told}; {report.seconds:.1f} s"


def _cells(kind: KindSummary) -> list[str]:
    error = "-"
    if kind.mean_error is not None:
        error = f"{kind.mean_error:.4f} ({kind.max_error:.4f})"
    return [
        kind.name,
        str(kind.count),
        error,
        kind.observer or "-",
        "-" if kind.bits is None else str(kind.bits),
        kind.activations or "-",
    ]


def _without_shared(rows: list[list[str]]) -> tuple[str, list[list[str]]]:
    """Take out columns that say the same of every kind, for one line and more room for names."""
    shared, kept = [], []
    for heading, *cells in zip(*rows, strict=True):
        if heading in ("observer", "bits", "activations") and len(set(cells)) == 1:
            shared += [f"{heading} {cells[0]}"] if cells[0] != "-" else []
        else:
            kept.append([heading, *cells])
    return ", ".join(shared), [list(row) for row in zip(*kept, strict=True)]


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns side by side; the first one, names, gets what room the others leave."""
    rows = [[*row[:2], *(_shorten(cell, 18) for cell in row[2:])] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    room = _COLUMNS - sum(widths[1:]) - 2 * (len(widths) - 1)
    widths[0] = min(widths[0], room)
    return [
        "  ".join(
            _shorten(cell, width).ljust(width) for cell, width in zip(row, widths, strict=True)
        ).rstrip()
        for row in rows
    ]


def _more(count: int, what: str) -> list[str]:
    return [f"  ... and {count} other {what}"] if count > 0 else []


def _shorten(text: str, width: int) -> str:
    """Cut to a width in the middle: the end of a module's name tells the most."""
    if len(text) <= width:
        return text
    head = (width - 3) // 3
    return f"{text[:head]}...{text[len(text) - (width - 3 - head) :]}"


def _html_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    head = "".join(f"<th>{escape(each)}</th>" for each in headings)
    body = "\n".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"
