"""What a page and plots ask of a report: numbers by measure, and places in the model."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, TypeAlias

from calipers.errors import CalipersError

__all__ = [
    "MEASURES",
    "Measure",
    "Place",
    "Told",
    "activations_of",
    "by_projection",
    "choose_measure",
    "error_of",
    "number",
    "pick_module",
    "place_of",
    "plots_of",
    "value_of",
]

#: A report, as `CalibrationReport.to_dict` or `read_report` gives it. Any key may be missing.
Told: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True)
class Measure:
    """A measure of a weight.

    Attributes:
        key: Its key in the record "weight" of a module.
        name: In words.
        older: Key in the module's own record, in files without "weight".
    """

    key: str
    name: str
    older: str | None = None


#: The errors that modules are compared by; the first is the nearest to what the model feels.
MEASURES = (
    Measure("held_out_error", "output error on held-out tokens"),
    Measure("output_error", "output error"),
    Measure("error", "weight error", "weight_error"),
)


@dataclass(frozen=True)
class Place:
    """Where a module stands in a model.

    Attributes:
        stack: What is before the number of the layer: "model.layers".
        layer: That number; None where the name has none.
        projection: What is after it, numbers as `*`: "self_attn.q_proj".
    """

    stack: str
    layer: int | None
    projection: str


def place_of(name: str) -> Place:
    """The place that a module's name tells.

    Example:
        >>> place_of("model.layers.3.mlp.experts.17.up_proj")
        Place(stack='model.layers', layer=3, projection='mlp.experts.*.up_proj')
        >>> place_of("lm_head")
        Place(stack='', layer=None, projection='lm_head')
    """
    found = re.match(r"(?:(.+?)\.)?(\d+)(?:\.(.+))?$", name)
    if found is None:
        return Place("", None, name)
    rest = re.sub(r"(?<![^.])\d+(?![^.])", "*", found[3] or "")
    return Place(found[1] or "", int(found[2]), rest)


def number(value: Any) -> float | None:
    """The same where it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def value_of(module: Told, key: str) -> float | None:
    """A number of the record "weight" of a module; None where it is missing."""
    return number((module.get("weight") or {}).get(key))


def error_of(module: Told, measure: Measure) -> float | None:
    """The error of a module by a measure; None where it is missing."""
    found = value_of(module, measure.key)
    if found is None and measure.older is not None:
        found = number(module.get(measure.older))
    return found


def activations_of(module: Told) -> Mapping[str, Told]:
    """By base name ("input", "k") the measures of a module's activations."""
    return _mapping(module.get("activation_measures"))


def plots_of(module: Told) -> Mapping[str, Told]:
    """By base name ("weight", "input") what a picture of a tensor needs, where it can be drawn."""
    plots = _mapping(module.get("plots"))
    return {name: plot for name, plot in plots.items() if _drawable(plot)}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _drawable(plot: Any) -> bool:
    bins = _mapping(_mapping(plot).get("histogram"))
    low, high = number(bins.get("low")), number(bins.get("high"))
    return bool(bins.get("counts")) and low is not None and high is not None and low < high


def choose_measure(reports: Sequence[Told]) -> Measure:
    """The first of the measures that nearly all weights of all reports have."""
    for measure in MEASURES:
        if all(_share(report, measure) >= 0.9 for report in reports):
            return measure
    return MEASURES[-1]


def _share(report: Told, measure: Measure) -> float:
    weights = [m for m in report["modules"] if error_of(m, MEASURES[-1]) is not None]
    has = sum(error_of(module, measure) is not None for module in weights)
    return has / len(weights) if weights else 0.0


def by_projection(
    report: Told, get: Callable[[Told], float | None]
) -> dict[str, dict[str, dict[int, float]]]:
    """By stack, projection and layer the median of a number of modules (experts share a place).

    Args:
        report: All modules of it are asked; those outside of numbered layers are left out.
        get: Gives the number of a module's record, or None.
    """
    found: dict[str, dict[str, dict[int, list[float]]]] = {}
    for module in report["modules"]:
        place, value = place_of(module["name"]), get(module)
        if place.layer is not None and value is not None:
            layers = found.setdefault(place.stack, {}).setdefault(place.projection, {})
            layers.setdefault(place.layer, []).append(value)
    return {
        stack: {
            name: {layer: median(values) for layer, values in sorted(layers.items())}
            for name, layers in projections.items()
        }
        for stack, projections in found.items()
    }


def pick_module(modules: Iterable[Told], name: str) -> Told:
    """The record of a name.

    Raises:
        CalipersError: There is none.
    """
    for module in modules:
        if module["name"] == name:
            return module
    raise CalipersError(f"module: expected the name of a quantized module, got {name!r}")
