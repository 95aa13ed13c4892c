"""`verdict`: a result in words, what is usual for its scheme and what to try next."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStrategy,
    QuantizationType,
)

from calipers.calibration.targets import schemes_by_target

__all__ = ["output_verdict", "verdict"]


_Band: TypeAlias = tuple[float, float, float]


@dataclass(frozen=True)
class _Kind:
    """A kind of scheme and what was measured under it.

    Attributes:
        name: In words.
        perplexity: Relative changes of the perplexity: below the first is less than usual, up to
            the second usual, above the third far more than usual.
        outputs: Output errors, likewise.
    """

    name: str
    perplexity: _Band
    outputs: _Band


#: docs/evaluating.md has these figures in a table, and where they come from.
_KINDS = {
    "w8a16": _Kind("8-bit weights", (0.0, 0.005, 0.01), (0.021, 0.029, 0.044)),
    "w8a8": _Kind("8-bit weights and activations", (0.001, 0.040, 0.061), (0.072, 0.14, 0.20)),
    "int4": _Kind("int4 weights in groups", (0.008, 0.23, 0.40), (0.31, 0.43, 0.65)),
    "int4 channel": _Kind("int4 weights by channel", (0.009, 0.47, 0.88), (0.38, 0.48, 0.72)),
    "int3": _Kind("int3 weights in groups", (0.027, 1.15, 6.11), (0.57, 0.81, 1.21)),
    "nvfp4": _Kind("NVFP4 weights", (0.005, 0.086, 0.28), (0.24, 0.30, 0.45)),
    "nvfp4a4": _Kind("NVFP4 weights and activations", (0.017, 0.35, 0.53), (0.36, 0.41, 0.61)),
    "mxfp4a4": _Kind("MXFP4 weights and activations", (0.01, 1.84, 3.68), (0.55, 0.60, 0.90)),
}

_BROKEN = (
    "broken: {}. Look for NaN in the report's weight errors, and try a wider dtype "
    "(--dtype float32)."
)
_EIGHT_BITS = "8 bits for the modules with the largest weight errors"

_Scheme: TypeAlias = QuantizationConfig | QuantizationScheme


def verdict(
    scheme: _Scheme,
    change: float,
    standard_error: float | None,
    *,
    objective: str | None = None,
) -> str:
    """One line on a change of the perplexity: how certain, how usual, what to try next.

    What is usual was measured on three small models; a guide, no limit.

    Args:
        scheme: What the model was quantized under; of a config's groups the one with the fewest
            bits counts.
        change: Relative change of the perplexity, `Difference.relative`.
        standard_error: Its paired standard error; None where it is not known.
        objective: What the observer of weights minimised, as `ModuleReport.objective`.

    Returns:
        A sentence or two, without a line break.

    Examples:
        >>> from compressed_tensors.quantization import preset_name_to_scheme
        >>> verdict(preset_name_to_scheme("W4A16", ["Linear"]), 0.001, 0.002)
        'no difference that this text shows: +0.1% is within two standard errors (0.4%). \
Nothing to mend; more text would show a smaller difference.'
    """
    scheme = _hardest(scheme)
    if not math.isfinite(change):
        return _BROKEN.format("the perplexity is no number")
    kind = _KINDS.get(kind_of(scheme) or "")
    figure = f"{change:+.1%} perplexity"
    if standard_error is not None and abs(change) <= 2 * standard_error:
        low = kind is None or change + 2 * standard_error <= kind.perplexity[1]
        shown = (
            f"no difference that this text shows: {change:+.1%} is within two standard errors "
            f"({2 * standard_error:.1%}). "
        )
        if low:
            return shown + "Nothing to mend; more text would show a smaller difference."
        return shown + "That is too little text to tell: judge by more sequences (--eval)."
    if change < 0:
        return (
            f"{figure}: better than before, which rounding weights does not do by itself. Judge by "
            "other text (--eval) before believing it."
        )
    return _in_words(figure, change, kind, scheme, objective)


def output_verdict(
    scheme: _Scheme,
    error: float,
    standard_error: float | None,
    *,
    objective: str | None = None,
) -> str:
    """One line on the output error of a model without a language head, as `verdict` gives it.

    `error` and `standard_error` are the value and the standard error of an `OutputError`.
    """
    scheme = _hardest(scheme)
    if not math.isfinite(error):
        return _BROKEN.format("the outputs are no numbers")
    kind = _KINDS.get(kind_of(scheme) or "")
    shown = f"{error:.3f}" + ("" if standard_error is None else f" ± {standard_error:.3f}")
    return _in_words(f"output error {shown}", error, kind, scheme, objective, outputs=True)


def _in_words(
    figure: str,
    value: float,
    kind: _Kind | None,
    scheme: QuantizationScheme,
    objective: str | None,
    *,
    outputs: bool = False,
) -> str:
    steps = _next_steps(scheme, objective)
    if kind is None:
        return f"{figure}; what is usual for this scheme was not measured. {_try(steps)}"
    best, usual, worst = kind.outputs if outputs else kind.perplexity
    shown = "{:.3f}".format if outputs else _percent
    of_kind = f"usual for {kind.name} ({shown(best)} to {shown(usual)} measured on small models)"
    steps, eight = steps[:2], [] if _bits(scheme) >= 8 else [_EIGHT_BITS]
    if value < best:
        return f"{figure}: less than {of_kind}. {_try([])}"
    if value <= usual:
        return f"{figure}: {of_kind}. {_try(steps, 'Nearer still: ')}"
    if value <= worst:
        return f"{figure}: more than {of_kind}. {_try([*steps, 'more calibration data', *eight])}"
    steps = ["calibration data of the kind that the model is used on", *steps, *eight]
    return f"{figure}: far more than {of_kind}. {_try(steps)}"


def _try(steps: list[str], lead: str = "Try ") -> str:
    if not steps:
        return "Nothing to mend."
    *others, last = steps
    return lead + (f"{', '.join(others)} or {last}" if others else last) + "."


def _next_steps(scheme: QuantizationScheme, objective: str | None) -> list[str]:
    """What may bring a model nearer to what it was, the most promising first."""
    weights, inputs = scheme.weights, scheme.input_activations
    found = []
    if weights is not None and weights.num_bits <= 4:
        if objective != "hessian":
            found.append(
                "the observer `optimal`" + (" with objective=hessian" if objective else "")
            )
        if weights.type == QuantizationType.INT:
            if weights.strategy in (QuantizationStrategy.CHANNEL, QuantizationStrategy.TENSOR):
                found.append("groups of 128 weights or fewer")
            elif (weights.group_size or 0) > 32:
                found.append("smaller groups")
        if inputs is not None and inputs.num_bits < 16:
            found.append("activations of more bits")
    elif inputs is not None and inputs.dynamic is False:
        found.append("the activation observer `histogram`")
        found.append("dynamic activations")
    elif weights is not None and weights.strategy == QuantizationStrategy.TENSOR:
        found.append("one scale for each channel")
    return found


def _hardest(scheme: _Scheme) -> QuantizationScheme:
    if isinstance(scheme, QuantizationScheme):
        return scheme
    return min(
        schemes_by_target(scheme).values(), key=_bits, default=QuantizationScheme(targets=[])
    )


def _bits(scheme: QuantizationScheme) -> int:
    return 16 if scheme.weights is None else int(scheme.weights.num_bits)


def kind_of(scheme: _Scheme) -> str | None:
    """The kind of scheme that is told of: a key of the table; None where there is no such row."""
    scheme = _hardest(scheme)
    weights, inputs = scheme.weights, scheme.input_activations
    if weights is None or scheme.output_activations is not None:
        return None
    bits = 16 if inputs is None else int(inputs.num_bits)
    name = _weight_name(weights)
    if name == "w8":
        name = "w8a16" if bits == 16 else "w8a8" if bits == 8 else ""
    elif bits == 4:
        name = {"nvfp4": "nvfp4a4", "mxfp4": "mxfp4a4"}.get(name, "")
    elif bits < 16:
        return None
    return name if name in _KINDS else None


def _weight_name(weights: QuantizationArgs) -> str:
    grouped = weights.strategy == QuantizationStrategy.GROUP and (weights.group_size or 0) <= 128
    bits, integer = weights.num_bits, weights.type == QuantizationType.INT
    if bits == 8:
        return "w8"
    if not integer and bits == 4:
        return "nvfp4" if weights.strategy == QuantizationStrategy.TENSOR_GROUP else "mxfp4"
    if integer and grouped and bits in (3, 4):
        return f"int{bits}"
    if integer and bits == 4 and weights.strategy == QuantizationStrategy.CHANNEL:
        return "int4 channel"
    return ""


def _percent(value: float) -> str:
    return f"{value:+.1%}" if value < 0.1 else f"{value:+.0%}"
