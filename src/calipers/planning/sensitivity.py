"""What an error of a unit's output does to the model: two measures of sensitivity."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any, Literal

import torch
from torch import Tensor, nn

from calipers.agreement import ReferenceLogits
from calipers.calibration.batches import Progress, eval_mode
from calipers.planning.candidates import Candidate
from calipers.planning.predict import (
    Gathered,
    Unit,
    output_energy,
    quantized_weights,
    weight_of,
)

__all__ = [
    "Sensitivity",
    "kl_sensitivities",
    "mean_kl",
    "reference_logits",
    "residual_sensitivities",
    "swapped",
]

#: "residual": squared output error relative to the residual stream; "kl": divergence of the logits
#: when the unit alone is quantized.
Sensitivity = Literal["kl", "residual"]


def residual_sensitivities(units: Sequence[Unit], gathered: Gathered) -> dict[str, float]:
    """What the summed squared error of each unit is multiplied with; no pass is needed.

    The error of a layer that adds to the residual stream counts relative to the hidden states that
    go into its block. That of any other counts relative to its own output, times what the last
    layer of its part (attention, MLP) puts out relative to those hidden states.
    """
    outputs = {
        each.name: output_energy(gathered.grams[each.name], weight_of(each).detach())
        for unit in units
        for each in unit.targets
    }
    last = {_parent(each.name): each.name for unit in units for each in unit.targets}
    found = {}
    for unit in units:
        own = sum(outputs[each.name] for each in unit.targets)
        written = sum(outputs[last[p]] for p in {_parent(each.name) for each in unit.targets})
        stream = gathered.energies.get(unit.block, 0.0)
        share = written / stream if stream > 0 else 1.0
        found[unit.name] = share / own if own > 0 else 0.0
    return found


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


@contextmanager
def swapped(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Other weights in a model for a while, by module."""
    own = {name: model.get_submodule(name).get_parameter("weight") for name in weights}
    before = {name: each.data for name, each in own.items()}
    try:
        for name, each in own.items():
            each.data = weights[name].to(each.device, each.dtype)
        yield
    finally:
        for name, each in own.items():
            each.data = before[name]


def reference_logits(model: Any, batches: Sequence[Tensor]) -> ReferenceLogits:
    """The logits of the unquantized model for each sequence, to compare others with."""
    reference = ReferenceLogits(sum(map(len, batches)))
    _show_logits(model, batches, reference.keep)
    return reference


def mean_kl(model: Any, batches: Sequence[Tensor], reference: ReferenceLogits) -> float:
    """Kullback-Leibler divergence of the next token to the unquantized model, nats a token.

    Args:
        model: A causal language model.
        batches: Token ids.
        reference: Of the unquantized model.
    """
    _show_logits(model, batches, reference.compare)
    found = reference.agreement()
    return 0.0 if found is None else found.kl


@torch.no_grad()
def _show_logits(
    model: Any, batches: Sequence[Tensor], see: Callable[[int, Tensor], object]
) -> None:
    device = next(model.parameters()).device
    numbers = count()
    for batch in batches:
        for row in model(input_ids=batch.to(device), use_cache=False).logits:
            see(next(numbers), row)


def kl_sensitivities(
    model: nn.Module,
    units: Sequence[Unit],
    candidates: Sequence[Candidate],
    gathered: Gathered,
    batches: Sequence[Tensor],
    progress: Progress | None = None,
    keep: Mapping[tuple[str, str], dict[str, Tensor]] | None = None,
) -> dict[str, float]:
    """Divergence of the logits over summed squared error of each unit, one after another.

    Each unit alone is quantized by the candidate that does it the most harm; `keep` has what
    `predict` kept, which spares quantizing it again.
    """
    by_name = {each.name: each for each in candidates}
    found = {}
    with eval_mode(model):
        reference = reference_logits(model, batches)
        for done, unit in enumerate(units, start=1):
            found[unit.name] = 0.0
            if unit.predicted:
                worst = max(unit.predicted, key=lambda name: unit.predicted[name].error)
                weights = (keep or {}).get((worst, unit.name)) or quantized_weights(
                    unit.targets, by_name[worst], gathered.statistics
                )
                with swapped(model, weights):
                    kl = mean_kl(model, batches, reference)
                error = unit.predicted[worst].error
                found[unit.name] = max(kl, 0.0) / error if error > 0 else 0.0
            if progress is not None:
                progress("sensitivity", done, len(units))
    return found
