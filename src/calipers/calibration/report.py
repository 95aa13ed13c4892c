"""`CalibrationReport`: what a calibration did, module by module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from compressed_tensors.offload import disable_onloading
from torch import nn

from calipers.calibration.architectures import projection_weights
from calipers.calibration.targets import LeftAlone

__all__ = ["CalibrationReport", "LeftAlone", "ModuleReport", "quantized_share"]


@dataclass(frozen=True)
class ModuleReport:
    """One quantized module.

    Attributes:
        name: The module's name in the model.
        weight_observer: Name of the weight's observer, None where weights stay as they are.
        weight_bits: Bits per weight code, scales not counted; None as above.
        weight_error: Relative weight error ||W - fakequant(W)||_F / ||W||_F, computed in
            float32; 0.0 for a weight of zeros; None as above.
        activation_observer: Name of the observer of inputs or outputs; None where activations
            are not quantized, or dynamically.
        tokens: Tokens that the module saw while it was observed; 0 where no data was needed.
        fallback: "weight", "input", "output": those whose own data was missing, so that the
            stated fallback was used.
        objective: What the weight's observer minimised, where it has a choice ("imatrix").
    """

    name: str
    weight_observer: str | None = None
    weight_bits: int | None = None
    weight_error: float | None = None
    activation_observer: str | None = None
    tokens: int = 0
    fallback: tuple[str, ...] = ()
    objective: str | None = None


@dataclass(frozen=True)
class CalibrationReport:
    """What a calibration did.

    Attributes:
        modules: The quantized modules in the model's order.
        skipped: Names of modules left unquantized because they saw no data.
        left_alone: All other modules with projection weights that were not quantized, each with
            its reason, in the model's order; those of `skipped` among them.
        quantized_share: Share of the model's projection weights that is quantized, from 0 to 1:
            weights of Linear, Conv1D, convolutions and fused experts; embeddings, norms and output
            heads do not count. 1.0 where the model holds none.
        seconds: Wall-clock time spent in running batches and freezing.
        batches: Batches that the model took; 0 where no observer needed data.
        tokens_given: Tokens of the batches whose attention mask was used.
        tokens_counted: Those of them that counted: all but padding.
        unmasked: Names of modules whose values are not arranged by token in such a batch (routed
            experts), so that all of them counted, padding as well.
    """

    modules: list[ModuleReport] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    left_alone: list[LeftAlone] = field(default_factory=list)
    quantized_share: float = 1.0
    seconds: float = 0.0
    batches: int = 0
    tokens_given: int = 0
    tokens_counted: int = 0
    unmasked: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain dicts, lists, strings and numbers, ready for JSON."""
        data = asdict(self)
        for row in data["modules"]:
            row["fallback"] = list(row["fallback"])
        return data


def quantized_share(
    modules: Sequence[ModuleReport], model: nn.Module, left_alone: Sequence[LeftAlone]
) -> float:
    """Share of the projection weights outside of output heads that is quantized, from 0 to 1."""
    with disable_onloading():
        done = sum(
            projection_weights(model.get_submodule(each.name))
            for each in modules
            if each.weight_bits is not None
        )
    done += sum(each.weights for each in left_alone if each.reason == "quantized before")
    rest = sum(
        each.weights
        for each in left_alone
        if each.reason not in ("output head", "quantized before")
    )
    return done / (done + rest) if done + rest else 1.0
