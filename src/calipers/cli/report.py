"""`calipers report`: the page of a calibration, and of others beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.filesize import decimal

from calipers._files import replacing
from calipers.cli import options
from calipers.cli.console import plain_errors, print_json, print_lines
from calipers.cli.merge import refuse_existing
from calipers.errors import CalipersError
from calipers.reports import read_report
from calipers.reports.compare import Comparison, compare_reports
from calipers.reports.page import render_page
from calipers.reports.records import Told
from calipers.reports.summary import find_missing, verdict_of

__all__ = ["report"]


def report(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR",
            help="What `calipers calibrate --out` wrote, or its calipers-report.json.",
        ),
    ],
    compare: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", help="Another one to put beside the first; may be repeated."),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where to write the page.")] = Path(
        "report.html"
    ),
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
    json: options.Json = False,
) -> None:
    """Write a page about a calibration: one HTML file that needs no network.

    It has the verdict, a table of modules to sort, where the error is, histograms with the chosen
    ranges, and what was left out and why.

    Examples:
      calipers report ./model-W4A16

      calipers report ./model-W4A16 --compare ./model-NVFP4 --out both.html
    """
    with plain_errors():
        refuse_existing(out, force=force)
        reports = _read([folder, *(compare or ())])
        page = render_page(reports)
        with replacing(out) as beside:
            beside.write_text(page, encoding="utf-8")
        result = _result(out, reports)
    if json:
        print_json(result)
        return
    rows = [("page", f"{out}, {decimal(result['bytes'])}")]
    for each in result["reports"]:
        rows.append(("report", f"{each['name']}, {each['modules']:,} modules"))
        rows += [("verdict", each["verdict"])] if each["verdict"] else []
        rows += [("missing", text) for text in each["missing"]]
    if (found := result["compared"]) is not None:
        wins = [f"{name} {count}" for name, count in found["best"].items()]
        rows.append(("better", f"by {found['measure']}, modules: {', '.join(wins)}"))
    print_lines(rows)


def _read(folders: list[Path]) -> dict[str, Told]:
    """Reports by the name of their folder; by the whole path where two have the same name."""
    names = [_name(folder) for folder in folders]
    labels = [
        name if names.count(name) == 1 else str(path)
        for name, path in zip(names, folders, strict=True)
    ]
    if len(set(labels)) < len(labels):
        raise CalipersError(f"--compare: expected other folders than DIR, got {labels[0]} twice")
    return {label: read_report(path) for label, path in zip(labels, folders, strict=True)}


def _name(path: Path) -> str:
    return (path.name if path.is_dir() else path.stem) or path.resolve().name


def _result(out: Path, reports: dict[str, Told]) -> dict[str, Any]:
    told = [
        {
            "name": name,
            "modules": len(each["modules"]),
            "verdict": verdict_of(each),
            "missing": find_missing(each),
        }
        for name, each in reports.items()
    ]
    found = compare_reports(list(reports.values())) if len(reports) > 1 else None
    compared = None if found is None else _compared(found, list(reports))
    return {"out": str(out), "bytes": out.stat().st_size, "reports": told, "compared": compared}


def _compared(found: Comparison, names: list[str]) -> dict[str, Any]:
    """The medians of the kinds of modules, and on how many modules each report is the best."""
    kinds = [
        {
            "kind": row.name,
            "modules": row.count,
            "errors": dict(zip(names, row.errors, strict=True)),
            "best": None if row.best is None else names[row.best],
        }
        for row in found.kinds
    ]
    best = [row.best for row in found.modules]
    return {
        "measure": found.measure.name,
        "modules": len(found.modules),
        "best": {name: best.count(i) for i, name in enumerate(names)},
        "kinds": kinds,
    }
