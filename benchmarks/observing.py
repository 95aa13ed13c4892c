"""What observing costs beside the bare forward passes of a model.

    python -m benchmarks.observing [--model DIR ...] [--json FILE]

Each observer watches every Linear of the model while it runs the same batches as the bare model;
the two alternate. "over bare" is the median of the ratios of neighbouring runs, less 1.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from benchmarks.results import Table, add_json_option, measured

__all__ = ["main"]

COLUMNS = (
    ("model", "model", "{}"),
    ("observers", "observers", "{}"),
    ("bare s", "bare_s", "{:.2f}"),
    ("observed s", "observed_s", "{:.2f}"),
    ("over bare", "over", "{:+.1%}"),
    ("wanted", "wanted", "{:.0%}"),
)
#: Title, scheme, observers of weights and of activations, and what they may cost.
CASES = (
    ("inputs, static_minmax", "FP8", "memoryless_minmax", "static_minmax", 0.10),
    ("inputs, histogram", "FP8", "memoryless_minmax", "histogram", 0.25),
    ("weights, imatrix_mse", "W4A16", "imatrix_mse", None, 0.25),
    ("weights, optimal objective=imatrix", "W4A16", "optimal", None, 0.25),
)

#: Runs of less are repeated as often as make up for it: the ratio of two short ones says little.
_LEAST_SECONDS = 3.0


def main(arguments: list[str] | None = None) -> int:
    """Measure all and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", type=Path, default=[], help="besides the demo")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--only", default="", help="cases whose title has this word")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=2)
    add_json_option(parser)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    from calipers.demo import MODEL_PATH

    named = {"demo": MODEL_PATH, **{path.name: path for path in options.model}}
    rows = [row for name, path in named.items() for row in _rows(name, path, options)]
    table = Table(COLUMNS, rows)
    result = measured("benchmarks.observing", arguments, {"observing": table}, timed=True)
    print(f"{table.markdown()}\n\n{result.source()}")
    if options.json:
        result.write(options.json)
    return 0


def _rows(name: str, path: Path, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    import calipers
    from calipers.calibration.batches import no_cache
    from calipers.calibration.config import resolve_config
    from calipers.calibration.targets import resolve_modules
    from calipers.checkpoint.opening import load_model
    from calipers.cli.schemes import choose_group_size

    model = load_model(path, device="cpu", dtype=options.dtype)
    generator = torch.Generator().manual_seed(1)
    size, most = model.config.vocab_size, model.config.max_position_embeddings
    shape = (1, min(options.tokens, most))
    batches = [
        {"input_ids": torch.randint(0, size, shape, generator=generator), **no_cache(model)}
        for _ in range(options.sequences)
    ]
    assert resolve_modules(model, resolve_config("W4A16")).targets
    group_size, _ = choose_group_size(model, ())

    def bare() -> float:
        start = perf_counter()
        with torch.no_grad():
            for batch in batches:
                model(**batch)
        return perf_counter() - start

    bare()
    runs = options.runs * max(1, round(_LEAST_SECONDS / bare()))
    for title, scheme, weights, activations, wanted in CASES:
        if options.only not in title:
            continue
        given = {"group_size": group_size} if group_size and scheme == "W4A16" else {}
        seconds: list[tuple[float, float]] = []
        for _ in range(runs):
            without = bare()
            with calipers.attach(
                model,
                scheme,
                observer=weights,
                observer_options={"objective": "imatrix"} if weights == "optimal" else None,
                activation_observer=activations,
                scheme_options=given,
            ) as calibration:
                start = perf_counter()
                calibration.run(batches)
                seconds.append((without, perf_counter() - start))
        yield {
            "model": name,
            "observers": title,
            "bare_s": statistics.median(without for without, _ in seconds),
            "observed_s": statistics.median(observed for _, observed in seconds),
            "over": statistics.median(observed / without for without, observed in seconds) - 1,
            "wanted": wanted,
        }


if __name__ == "__main__":
    sys.exit(main())
