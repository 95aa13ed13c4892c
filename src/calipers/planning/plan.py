"""`plan_schemes`: a scheme for each module, so that the model fits a budget with least error."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from torch import nn

from calipers._files import replacing
from calipers._unwrap import unwrap, without_wrappers
from calipers._words import check_choice
from calipers.calibration.batches import Progress, expect_batches
from calipers.calibration.config import SchemeLike, resolve_config
from calipers.calibration.experts import separated_experts
from calipers.calibration.parts import Only
from calipers.calibration.targets import kind_of, resolve_modules
from calipers.errors import CalipersError
from calipers.planning.candidates import Candidate, read_candidates
from calipers.planning.knapsack import choose
from calipers.planning.predict import Unit, gather, make_units, predict
from calipers.planning.scheme_file import build_config, config_text
from calipers.planning.sensitivity import (
    Sensitivity,
    kl_sensitivities,
    residual_sensitivities,
)
from calipers.text.for_model import batches_for_model

__all__ = ["Choice", "SchemePlan", "plan_schemes"]

#: Sequences that the divergence of each unit is measured with.
_KL_SEQUENCES = 4


@dataclass(frozen=True)
class Choice:
    """What was chosen for modules that decide together.

    Attributes:
        name: Of the first module; of experts with `*` for their numbers.
        modules: Their names.
        scheme: The candidate's name; None leaves them unquantized, since none fits.
        weights: How many weights they have.
        bits: Bits of them as stored.
        error: Predicted sum of squared output errors over that of the outputs.
        cost: What that is predicted to do to the model, in the unit of the sensitivity.
        left_out: Candidates that they cannot take, with the reason.
    """

    name: str
    modules: tuple[str, ...]
    scheme: str | None
    weights: int
    bits: int
    error: float | None
    cost: float
    left_out: dict[str, str]


@dataclass(frozen=True)
class SchemePlan:
    """A scheme for each module.

    Attributes:
        config: What `calibrate` takes as its scheme.
        schemes: The names of the schemes in the config, in the order of its groups.
        choices: What was chosen, in the model's order.
        sensitivity: How errors were weighed.
        budget_bits: Most bits in all.
        head: What made it, by name.
    """

    config: QuantizationConfig
    schemes: tuple[str, ...]
    choices: tuple[Choice, ...]
    sensitivity: Sensitivity
    budget_bits: int
    head: dict[str, str] = field(default_factory=dict)

    @property
    def weights(self) -> int:
        """How many weights the budget is for."""
        return sum(each.weights for each in self.choices if each.scheme)

    @property
    def total_bits(self) -> int:
        """Bits of them as stored."""
        return sum(each.bits for each in self.choices if each.scheme)

    @property
    def bits(self) -> float:
        """Mean bits of a weight as stored."""
        return self.total_bits / max(1, self.weights)

    @property
    def cost(self) -> float:
        """Sum of the predicted costs: nats a token for "kl"."""
        return sum(each.cost for each in self.choices)

    def text(self) -> str:
        """The plan as a YAML file that `calibrate` takes as its scheme."""
        told = {
            **self.head,
            "bits": f"{self.bits:.4f} a weight of at most "
            f"{self.budget_bits / max(1, self.weights):.4f}, scales counted",
            "bytes": f"{self.total_bits / 8:.0f}",
            "predicted": f"{self.cost:.6g}, by the sensitivity {self.sensitivity}",
        }
        head = ["A plan of calipers: calipers calibrate MODEL --scheme THIS_FILE"]
        head += [f"{name}: {value}" for name, value in told.items()]
        return config_text(self.config, self.schemes, head)

    def write(self, path: str | Path, *, force: bool = False) -> None:
        """Write `text` to a file.

        Raises:
            CalipersError: It exists, and `force` is not given.
        """
        path = Path(path).expanduser()
        if path.exists() and not force:
            raise CalipersError(f"{path} exists: choose another place, or replace it with --force")
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as beside:
            beside.write_text(self.text(), encoding="utf-8")

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "bits": self.bits,
            "bytes": self.total_bits / 8,
            "budget_bits": self.budget_bits / max(1, self.weights),
            "weights": self.weights,
            "sensitivity": self.sensitivity,
            "cost": self.cost,
            "units": [
                {
                    "name": each.name,
                    "modules": list(each.modules),
                    "scheme": each.scheme,
                    "weights": each.weights,
                    "bits": each.bits / max(1, each.weights),
                    "error": each.error,
                    "cost": each.cost,
                    "left_out": each.left_out,
                }
                for each in self.choices
            ],
        }


def plan_schemes(
    model: nn.Module,
    data: str | Path | Iterable[Any],
    candidates: str | Iterable[SchemeLike] = ("W4A16", "W8A16"),
    *,
    bits: float | None = None,
    bytes: float | None = None,
    group_size: int | None = None,
    sensitivity: Sensitivity = "kl",
    ignore: str | Iterable[str] = (),
    only: Only | None = None,
    tokenizer: Any = None,
    samples: int = 128,
    sequence_length: int = 512,
    progress: Progress | None = None,
    head: dict[str, str] | None = None,
) -> SchemePlan:
    """Choose a scheme for each module, so that all fit a budget and harm the model least.

    Data runs once. Of every candidate for every module the output error is computed from X'X of the
    module's inputs, by the scales of the observer `optimal`; it is weighed by a sensitivity, and
    the sum is minimised exactly (multiple-choice knapsack, by scipy's HiGHS). Layers that engines
    fuse get one scheme, and so do all experts of a layer. The model stays as it is.

    Args:
        model: As `calibrate` takes it, unquantized.
        data: Batches or text, as `calibrate` takes them.
        candidates: Schemes of weights alone: names, or what `calibrate` takes besides; or one
            string with commas.
        bits: Most bits a weight on average, with scales and zero points as stored.
        bytes: Most bytes of all quantized weights, in place of `bits`.
        group_size: Columns of a group of weights, where a candidate leaves that open.
        sensitivity: "kl" runs some sequences once more for each unit, quantized alone, and weighs
            its error by the divergence of the logits. "residual" takes the error relative to the
            residual stream, without another pass.
        ignore: As in `calibrate`.
        only: As in `calibrate`.
        tokenizer: As in `calibrate`.
        samples: As in `calibrate`.
        sequence_length: As in `calibrate`.
        progress: Called as `progress(stage, done, total)`.
        head: Further lines for the head of the file, by name.

    Returns:
        The plan; `calibrate(model, plan.config)` takes it.

    Raises:
        CalipersError: Not one of `bits` and `bytes`, a budget outside of what the candidates take,
            nothing to quantize, or "kl" for a model without logits or with data other than tokens.
        SchemeError: Unknown candidates, or patterns that match nothing.
    """
    check_choice("sensitivity", sensitivity, Sensitivity)
    if (bits is None) == (bytes is None):
        raise CalipersError(
            f"budget: expected one of bits (--bits) and bytes (--bytes), got {bits} and {bytes}"
        )
    read = read_candidates(candidates, group_size)
    model = unwrap(model)
    with without_wrappers(model), separated_experts(model):
        every = QuantizationScheme(targets=["Linear"], weights=read[0].args)
        config = resolve_config(every, ignore)
        units = make_units(resolve_modules(model, config, only).targets)
        if not units:
            raise CalipersError(
                "there is nothing to plan: the model has no Linear that is not left"
            )
        budget = _budget(units, read, bits, bytes)
        given = batches_for_model(
            data, model, tokenizer, samples=samples, sequence_length=sequence_length
        )
        expect_batches(given)
        batches = list(given)
        judged = _token_batches(model, batches) if sensitivity == "kl" else []
        gathered = gather(model, units, batches, progress, ignore=ignore, only=only)
        predict(units, read, gathered, progress)
        if sensitivity == "residual":
            weights = residual_sensitivities(units, gathered)
        else:
            weights = kl_sensitivities(model, units, read, gathered, judged, progress)
        return solve(units, read, weights, budget, sensitivity, head)


def solve(
    units: Sequence[Unit],
    candidates: Sequence[Candidate],
    weights: dict[str, float],
    budget: int,
    sensitivity: Sensitivity,
    head: dict[str, str] | None = None,
) -> SchemePlan:
    """The plan of least cost within a budget of bits.

    Args:
        units: With what is predicted of them.
        candidates: All of them.
        weights: Sensitivity of each unit, by its name.
        budget: Bits in all.
        sensitivity: How errors are weighed.
        head: As in `plan_schemes`.
    """
    planned = [each for each in units if each.predicted]
    costs = [[weights[u.name] * p.error for p in u.predicted.values()] for u in planned]
    sizes = [[p.bits for p in u.predicted.values()] for u in planned]
    numbers = choose(costs, sizes, budget)
    picked = {
        unit.name: list(unit.predicted)[number]
        for unit, number in zip(planned, numbers, strict=True)
    }
    choices = []
    targets: dict[str, list[str]] = {}
    for unit in units:
        name = picked.get(unit.name)
        found = unit.predicted.get(name) if name else None
        choices.append(
            Choice(
                unit.name,
                tuple(each.name for each in unit.targets),
                name,
                unit.weights,
                found.bits if found else 0,
                found.relative if found else None,
                weights[unit.name] * found.error if found else 0.0,
                unit.left_out,
            )
        )
        if name:
            targets.setdefault(name, []).extend(unit.patterns())
    used = [each for each in candidates if each.name in targets]
    config = build_config({each.name: (each.scheme, targets[each.name]) for each in used})
    names = tuple(each.name for each in used)
    return SchemePlan(config, names, tuple(choices), sensitivity, budget, dict(head or {}))


def _budget(
    units: Sequence[Unit], candidates: Sequence[Candidate], bits: float | None, size: float | None
) -> int:
    """The budget in bits, refused where no plan has it."""
    able = [sizes for unit in units if (sizes := unit.possible(candidates))]
    weights = sum(unit.weights for unit in units if unit.possible(candidates))
    if not able:
        raise CalipersError("candidates (--candidates): no module can take any of them")
    least = sum(min(each.values()) for each in able)
    most = sum(max(each.values()) for each in able)
    budget = bits * weights if bits is not None else (size or 0) * 8
    # a budget as it is printed is not refused over its last digit
    if not math.isfinite(budget) or budget < least * (1 - 1e-9) or budget > most * (1 + 1e-9):
        if bits is not None:
            given, unit_, name = bits, weights, "bits (--bits)"
        else:
            given, unit_, name = size or 0, 8, "bytes (--bytes)"
        form = ".4f" if bits is not None else ".0f"
        raise CalipersError(
            f"{name}: expected {least / unit_:{form}} to {most / unit_:{form}}, which is what the "
            f"candidates take with their scales, got {given:g}"
        )
    return max(least, math.floor(budget + 1e-6))


def _token_batches(model: nn.Module, batches: Sequence[Any]) -> list[torch.Tensor]:
    """The first sequences of the data as token ids."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    found = [each["input_ids"] if isinstance(each, dict) else each for each in batches]
    if head is None or not all(isinstance(each, torch.Tensor) for each in found):
        raise CalipersError(
            "sensitivity 'kl' (--sensitivity) compares logits of token ids: expected a language "
            "model and text; 'residual' takes any"
        )
    rows = [row[None] for each in found[:_KL_SEQUENCES] for row in each]
    return rows[:_KL_SEQUENCES]


def summarize(plan: SchemePlan) -> list[tuple[str, str, int, float, float, float]]:
    """Rows of a table: kind of modules, scheme, count, bits, mean relative error, cost."""
    rows: dict[tuple[str, str], list[Choice]] = {}
    for each in plan.choices:
        rows.setdefault((kind_of(each.name), each.scheme or "unquantized"), []).append(each)
    found = []
    for (kind, scheme), own in sorted(rows.items()):
        weights = sum(each.weights for each in own)
        errors = [each.error for each in own if each.error is not None]
        error = math.sqrt(sum(errors) / len(errors)) if errors else math.nan
        bits = sum(each.bits for each in own) / max(1, weights)
        found.append((kind, scheme, len(own), bits, error, sum(each.cost for each in own)))
    return found
