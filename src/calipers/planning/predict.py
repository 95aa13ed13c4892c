"""What each candidate would do to each module's output, from one pass over data: `Predictions`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from torch import Tensor, nn

from calipers.calibration.batches import Progress
from calipers.calibration.fused import find_fused_groups
from calipers.calibration.global_scales import shared_global_scale
from calipers.calibration.module_checks import find_module_problems
from calipers.calibration.observed import ObservedTensor
from calipers.calibration.plan import ObserverChoice
from calipers.calibration.targets import Target, has_global_scale
from calipers.observers.hooks import Seen, add_hook, remove_hooks
from calipers.observers.optimal import OptimalObserver
from calipers.observing.observe import observe
from calipers.planning.candidates import Candidate, stored_bits
from calipers.ranges.input_gram import ColumnGroups
from calipers.ranges.output_error import InputGram
from calipers.statistics_files import Statistics

__all__ = ["Unit", "gather", "make_units", "output_energy", "predict", "quantized_weights"]

#: Widest input whose X'X is summed whole; of wider ones only its diagonal is known.
WIDEST = 8192
_BLOCK = re.compile(r"^(.*?\.\d+)(?:\.|$)|^(\d+)(?:\.|$)")
_EXPERT = re.compile(r"^(.*\bexperts)\.\d+\.")


@dataclass(frozen=True)
class Predicted:
    """What a candidate does to a unit.

    Attributes:
        bits: Bits of its weights as stored.
        error: Sum over tokens and modules of ||x (W - Q)'||^2.
        relative: That over the same of x W'.
    """

    bits: int
    error: float
    relative: float


@dataclass
class Unit:
    """Modules that decide together: layers that engines fuse, experts of one layer.

    Attributes:
        name: Of its first module, with `*` for the number of an expert.
        targets: Its modules.
        block: The decoder block that it is in; "" outside of any.
        predicted: By the candidates' names; those that a module cannot take are missing.
        left_out: Why the others are missing, by their names.
    """

    name: str
    targets: list[Target]
    block: str
    predicted: dict[str, Predicted] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def weights(self) -> int:
        """How many weights it has."""
        return sum(weight_of(each).numel() for each in self.targets)

    @property
    def is_experts(self) -> bool:
        """Whether it holds experts."""
        return "*" in self.name

    def possible(self, candidates: Sequence[Candidate]) -> dict[str, int]:
        """Bits by the names of the candidates that all its modules can take."""
        return {
            candidate.name: sum(_bits(each, candidate) for each in self.targets)
            for candidate in candidates
            if next(_problems(self, candidate), None) is None
        }

    def patterns(self) -> list[str]:
        """Targets of a config that mean its modules: names, or one pattern for many experts."""
        if not self.is_experts:
            return [each.name for each in self.targets]
        experts = re.escape(self.name.removesuffix(".*"))
        return [f"re:^{experts}[.][0-9]+[.]"]


def weight_of(target: Target) -> Tensor:
    """A module's weight."""
    return target.module.get_parameter("weight")


def make_units(targets: Iterable[Target]) -> list[Unit]:
    """Put together what has to have one scheme, in the model's order."""
    by_name = {each.name: each for each in targets}
    units: dict[str, Unit] = {}
    for names in find_fused_groups(by_name):
        expert = _EXPERT.match(names[0])
        # all matrices of a layer's experts go through one kernel, which takes one scheme
        name = f"{expert[1]}.*" if expert else names[0]
        found = _BLOCK.match(name)
        block = (found[1] or found[2]) if found else ""
        unit = units.setdefault(name, Unit(name, [], block))
        unit.targets += [by_name[each] for each in names]
    return list(units.values())


class Gram:
    """X'X of a module's inputs, summed in float32 by batch and kept in float64.

    Args:
        columns: Of the inputs; of more than `WIDEST` the diagonal alone is kept.
    """

    def __init__(self, columns: int) -> None:
        self.whole = columns <= WIDEST
        self.sum: Tensor | None = None

    @torch.no_grad()
    def see(self, seen: Seen) -> None:
        """Add what one call shows."""
        tokens = seen.value.reshape(-1, seen.value.shape[-1]).float().nan_to_num(0.0, 0.0, 0.0)
        found = (tokens.T @ tokens if self.whole else tokens.square().sum(0)).double()
        self.sum = found if self.sum is None else self.sum + found

    def known(self) -> InputGram | None:
        """What the sums tell; None where no token came."""
        if self.sum is None:
            return None
        found = self.sum.float()
        if not self.whole:
            return InputGram(found)
        columns = len(found)
        index = torch.arange(columns, dtype=torch.int64, device="cpu").view(1, -1)
        groups = ColumnGroups(index, blocks=1, size=columns)
        return InputGram(found.diagonal(), groups, found.view(1, 1, columns, columns))


def output_energy(gram: InputGram | None, rows: Tensor) -> float:
    """Sum of ||x r||^2 over tokens x and rows r of a matrix; 0.0 where no token came."""
    return 0.0 if gram is None else float(gram.to(rows.device).energy(rows))


class Energy:
    """Sum of squares of what goes into a module."""

    def __init__(self) -> None:
        self.sum = 0.0

    @torch.no_grad()
    def see(self, seen: Seen) -> None:
        """Add what one call shows."""
        self.sum += float(seen.value.float().square().sum(dtype=torch.float64))


