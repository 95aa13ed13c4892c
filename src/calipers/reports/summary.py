"""The head of a page: what was done, the verdict, the main figures and what is missing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from compressed_tensors.quantization import (
    QuantizationScheme,
    is_preset_scheme,
    preset_name_to_scheme,
)

from calipers.reports.html import escape, in_percent
from calipers.reports.records import (
    MEASURES,
    Told,
    activations_of,
    choose_measure,
    error_of,
    number,
    plots_of,
    value_of,
)
from calipers.verdict import output_verdict, verdict

__all__ = ["find_missing", "model_measures", "render_head", "title_of", "verdict_of"]


def title_of(report: Told) -> str:
    """The model's name: the last part of its path."""
    name = str(report.get("model") or "").rstrip("/").rpartition("/")[2]
    return name or "A calibration"


def model_measures(report: Told) -> Mapping[str, Any]:
    """What was measured of the whole model by perplexity; empty where it was not."""
    return (report.get("measures") or {}).get("perplexity") or {}


def _output_error(report: Told) -> Mapping[str, Any]:
    return (report.get("measures") or {}).get("output_error") or {}


def verdict_of(report: Told) -> str | None:
    """The verdict in words; None where the model was not judged."""
    name = str(report.get("scheme"))
    scheme = QuantizationScheme(targets=["Linear"])
    if is_preset_scheme(name):
        scheme = preset_name_to_scheme(name, ["Linear"])
    objectives = {module.get("objective") for module in report["modules"]} - {None}
    objective = objectives.pop() if len(objectives) == 1 else None
    found = model_measures(report)
    if (change := number(found.get("relative"))) is not None:
        return verdict(scheme, change, number(found.get("relative_error")), objective=objective)
    found = _output_error(report)
    if (error := number(found.get("value"))) is not None:
        return output_verdict(
            scheme, error, number(found.get("standard_error")), objective=objective
        )
    return None


def render_head(report: Told, label: str, *, alone: bool) -> str:
    """Title, verdict and figures of a report; of the first of several with its label."""
    words = [
        report.get("scheme"),
        report.get("observer"),
        None if alone else f"first of several: {label}",
    ]
    eyebrow = " · ".join(str(word) for word in ("calipers report", *words) if word)
    about = [
        f"made {str(report['created'])[:16].replace('T', ' ')} UTC"
        if report.get("created")
        else "",
        f"by calipers {report['calipers']}" if report.get("calipers") else "",
        f"from {report['model']}" if report.get("model") else "",
    ]
    options = ", ".join(f"{k}={v}" for k, v in (report.get("options") or {}).items())
    shown = " ".join(filter(None, about)) + (f"; options {options}" if options else "")
    words_of = verdict_of(report)
    told = f'<p class="verdict"><b>Verdict</b> {_code(words_of)}</p>' if words_of else ""
    return (
        f'<header><p class="eyebrow">{escape(eyebrow)}</p><h1>{escape(title_of(report))}</h1>'
        f'<p class="about">{escape(shown)}</p>\n{told}{_tiles(report)}{_lacking(report)}</header>\n'
    )


def _code(text: str) -> str:
    """Text with what stands between backticks as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def _tiles(report: Told) -> str:
    tiles = [*_judged_tiles(report), *_error_tiles(report)]
    modules = f"{len(report['modules']):,} modules"
    if (share := number(report.get("quantized_share"))) is not None:
        tiles.append(("quantized", f"{in_percent(share)}%", f"of projection weights, {modules}"))
    else:
        tiles.append(("quantized", modules, ""))
    cells = "".join(
        f"<div><dt>{escape(name)}</dt><dd><b>{escape(value)}</b><span>{escape(rest)}</span></dd>"
        "</div>"
        for name, value, rest in [*tiles, *_data_tile(report)]
    )
    return f'<dl class="tiles">{cells}</dl>\n'


def _data_tile(report: Told) -> list[tuple[str, str, str]]:
    seconds, batches = number(report.get("seconds")), report.get("batches")
    took = "" if seconds is None else f"{seconds:.1f} s"
    if not batches:
        return [("calibration", took, "without data")] if took else []
    tokens = report.get("tokens_counted")
    held = f"{report['held_out']} held out" if report.get("held_out") else ""
    shown = f"{batches:,} batches"
    rest = ", ".join(filter(None, (shown if tokens else "", held, took)))
    return [("calibrated with", f"{tokens:,} tokens" if tokens else shown, rest)]


def _judged_tiles(report: Told) -> list[tuple[str, str, str]]:
    found = {key: number(value) for key, value in model_measures(report).items()}
    tiles = []
    before, after, change = (found.get(key) for key in ("before", "after", "relative"))
    if before is not None and after is not None:
        tiles.append(("perplexity", f"{after:.3f}", f"{before:.3f} before"))
    if change is not None:
        tiles.append(("its change", f"{change:+.2%}", _error(found.get("relative_error"), ".2%")))
    if (kl := found.get("kl")) is not None:
        tiles.append(("KL divergence", f"{kl:.4f}", _error(found.get("kl_error"), ".4f", " nats")))
    if (top1 := found.get("top1")) is not None:
        tiles.append(("top-1 agreement", f"{top1:.1%}", _error(found.get("top1_error"), ".1%")))
    if (error := number(_output_error(report).get("value"))) is not None:
        spread = number(_output_error(report).get("standard_error"))
        tiles.append(("output error of the model", f"{error:.3f}", _error(spread, ".3f")))
    return tiles


def _error(value: float | None, shown: str, unit: str = "") -> str:
    return (f"± {value:{shown}}" if value is not None else "") + unit


def _error_tiles(report: Told) -> list[tuple[str, str, str]]:
    measure = choose_measure([report])
    errors = sorted(
        (error, module["name"])
        for module in report["modules"]
        if (error := error_of(module, measure)) is not None
    )
    if not errors:
        return []
    middle, (worst, name) = errors[len(errors) // 2][0], errors[-1]
    return [
        (f"median {measure.name}", f"{in_percent(middle)}%", "of a module"),
        (f"largest {measure.name}", f"{in_percent(worst)}%", name),
    ]


def find_missing(report: Told) -> list[str]:
    """What a report does not tell, one sentence each; empty where it tells all."""
    modules = report["modules"]
    weights = [m for m in modules if error_of(m, MEASURES[-1]) is not None]
    static = [m for m in modules if m.get("activation_observer")]
    lacks = []
    if not modules:
        lacks.append("No module was quantized.")
    if not model_measures(report) and not _output_error(report):
        lacks.append("The model was not judged: no perplexity, KL divergence or verdict.")
    if weights and not any(m.get("weight") for m in weights):
        lacks.append("Weights have a weight error alone, no output error, SQNR or clipped share.")
    elif weights and not any(value_of(m, MEASURES[1].key) is not None for m in weights):
        lacks.append("No output errors: the observer of weights looked at no inputs.")
    if static and not any(activations_of(m) for m in static):
        lacks.append("Static activations have no measures.")
    if modules and not any(plots_of(m) for m in modules):
        lacks.append("There are no histograms and error curves.")
    return lacks


def _lacking(report: Told) -> str:
    lacks = find_missing(report)
    if not lacks:
        return ""
    listed = "".join(f"<li>{escape(each)}</li>" for each in lacks)
    return (
        f'<div class="lacking"><b>What this report does not tell</b><ul>{listed}</ul>'
        "Files of an earlier calipers lack what came later; <code>calipers calibrate --out DIR"
        "</code> of this one, with data and text to judge by, leaves all of it.</div>\n"
    )
