"""Summaries of a report: one for each kind of modules, observer, reason and layer of experts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import exp, inf, isnan, log
from typing import TYPE_CHECKING, Any

from calipers.calibration.targets import LeftAlone, kind_of

if TYPE_CHECKING:
    from calipers.calibration.report import (
        ExpertCoverage,
        ModuleReport,
        ShadowReport,
        WeightMeasures,
    )

__all__ = [
    "KindSummary",
    "ShadowSummary",
    "measure_table",
    "shadow_cells",
    "shadow_headings",
    "summarize_coverage",
    "summarize_left_alone",
    "summarize_modules",
    "summarize_shadows",
]


@dataclass(frozen=True)
class KindSummary:
    """Modules whose names differ by numbers alone and that were treated alike.

    Attributes:
        name: Their name with `*` for numbers; of a module alone in its kind its own. After it, the
            states of attention, and the tensors that a fallback was used for.
        count: How many they are.
        observer: Of the weights, with what it minimised; None where weights stay as they are.
        bits: Of the weights; None as above.
        mean_error: Mean of their relative weight errors; None as above.
        max_error: The largest of them.
        activations: How activations are quantized; None where they are not.
        tokens: Most tokens that one of them saw.
    """

    name: str
    count: int
    observer: str | None
    bits: int | None
    mean_error: float | None
    max_error: float | None
    activations: str | None
    tokens: int


def summarize_modules(modules: Iterable[ModuleReport]) -> list[KindSummary]:
    """One summary for each kind of modules, in the order of the first of each."""
    kinds: dict[tuple[Any, ...], list[ModuleReport]] = defaultdict(list)
    for row in modules:
        observer = row.weight_observer
        if observer is not None and row.objective is not None:
            observer = f"{observer} ({row.objective})"
        activations = row.activation_observer or row.activations
        kind = (kind_of(row.name), observer, row.weight_bits, activations, row.fallback, row.states)
        kinds[kind].append(row)
    summaries = []
    for (name, observer, bits, activations, fallback, states), members in kinds.items():
        errors = [m.weight_error for m in members if m.weight_error is not None]
        note = f" ({', '.join(states)})" if states else ""
        note += f" (fallback: {', '.join(fallback)})" if fallback else ""
        summaries.append(
            KindSummary(
                name=(name if len(members) > 1 else members[0].name) + note,
                count=len(members),
                observer=observer,
                bits=bits,
                mean_error=sum(errors) / len(errors) if errors else None,
                max_error=max(errors, default=None),
                activations=activations,
                tokens=max(m.tokens for m in members),
            )
        )
    return summaries


@dataclass(frozen=True)
class ShadowSummary:
    """One of several observers, over all tensors that it looked at with others.

    Attributes:
        tensors: "weights" or "activations", states of attention among these.
        observer: With its options.
        error: Geometric mean of its errors; None where it has none.
        judged: Tensors that it has an error of.
        best: On how many of them no other observer has a smaller error, or the same before it.
        chosen: On how many its scales were written.
    """

    tensors: str
    observer: str
    error: float | None
    judged: int
    best: int
    chosen: int


def summarize_shadows(modules: Iterable[ModuleReport]) -> list[ShadowSummary]:
    """One summary for each of several observers of weights, then of activations."""
    found: dict[tuple[str, str], list[tuple[ShadowReport, bool]]] = {}
    for base_name, rows in (pair for each in modules for pair in each.shadows.items()):
        judged = [row for row in rows if row.error is not None]
        best = min(judged, key=_shadow_badness, default=None)
        tensors = "weights" if base_name == "weight" else "activations"
        for row in rows:
            found.setdefault((tensors, row.observer), []).append((row, row is best))
    summaries = []
    for (tensors, observer), pairs in sorted(
        found.items(), key=lambda pair: pair[0][0] != "weights"
    ):
        errors = [row.error for row, _ in pairs if row.error is not None]
        summaries.append(
            ShadowSummary(
                tensors,
                observer,
                error=_geometric_mean(errors) if errors else None,
                judged=len(errors),
                best=sum(best for _, best in pairs),
                chosen=sum(row.chosen for row, _ in pairs),
            )
        )
    return summaries


def _shadow_badness(row: ShadowReport) -> float:
    return inf if row.error is None or isnan(row.error) else row.error


def _geometric_mean(values: Sequence[float]) -> float:
    return 0.0 if 0.0 in values else exp(sum(map(log, values)) / len(values))


def shadow_headings(modules: Iterable[ModuleReport]) -> list[str]:
    """The heads of a table of several observers, which say what the errors were measured on."""
    kinds = {row.judged_by for each in modules for rows in each.shadows.values() for row in rows}
    error = f"{kinds.pop()} error" if len(kinds) == 1 else "error"
    return ["observers", "tensors", error, "best", "chosen"]


def summarize_left_alone(left_alone: Iterable[LeftAlone]) -> list[str]:
    """One line for all modules whose names differ by numbers alone and that share a reason."""
    kinds: dict[tuple[str, str], list[LeftAlone]] = defaultdict(list)
    for each in left_alone:
        kinds[kind_of(each.name), each.why].append(each)
    lines = []
    for (kind, why), members in kinds.items():
        name = members[0].name if len(members) == 1 else f"{kind} ({len(members)})"
        share = sum(each.share for each in members)
        lines.append(f"{name}: {why}" + (f" ({share:.1%})" if share else ""))
    return lines


def summarize_coverage(coverage: Sequence[ExpertCoverage]) -> list[str]:
    """A line on experts that saw few tokens; none where there are none."""
    few = sum(len(each.few) for each in coverage)
    if not few:
        return []
    experts = sum(len(each.tokens) for each in coverage)
    unseen = sum(len(each.unseen) for each in coverage)
    enough = coverage[0].enough
    return [f"experts: {few} of {experts} saw fewer than {enough} tokens, {unseen} none (coverage)"]


def shadow_cells(summaries: Iterable[ShadowSummary]) -> list[list[str]]:
    """The rows of a table of several observers."""
    return [
        [
            each.observer,
            each.tensors,
            "-" if each.error is None else f"{each.error:.3g}",
            f"{each.best} of {each.judged}",
            str(each.chosen),
        ]
        for each in summaries
    ]


_MEASURES = ("module", "weight error", "output error", "SQNR", "clipped", "zeros")


def measure_table(rows: Iterable[ModuleReport]) -> list[list[str]]:
    """A table of measures of weights, heads first: a row for each module whose weight has an error.

    Measures that none of them has are left out; so is the table where there is no such module.
    """
    told = [
        [row.name, f"{row.weight_error:.4f}", *_told(row.weight)]
        for row in rows
        if row.weight_error is not None
    ]
    columns = [column for column in zip(_MEASURES, *told, strict=True) if set(column[1:]) - {"-"}]
    return [list(row) for row in zip(*columns, strict=True)]


def _told(found: WeightMeasures | None) -> list[str]:
    forms = {"output_error": ".4f", "sqnr_db": ".1f", "clipped": ".2%", "zeros": ".1%"}
    values = [(getattr(found, name, None), form) for name, form in forms.items()]
    return ["-" if value is None else format(value, form) for value, form in values]
