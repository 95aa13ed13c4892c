"""`render_page`: one or several reports as one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files

from calipers.errors import CalipersError
from calipers.reports import pictures, sections
from calipers.reports.compare import Comparison, Row, compare_reports
from calipers.reports.html import Cell, Column, escape, figures, percent, plain, section, table
from calipers.reports.plot import new_figure
from calipers.reports.records import Told, choose_measure, error_of, number
from calipers.reports.summary import model_measures, render_head, title_of

__all__ = ["render_page"]

#: Of a page of its own, or one that is opened from a folder: it loads nothing and sends nothing.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def render_page(reports: Mapping[str, Told]) -> str:
    """One or several reports as a page: a single HTML file, without a network.

    The tables are plain ones without JavaScript, and can be sorted with it. The first report is
    shown in full; others are compared with it. A part of which the report has nothing is left
    out, and the head of the page says what is missing.

    Args:
        reports: By label, the name of a folder as a rule, what `read_report` gives.

    Returns:
        The text of an HTML file.

    Raises:
        CalipersError: There is no report, or matplotlib is not installed.
    """
    if not reports:
        raise CalipersError("reports: expected one or more, got none")
    new_figure(1, 1)  # says at once where there is no matplotlib
    (label, first), *others = reports.items()
    drawn = {module["name"] for module in pictures.drawn_modules(first)}
    found = compare_reports(list(reports.values())) if others else None
    parts = {
        "compared": ("Compared", _compared(reports, found) if found else ""),
        "heat": ("Heat map", sections.heat_map(first)),
        "depth": ("Depth", pictures.depth(reports)),
        "modules": ("Modules", sections.module_table(first, drawn.__contains__)),
        "observers": ("Observers", sections.observers(first)),
        "tensors": ("Histograms", pictures.tensors(first)),
        "experts": ("Experts", pictures.coverage(first)),
        "left": ("Left out", sections.left_out(first)),
    }
    links = "".join(
        f'<li><a href="#{k}">{name}</a></li>' for k, (name, text) in parts.items() if text
    )
    body = "".join(text for _, text in parts.values())
    here = files("calipers.reports")
    style, script = (here.joinpath(name).read_text("utf-8") for name in ("page.css", "page.js"))
    title = escape(f"{title_of(first)}: calipers report")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title>"
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f'<link rel="icon" href="data:,">\n<style>\n{style}</style></head>\n<body>\n'
        f"{render_head(first, label, alone=not others)}"
        f'<nav aria-label="Sections"><ul>{links}</ul></nav>\n<main>\n{body}</main>\n'
        "<footer>Written by <code>calipers report</code>. “Reading a report” in calipers' "
        "documentation explains every number, and what to do about it.</footer>\n"
        f"<script>\n{script}</script>\n</body></html>\n"
    )


def _compared(reports: Mapping[str, Told], found: Comparison) -> str:
    """The section that puts reports side by side: their models, kinds of modules, and modules."""
    labels, count = list(reports), len(found.modules)
    only = [f"{n:,} of {label}" for label, n in zip(labels, found.only, strict=True) if n]
    rest = f" Not in all of them: {', '.join(only)}." if only else ""
    lead = (
        f"{count:,} modules in common, by {escape(found.measure.name)}: smaller is better, ✓ marks "
        f"the smallest.{escape(rest)}"
    )
    parts = [table(_OVERVIEW, [_overview(*pair) for pair in reports.items()], "the reports")]
    if count:
        heads = [Column("kind of module", False), Column("modules"), *map(Column, labels)]
        kinds = [
            [plain(row.name), figures(float(row.count), ",.0f"), *_errors(row)]
            for row in found.kinds
        ]
        parts.append(table(heads, kinds, "medians by kind of module"))
        heads = [Column("module", False), *map(Column, labels)]
        heads += [Column(f"change to {label}") for label in labels[1:]]
        shown = sorted(found.modules, key=lambda row: max(row.errors), reverse=True)
        shown = [row for row in found.modules if row in set(shown[: sections.MOST_ROWS])]
        rows = [_module_row(row) for row in shown]
        parts.append(table(heads, rows, "by module", name="compared-modules"))
    return section("compared", "Compared", lead, *parts)


_OVERVIEW = (
    Column("report", False),
    Column("scheme", False),
    Column("observer", False),
    Column("perplexity"),
    Column("change"),
    Column("KL divergence"),
    Column("top-1 agreement"),
    Column("median error"),
    Column("quantized"),
)


def _overview(label: str, report: Told) -> list[Cell]:
    judged = {key: number(value) for key, value in model_measures(report).items()}
    measure = choose_measure([report])
    errors = sorted(e for m in report["modules"] if (e := error_of(m, measure)) is not None)
    change, spread = judged.get("relative"), judged.get("relative_error")
    shown = f" ± {spread:.1%}" if spread is not None else ""
    return [
        plain(label),
        plain(report.get("scheme") or "-"),
        plain(report.get("observer") or "-"),
        figures(judged.get("after"), ".3f"),
        Cell(f"{change:+.1%}{shown}", change) if change is not None else figures(None, ""),
        figures(judged.get("kl"), ".4f"),
        percent(judged.get("top1")),
        percent(errors[len(errors) // 2] if errors else None),
        percent(number(report.get("quantized_share"))),
    ]


def _errors(row: Row) -> list[Cell]:
    cells = [percent(error) for error in row.errors]
    if row.best is not None:
        best = cells[row.best]
        cells[row.best] = Cell(best.html, best.value, classes="best")
    return cells


def _module_row(row: Row) -> list[Cell]:
    changes: Sequence[float | None] = [row.change(i) for i in range(1, len(row.errors))]
    return [plain(row.name), *_errors(row), *(figures(c, "+.0f", 100, "%") for c in changes)]
