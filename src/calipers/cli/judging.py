"""How commands judge a model: perplexity, or output error where there is no language head."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from torch import Tensor, nn

from calipers.evaluation import (
    Difference,
    OutputError,
    Perplexity,
    collect_outputs,
    evaluate_losses,
    output_error,
    paired_difference,
)

__all__ = [
    "Change",
    "Measured",
    "change_json",
    "change_text",
    "compare_measured",
    "json_number",
    "measure",
    "measured_json",
    "plus_minus",
    "writes_text",
]

#: What a model did with the text: the losses of a language model, the outputs of another.
Measured: TypeAlias = Perplexity | list[Tensor]
#: How far a model is from another.
Change: TypeAlias = Difference | OutputError


def writes_text(model: Any) -> bool:
    """Whether the model has a language head, so that it has a perplexity."""
    return model.get_output_embeddings() is not None


def measure(
    model: nn.Module,
    batches: Sequence[Tensor],
    progress: Callable[[str, int, int | None], object] | None = None,
) -> Measured:
    """Losses of a language model; last hidden states of a model without a language head."""
    if writes_text(model):
        return evaluate_losses(model, batches, progress)
    return collect_outputs(model, batches, progress)


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


def plus_minus(value: float, error: float | None, form: str) -> str:
    """A figure with its standard error, where there is one."""
    return format(value, form) + ("" if error is None else f" ± {format(error, form.lstrip('+'))}")


def change_text(change: Change) -> str:
    """The change of the perplexity, or the output error, with its standard error."""
    if isinstance(change, OutputError):
        return plus_minus(change.value, change.standard_error, ".4f")
    return plus_minus(change.relative, change.relative_error, "+.2%")


def change_json(change: Change | None) -> dict[str, dict[str, float | None] | None]:
    """The change of the perplexity and the output error for JSON, of which there is one at most."""
    relative = outputs = None
    if isinstance(change, OutputError):
        outputs = measured_json(change.value, change.standard_error)
    elif change is not None:
        relative = measured_json(change.relative, change.relative_error)
    return {"change": relative, "output_error": outputs}


def measured_json(value: float, error: float | None) -> dict[str, float | None]:
    """A figure with its standard error for JSON."""
    return {"value": json_number(value), "standard_error": json_number(error)}


def json_number(value: float | None) -> float | None:
    """None for what JSON has no number for: NaN and infinity."""
    return value if value is not None and math.isfinite(value) else None
