"""How commands judge a model: perplexity, or output error where there is no language head."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from compressed_tensors.quantization import QuantizationConfig
from torch import Tensor, nn

from calipers.agreement import Agreement, ReferenceLogits
from calipers.calibration import CalibrationReport
from calipers.calibration.batches import Progress
from calipers.evaluation import (
    Difference,
    OutputError,
    Perplexity,
    bootstrap_interval,
    collect_outputs,
    evaluate_losses,
    output_error,
    paired_difference,
)
from calipers.verdict import output_verdict, verdict

__all__ = [
    "Change",
    "Measured",
    "agreement_text",
    "change_json",
    "common_objective",
    "compare_measured",
    "figure",
    "figure_json",
    "figure_text",
    "in_words",
    "json_number",
    "measure",
    "measures_json",
    "reference_for",
]

#: What a model did with the text: the losses of a language model, the outputs of another.
Measured: TypeAlias = Perplexity | list[Tensor]
#: How far a model is from another.
Change: TypeAlias = Difference | OutputError


def measure(
    model: nn.Module,
    batches: Sequence[Tensor],
    progress: Progress | None = None,
    see: Callable[[int, Tensor], object] | None = None,
) -> Measured:
    """Losses of a language model; last hidden states of a model without a language head.

    The logits of a language model go through `see`, see `evaluate_losses`.
    """
    has_head = model.get_output_embeddings() is not None  # type: ignore[operator]
    if has_head:
        return evaluate_losses(model, batches, progress, see)
    return collect_outputs(model, batches, progress)


def reference_for(batches: Sequence[Tensor]) -> ReferenceLogits:
    """What keeps the logits of the first model that is measured with these batches."""
    return ReferenceLogits(sum(len(each) for each in batches))


def agreement_text(found: Agreement | None) -> tuple[str, str] | None:
    """KL divergence and top-1 agreement with their standard errors; None where there are none."""
    if found is None:
        return None
    kl, top1 = f"{found.kl:.4f}", f"{found.top1:.1%}"
    if found.kl_error is not None and found.top1_error is not None:
        kl, top1 = f"{kl} ± {found.kl_error:.4f}", f"{top1} ± {found.top1_error:.1%}"
    return kl, top1


def measures_json(
    before: Measured | None, after: Measured | None, change: Change | None, agree: Agreement | None
) -> dict[str, Any] | None:
    """What is measured of a whole model, as `calipers-report.json` has it; None for nothing."""
    if isinstance(change, OutputError):
        return {"perplexity": None, "output_error": figure_json(change)}
    if not isinstance(before, Perplexity) or not isinstance(after, Perplexity) or change is None:
        return None
    interval = bootstrap_interval(before, after)
    found = {
        "before": before.value,
        "before_error": before.standard_error,
        "after": after.value,
        "after_error": after.standard_error,
        "relative": change.relative,
        "relative_error": change.relative_error,
        "relative_low": None if interval is None else interval[0],
        "relative_high": None if interval is None else interval[1],
        "kl": None if agree is None else agree.kl,
        "kl_error": None if agree is None else agree.kl_error,
        "top1": None if agree is None else agree.top1,
        "top1_error": None if agree is None else agree.top1_error,
    }
    return {
        "perplexity": {
            **{key: json_number(value) for key, value in found.items()},
            "sequences": len(before.tokens),
            "tokens": sum(before.tokens),
            "kl_tokens": None if agree is None else agree.tokens,
        }
    }


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