@dataclass(frozen=True)
class Gathered:
    """What one pass over data showed.

    Attributes:
        statistics: What observers of weights learn.
        grams: X'X by module; layers that read the same share one.
        energies: Sum of squares of the hidden states that go into each block.
    """

    statistics: Statistics
    grams: Mapping[str, InputGram | None]
    energies: Mapping[str, float]


def gather(
    model: nn.Module,
    units: Sequence[Unit],
    batches: Iterable[Any],
    progress: Progress | None = None,
    **options: Any,
) -> Gathered:
    """Run data once through a model whose experts are taken apart.

    Args:
        model: The model, unquantized; it stays as it is.
        units: Whose modules are watched.
        batches: As `observe` takes them.
        progress: As `observe` has it.
        **options: Further ones of `observe`.
    """
    grams: dict[str, Gram] = {}
    energies: dict[str, Energy] = {}
    hooked: list[tuple[nn.Module, object]] = []

    def watch(module: nn.Module, owner: Gram | Energy) -> None:
        add_hook(module, "input", owner.see)
        hooked.append((module, owner))

    try:
        for unit in units:
            by_name = {each.name: each for each in unit.targets}
            for names in find_fused_groups(by_name):
                first = by_name[names[0]]
                gram = Gram(weight_of(first).shape[1])
                grams.update(dict.fromkeys(names, gram))
                watch(first.module, gram)
            if unit.block and unit.block not in energies:
                energies[unit.block] = Energy()
                watch(model.get_submodule(unit.block), energies[unit.block])
        statistics = observe(model, batches, progress=progress, **options)
    finally:
        for module, owner in hooked:
            remove_hooks(module, owner)
    known = {gram: gram.known() for gram in grams.values()}
    return Gathered(
        statistics,
        {name: known[gram] for name, gram in grams.items()},
        {name: each.sum for name, each in energies.items()},
    )


@torch.no_grad()
def quantized_weights(
    targets: Sequence[Target], candidate: Candidate, statistics: Statistics
) -> dict[str, Tensor]:
    """The weights as a model calibrated on the same data would have them, by module.

    Args:
        targets: Modules of one unit.
        candidate: What they are quantized by; the observer is `optimal`, unless it names one, and
            goes by "imatrix", unless it names an objective: the statistics hold no products.
        statistics: Of the data.
    """
    choice = ObserverChoice(has_data=True)
    args = candidate.args
    tensors: dict[str, ObservedTensor] = {}
    for each in targets:
        observer = choice.build(each.name, "weight", args, each.module)
        if isinstance(observer, OptimalObserver) and observer.can_lack_products:
            observer = observer.by_importance()
        key = f"{each.name}.weight"
        state = statistics.states_for({key: observer}).get(key)
        if state is None and observer.needs_data:  # no token: what `calibrate` falls back to
            fallback = ObserverChoice(has_data=False)
            observer = fallback.build(each.name, "weight", args, each.module)
        elif state is not None:
            observer.load_state(state)
        tensors[each.name] = ObservedTensor(each.name, each.module, "weight", args, [observer])
    scales: dict[str, Tensor] = {}
    if has_global_scale(args):
        for names in find_fused_groups(tensors):
            shared = shared_global_scale([tensors[name] for name in names])
            scales.update(dict.fromkeys(names, shared))
    found = {}
    for each in targets:
        weight, shared_scale = weight_of(each), scales.get(each.name)
        observer = tensors[each.name].observer
        scale, zero_point = observer.get_qparams(weight, global_scale=shared_scale)
        found[each.name] = fake_quantize(weight, scale, zero_point, args, shared_scale)
        observer.reset()
    return found


def predict(
    units: Sequence[Unit],
    candidates: Sequence[Candidate],
    gathered: Gathered,
    progress: Progress | None = None,
    keep: dict[tuple[str, str], dict[str, Tensor]] | None = None,
) -> None:
    """Fill in what each candidate would do to each unit, in place; the model stays as it is.

    Args:
        units: What is predicted is put into them.
        candidates: What they may get.
        gathered: Of the data.
        progress: Called as `progress("candidates", done, total)`.
        keep: Where given, it gets the quantized weights, by names of candidate and unit.
    """
    for done, unit in enumerate(units, start=1):
        for candidate in candidates:
            why = next(_problems(unit, candidate), None)
            if why is not None:
                unit.left_out[candidate.name] = why
                continue
            weights = quantized_weights(unit.targets, candidate, gathered.statistics)
            if keep is not None:
                keep[candidate.name, unit.name] = weights
            error = whole = 0.0
            for each in unit.targets:
                weight, gram = weight_of(each).detach(), gathered.grams[each.name]
                error += output_energy(gram, weight.float() - weights[each.name].float())
                whole += output_energy(gram, weight)
            relative = error / whole if whole > 0 else 0.0
            bits = sum(_bits(each, candidate) for each in unit.targets)
            unit.predicted[candidate.name] = Predicted(bits, error, relative)
        if progress is not None:
            progress("candidates", done, len(units))


def _bits(target: Target, candidate: Candidate) -> int:
    weight = weight_of(target)
    rows, columns = weight.shape
    return stored_bits(candidate.args, rows, columns, weight.dtype)


def _problems(unit: Unit, candidate: Candidate) -> Iterator[str]:
    for each in unit.targets:
        target = Target(each.name, each.module, candidate.scheme)
        yield from find_module_problems(target)
