"""What is usual for a kind of scheme, for `calipers.verdict`, from comparisons of several models.

    calipers compare MODEL --scheme ... --observer memoryless_minmax --observer optimal \\
        --observer optimal:objective=hessian --json > FILE
    python -m benchmarks.quality.bands FILE...

Of all models and schemes of a kind: "less than usual" is below the smallest change that any
observer left, "usual" is up to the largest one that `optimal` left plus two standard errors, and
"far more" is above the largest one that min/max left, or one and a half times "usual" where that is
more.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from calipers.calibration import resolve_config
from calipers.verdict import kind_of

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    """Print the bands of perplexity and of output error, and what they were made from."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("files", nargs="+", type=Path)
    runs: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for file in parser.parse_args(arguments).files:
        for run in json.loads(file.read_text(encoding="utf-8"))["runs"]:
            scheme = run["scheme"]
            # A YAML file lies beside the comparison that it was used in.
            where = str(file.parent / scheme) if scheme.endswith(".yaml") else scheme
            kind = kind_of(resolve_config(where))
            for measure in ("change", "output_error"):
                if kind is not None and run[measure] is not None:
                    runs[measure, kind].append({**run, "file": file.stem, **run[measure]})
    for (measure, kind), found in sorted(runs.items()):
        best = min(run["value"] for run in found)
        usual = max(
            run["value"] + 2 * run["standard_error"]
            for run in found
            if run["observer"] == "optimal" and not run["options"]
        )
        most = max(run["value"] for run in found if run["observer"] == "memoryless_minmax")
        print(f"{measure} {kind}: {best:.3g}, {usual:.3g}, {max(most, 1.5 * usual):.3g}")
        for run in found:
            name = " ".join([run["observer"], *map(str, run["options"].values())])
            print(
                f"    {run['file']:12} {run['scheme']:12} {name:24} "
                f"{run['value']:+.4f} ± {run['standard_error']:.4f}"
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
