"""How commands judge a model: perplexity, or output error where there is no language head."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

from compressed_tensors.quantization import QuantizationConfig
from torch import Tensor, nn

from calipers.calibration import CalibrationReport
from calipers.calibration.batches import Progress
from calipers.evaluation import (
    Difference,
    OutputError,
    Perplexity,
    collect_outputs,
    evaluate_losses,
    output_error,
    paired_difference,
)
from calipers.verdict import output_verdict, verdict

__all__ = [
    "Change",
    "Measured",
    "change_json",
    "common_objective",
    "compare_measured",
    "figure",
    "figure_json",
    "figure_text",
    "in_words",
    "json_number",
    "measure",
]

#: What a model did with the text: the losses of a language model, the outputs of another.
Measured: TypeAlias = Perplexity | list[Tensor]
#: How far a model is from another.
Change: TypeAlias = Difference | OutputError


def measure(
    model: nn.Module, batches: Sequence[Tensor], progress: Progress | None = None
) -> Measured:
    """Losses of a language model; last hidden states of a model without a language head."""
    has_head = model.get_output_embeddings() is not None  # type: ignore[operator]
    return (evaluate_losses if has_head else collect_outputs)(model, batches, progress)


def compare_measured(before: Measured, after: Measured) -> Change:
    """Paired difference of the perplexity, or output error.

    Raises:
        ValueError: Of two kinds, or not over the same sequences.
    """
    if isinstance(before, Perplexity) and isinstance(after, Perplexity):
        return paired_difference(before, after)
    if isinstance(before, Perplexity) or isinstance(after, Perplexity):
        raise ValueError("only one of the two models has a language head")
    return output_error(before, after)


def common_objective(report: CalibrationReport) -> str | None:
    """What the observers of all weights minimised; None where they differ or have no choice."""
    objectives = {each.objective for each in report.modules}
    return objectives.pop() if len(objectives) == 1 else None


def in_words(config: QuantizationConfig, change: Change, objective: str | None) -> str:
    """The verdict on a quantized model."""
    judge = output_verdict if isinstance(change, OutputError) else verdict
    return judge(config, *figure(change), objective=objective)


def figure(found: Perplexity | Change) -> tuple[float, float | None]:
    """A perplexity, its relative change or an output error; and the standard error of it."""
    if isinstance(found, Difference):
        return found.relative, found.relative_error
    return found.value, found.standard_error


def figure_text(found: Perplexity | Change) -> str:
    """A figure with its standard error, where there is one."""
    forms = {Perplexity: ".3f", Difference: "+.2%", OutputError: ".4f"}
    value, error = figure(found)
    form = forms[type(found)]
    return format(value, form) + ("" if error is None else f" ± {format(error, form.lstrip('+'))}")


def figure_json(found: Measured | Change | None) -> dict[str, float | None] | None:
    """A figure with its standard error for JSON; None for outputs, which are no figure."""
    if found is None or isinstance(found, list):
        return None
    value, error = map(json_number, figure(found))
    return {"value": value, "standard_error": error}


def change_json(change: Change | None) -> dict[str, dict[str, float | None] | None]:
    """The change of the perplexity and the output error for JSON, of which there is one at most."""
    outputs = isinstance(change, OutputError)
    return {
        "change": None if outputs else figure_json(change),
        "output_error": figure_json(change) if outputs else None,
    }


def json_number(value: float | None) -> float | None:
    """None for what JSON has no number for: NaN and infinity."""
    return value if value is not None and math.isfinite(value) else None
