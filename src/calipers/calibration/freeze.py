"""`freeze_modules`: derive all scales and write them onto a model, one fused group at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from compressed_tensors.quantization import (
    DynamicType,
    QuantizationScheme,
    QuantizationStatus,
    initialize_module_for_quantization,
)
from loguru import logger

from calipers.calibration.attention import STATES, initialize_attention
from calipers.calibration.batches import Progress
from calipers.calibration.few_tokens import lent_statistics
from calipers.calibration.fused import find_fused_groups
from calipers.calibration.global_scales import borrowed_memory, shared_global_scale, weight_of
from calipers.calibration.judge import Verdict, judge
from calipers.calibration.measuring import measure_activations, measure_weight
from calipers.calibration.observed import ObservedModule, ObservedTensor
from calipers.calibration.plan import ObserverChoice, needs_observer
from calipers.calibration.report import ActivationMeasures, ModuleReport, WeightMeasures
from calipers.calibration.targets import TENSORS, has_global_scale
from calipers.calibration.write import (
    keep_onloaded,
    undo_on_error,
    write_qparam,
)
from calipers.errors import CalipersError
from calipers.ranges.measures import Plot

__all__ = ["Freezing", "freeze_modules", "initialize_modules"]

#: Which modules go through each stage of a freeze.
_STAGES: dict[str, Callable[[ObservedModule], bool]] = {
    "global scales": lambda each: any(has_global_scale(t.args) for t in each.tensors.values()),
    "weights": lambda each: "weight" in each.tensors,
    "activations": lambda each: any(name != "weight" for name in each.tensors),
}


def freeze_modules(
    observed: Sequence[ObservedModule],
    choice: ObserverChoice,
    progress: Progress | None = None,
) -> list[ModuleReport]:
    """Quantize the modules: parameters through compressed-tensors' helpers, status FROZEN.

    One group of layers that engines fuse after the other. In each, global scales come first, shared
    within the group; then each weight is observed, its scale derived and its observer's range
    forgotten before the next; then activations.

    Args:
        observed: The modules to quantize, not quantized yet; their schemes are not changed.
        choice: How the observers were chosen, recorded in the schemes put on the modules.
        progress: Called as `progress(stage, done, total)` for the stages "global scales",
            "weights" and "activations".

    Returns:
        One report per module.

    Raises:
        Exception: Whatever went wrong; no module is quantized then, statistics are kept.
    """
    work = Freezing(observed, choice, progress)
    by_name = {each.name: each for each in observed}
    with undo_on_error([each.module for each in observed]), torch.no_grad():
        for names in find_fused_groups(by_name):
            work.freeze([by_name[name] for name in names])
        for each in observed:
            each.module.quantization_status = QuantizationStatus.FROZEN
    return [_report(each, work.measured[each.name], work.verdicts) for each in observed]


def initialize_modules(observed: Sequence[ObservedModule], choice: ObserverChoice) -> None:
    """Put empty scales on modules, whose values are known already, with status FROZEN."""
    Freezing(observed, choice).initialize(observed)
    for each in observed:
        each.module.quantization_status = QuantizationStatus.FROZEN


@dataclass
class Measured:
    """What is measured of a module: fields of `ModuleReport`."""

    error: float | None = None
    weight: WeightMeasures | None = None
    activations: dict[str, ActivationMeasures] = field(default_factory=dict)
    plots: dict[str, Plot] = field(default_factory=dict)


class Freezing:
    """What is done to each group of one freeze; the arguments are those of `freeze_modules`."""

    def __init__(
        self,
        observed: Sequence[ObservedModule],
        choice: ObserverChoice,
        progress: Progress | None = None,
    ) -> None:
        self._choice = choice
        self._progress = progress
        self._totals = {
            stage: sum(map(goes_through, observed)) for stage, goes_through in _STAGES.items()
        }
        self._done = dict.fromkeys(self._totals, 0)
        #: Schemes as recorded on modules: those of one scheme share one object, as after
        #: `apply_quantization_config`.
        self._recorded: dict[int, QuantizationScheme] = {}
        #: Of tensors that several observers looked at.
        self.verdicts: dict[str, Verdict] = {}
        #: What became of the tensors of each module that is done, by its name.
        self.measured: dict[str, Measured] = {}

    def freeze(self, group: Sequence[ObservedModule], *, measure: bool = True) -> None:
        """Quantize one fused group, all but the status; with `measure` its tensors are `measured`.

        Measuring costs little more than to fake-quantize the weights once.
        """
        self.measured |= {each.name: Measured() for each in group}
        self.initialize(group)
        with lent_statistics(group):
            self.judge(group)
            self.write_global_scales(group)
            self.write_weights(group, measure=measure)
            self.write_activations(group, measure=measure)

    def initialize(self, group: Sequence[ObservedModule]) -> None:
        """Empty qparams on every module, with the observers that were really used in its scheme."""
        for each in group:
            scheme = self._recorded.get(id(each.scheme))
            if scheme is None:
                scheme = self._recorded[id(each.scheme)] = each.scheme.model_copy(deep=True)
                for base_name, kind in TENSORS.items():
                    args = getattr(scheme, kind.field)
                    if args is not None and needs_observer(args):
                        recorded = self._choice.recorded_args(base_name, args)
                        recorded = self._choice.shadows.recorded_args(base_name, recorded)
                        setattr(scheme, kind.field, recorded)
            if each.is_attention:
                initialize_attention(each.module, scheme)
            else:
                initialize_module_for_quantization(each.module, scheme)
                keep_onloaded(each.module)

    def judge(self, group: Sequence[ObservedModule]) -> None:
        """Let several observers answer where there are several, before anything is written."""
        self.verdicts |= judge(group, self._choice.shadows.pick)

    def write_global_scales(self, group: Sequence[ObservedModule]) -> None:
        """One global scale for each tensor that the members have in common, where it has one."""
        for base_name in TENSORS:
            own = [each.tensors[base_name] for each in group if base_name in each.tensors]
            own = [tensor for tensor in own if has_global_scale(tensor.args)]
            if own:
                verdict = self.verdicts.get(own[0].full_name)
                shared = verdict.global_scale if verdict else shared_global_scale(own)
                assert shared is not None
                for tensor in own:
                    write_qparam(tensor, "global_scale", shared)
        self._tell("global scales", group)

    def write_weights(self, group: Sequence[ObservedModule], *, measure: bool = True) -> None:
        """Scales and zero points of weights."""
        for each in group:
            tensor = each.tensors.get("weight")
            if tensor is None:
                continue
            weight = weight_of(tensor)
            verdict = self.verdicts.get(tensor.full_name)
            with borrowed_memory(tensor.deciding, needed=verdict is None):
                if verdict is None:
                    tensor.deciding.observe(weight)
                _write_pair(tensor, verdict)
            if measure:
                own = self.measured[each.name]
                own.error, own.weight, plot = measure_weight(tensor, weight, verdict)
                own.plots |= {} if plot is None else {"weight": plot}
            self._tell("weights", [each])

    def write_activations(self, group: Sequence[ObservedModule], *, measure: bool = True) -> None:
        """Scales and zero points of static activations."""
        for each in group:
            for base_name, tensor in each.tensors.items():
                if base_name != "weight" and not tensor.args.dynamic:
                    _write_pair(tensor, self.verdicts.get(tensor.full_name))
            if measure:
                own = self.measured[each.name]
                own.activations, plots = measure_activations(each)
                own.plots |= plots
            self._tell("activations", [each])

    def _tell(self, stage: str, done: Sequence[ObservedModule]) -> None:
        for _ in filter(_STAGES[stage], done):
            self._done[stage] += 1
            if self._progress is not None:
                self._progress(stage, self._done[stage], self._totals[stage])


def _write_pair(tensor: ObservedTensor, verdict: Verdict | None) -> None:
    if verdict is None:
        scale, zero_point = tensor.deciding.get_qparams()
    else:
        scale, zero_point = verdict.scale, verdict.zero_point
    if scale is None or zero_point is None:
        raise CalipersError(f"{tensor.deciding.name}: the observer gave no scale")
    write_qparam(tensor, "scale", scale)
    write_qparam(tensor, "zero_point", zero_point)


def _report(
    each: ObservedModule, measured: Measured, verdicts: Mapping[str, Verdict]
) -> ModuleReport:
    judged = {name: verdicts.get(tensor.full_name) for name, tensor in each.tensors.items()}
    other = {name: found.observer for name, found in judged.items() if found and not found.is_first}
    deciding = each.observers | other
    chosen = {name: observer.args.observer for name, observer in deciding.items()}
    weights = each.scheme.weights
    activations = chosen.keys() - {"weight"}
    fallback = tuple(
        name
        for name, tensor in each.tensors.items()
        if tensor.fallback is not None and name not in other
    )
    for base_name in fallback:
        logger.warning("{}.{} saw no data: the fallback was used", each.name, base_name)
    return ModuleReport(
        name=each.name,
        weight_observer=chosen.get("weight"),
        weight_bits=weights.num_bits if weights is not None else None,
        weight_error=measured.error,
        activation_observer=next((chosen[name] for name in TENSORS if name in activations), None),
        tokens=each.tokens,
        fallback=fallback,
        objective=None
        if "weight" in fallback
        else getattr(deciding.get("weight"), "objective", None),
        activations=_activations(each.scheme),
        shared=max((tensor.share for tensor in each.tensors.values()), default=0.0),
        states=tuple(name for name in STATES if name in each.tensors),
        shadows={name: found.rows for name, found in judged.items() if found},
        weight=measured.weight,
        activation_measures=measured.activations,
        plots=measured.plots,
    )


def _activations(scheme: QuantizationScheme) -> Literal["static", "local", "dynamic"] | None:
    """How activations are quantized: inputs tell, outputs where inputs are not quantized."""
    args = scheme.input_activations or scheme.output_activations
    if args is None:
        return None
    if args.dynamic == DynamicType.LOCAL:
        return "local"
    return "dynamic" if args.dynamic else "static"
