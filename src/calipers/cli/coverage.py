"""`calipers coverage`: how many tokens each expert saw in a calibration."""

from __future__ import annotations

import json as json_format
import sys
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from calipers.calibration import ExpertCoverage
from calipers.cli import options
from calipers.cli.console import plain_errors, print_json, print_lines, print_table
from calipers.errors import CalipersError

__all__ = ["coverage", "coverage_from_report"]

_NUMBERS = ("experts", "fewest", "median", "most", "few", "none")


def coverage(
    report: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="What `calipers calibrate --json` printed, or json.dump of a report's to_dict(); "
            "- reads standard input.",
            allow_dash=True,
        ),
    ],
    json: options.Json = False,
) -> None:
    """Show how many tokens each expert saw in a calibration, and which of them saw few or none.

    Examples:
      calipers calibrate ./Qwen3-30B-A3B --json > report.json

      calipers coverage report.json
    """
    with plain_errors():
        found = coverage_from_report(report)
        if not found:
            raise CalipersError(
                f"{report}: no experts were counted: the model has none, or no observer needed data"
            )
    if json:
        print_json([each.to_dict() for each in found])
        return
    print_table(
        f"Tokens that experts saw; {found[0].enough} are enough",
        ("layer", *_NUMBERS),
        [_row(each) for each in found],
        right=_NUMBERS,
    )
    print_lines([(each.name, _few(each)) for each in found if each.few])


def coverage_from_report(path: Path) -> list[ExpertCoverage]:
    """Read the coverage of a calibration from its report.

    Args:
        path: A JSON file: the output of `calipers calibrate --json`, or a report's `to_dict`.

    Raises:
        CalipersError: It is no such file.
    """
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
        data = json_format.loads(text)
        rows = data.get("calibration", data)["coverage"]
        return [ExpertCoverage(row["name"], dict(row["tokens"]), row["enough"]) for row in rows]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CalipersError(
            f"{path}: expected what `calipers calibrate --json` prints: "
            f"{type(error).__name__}: {error}"
        ) from None


def _row(each: ExpertCoverage) -> tuple[str, ...]:
    counts = list(each.tokens.values())
    numbers: tuple[Any, ...] = (
        len(counts),
        min(counts),
        round(median(counts)),
        max(counts),
        len(each.few),
        len(each.unseen),
    )
    return (each.name, *map(str, numbers))


def _few(each: ExpertCoverage) -> str:
    """The experts that saw few tokens by their numbers, with the tokens."""
    told = ", ".join(f"{name.rpartition('.')[2]} ({each.tokens[name]})" for name in each.few)
    return f"few: {told}"
