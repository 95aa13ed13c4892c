"""`freeze_modules`: derive all scales and write them onto a model, one weight at a time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from compressed_tensors.quantization import (
    DynamicType,
    QuantizationScheme,
    QuantizationStatus,
    QuantizationStrategy,
    initialize_module_for_quantization,
)
from loguru import logger

from calipers.calibration.batches import Progress
from calipers.calibration.choice import ObserverChoice, needs_observer
from calipers.calibration.fallback import Substitutes
from calipers.calibration.fused import find_fused_groups
from calipers.calibration.observed import ObservedModule, args_of
from calipers.calibration.qparams import write_qparam
from calipers.calibration.report import ModuleReport
from calipers.calibration.rollback import undo_on_error
from calipers.calibration.weight_error import measure_weight_error
from calipers.errors import CalipersError
from calipers.observers import Observer

__all__ = ["freeze_modules"]

_TENSOR_GROUP = QuantizationStrategy.TENSOR_GROUP
#: Global scales that are compared, over the smallest of a fused group: codes of local scales lie an
#: eighth of an octave apart at most, and these are the phases between. And by how many values.
_GLOBAL_FACTORS = tuple(2 ** (-step / 32) for step in range(4))
_SAMPLE = 2**18


def freeze_modules(
    observed: Sequence[ObservedModule],
    choice: ObserverChoice,
    substitutes: Substitutes,
    progress: Progress | None = None,
) -> list[ModuleReport]:
    """Quantize the modules: parameters through compressed-tensors' helpers, status FROZEN.

    Global scales come first, shared within fused groups; then each weight is observed, its scale
    derived and its observer's range forgotten before the next; then activations.

    Args:
        observed: The modules to quantize, not quantized yet; their schemes are not changed.
        choice: How the observers were chosen, recorded in the schemes put on the modules.
        substitutes: Observers asked in place of the modules' own.
        progress: Called as `progress(stage, done, total)` for the stages "global scales",
            "weights" and "activations".

    Returns:
        One report per module.

    Raises:
        Exception: Whatever went wrong; no module is quantized then, statistics are kept.
    """
    if not observed:
        return []
    with undo_on_error([each.module for each in observed]), torch.no_grad():
        _initialize(observed, choice)
        work = _Work(observed, substitutes, progress)
        work.write_global_scales()
        errors = work.write_weights()
        work.write_activations()
        for each in observed:
            each.module.quantization_status = QuantizationStatus.FROZEN
    return [_report(each, substitutes, errors.get(each.name)) for each in observed]


class _Sample(NamedTuple):
    """Some rows of a weight, and how many each of them stands for."""

    rows: torch.Tensor
    factor: float


class _GlobalScale(NamedTuple):
    """A module's own global scale, and whether it comes from values other than zero."""

    scale: torch.Tensor
    of_values: bool


class _Work:
    """The three passes over the modules of one freeze."""

    def __init__(
        self,
        observed: Sequence[ObservedModule],
        substitutes: Substitutes,
        progress: Progress | None,
    ) -> None:
        self._observed = observed
        self._substitutes = substitutes
        self._progress = progress

    def write_global_scales(self) -> None:
        """TENSOR_GROUP: one global scale per fused group, from the smallest of its members'.

        A global scale is 448 * 6 / amax, so the smallest is that of the group's largest value.
        Members that are zero throughout have none of their own and are not asked.
        """
        by_name = {each.name: each for each in self._observed if _has_global_scale(each)}
        groups = find_fused_groups(by_name)
        members = self._counted("global scales", [by_name[n] for group in groups for n in group])
        for group in groups:
            # One group at a time: of each weight a sample is kept until the group is done.
            scales: dict[str, dict[str, _GlobalScale]] = {"weight": {}, "input": {}}
            samples: dict[str, _Sample] = {}
            for each in itertools.islice(members, len(group)):
                for base_name, scale in self._global_scales(each, samples).items():
                    scales[base_name][each.name] = scale
            for base_name, own in scales.items():
                if not own:
                    continue
                asked = [each for each in own.values() if each.of_values] or list(own.values())
                device = asked[0].scale.device
                shared = torch.stack([each.scale.to(device) for each in asked]).amin(dim=0)
                if base_name == "weight":
                    shared = self._choose_global_scale([by_name[n] for n in own], samples, shared)
                for name in own:
                    args = args_of(by_name[name].scheme, base_name)
                    key = f"{base_name}_global_scale"
                    write_qparam(by_name[name].module, key, shared, args, name)
        next(members, None)  # so that the last one is counted

    def _global_scales(
        self, each: ObservedModule, samples: dict[str, _Sample]
    ) -> dict[str, _GlobalScale]:
        """Global scales of a module by base name; of its weight a sample is added to `samples`."""
        found = {}
        for base_name in each.observers:
            if args_of(each.scheme, base_name).strategy != _TENSOR_GROUP:
                continue
            observer = self._observer(each, base_name)
            if base_name == "weight":
                weight = _weight_of(each)
                with _borrowed_memory(observer):
                    scale = observer.get_global_scale(weight)
                    of_values = observer.has_global_values
                rows = weight.flatten(0, -2)
                step = max(1, rows.numel() // _SAMPLE)
                samples[each.name] = _Sample(rows[::step].clone(), len(rows) / len(rows[::step]))
            else:
                scale = observer.get_global_scale()
                of_values = observer.has_global_values
            if scale is None:
                raise CalipersError(f"{observer.name}: the observer gave no global scale")
            found[base_name] = _GlobalScale(scale, of_values)
        return found

    def _choose_global_scale(
        self,
        members: Sequence[ObservedModule],
        samples: dict[str, _Sample],
        shared: torch.Tensor,
    ) -> torch.Tensor:
        """The best of a few by the errors of all members; `shared` where they cannot tell."""
        scales = [shared * factor for factor in _GLOBAL_FACTORS]
        total = torch.zeros(len(scales), dtype=torch.float64, device="cpu")
        for each in members:
            observer, (rows, factor) = self._observer(each, "weight"), samples[each.name]
            with _borrowed_memory(observer):
                errors = observer.global_scale_errors(rows, [s.to(rows.device) for s in scales])
            if errors is None:
                return shared
            total += errors.cpu() * factor
        return scales[int(total.argmin())] if bool(total.isfinite().all()) else shared

    def write_weights(self) -> dict[str, float]:
        """Scales and zero points of weights; the relative error of each, by module name."""
        errors = {}
        weighted = [each for each in self._observed if each.weight_observer is not None]
        for each in self._counted("weights", weighted):
            args = args_of(each.scheme, "weight")
            observer = self._observer(each, "weight")
            weight = _weight_of(each)
            with _borrowed_memory(observer):
                observer.observe(weight)
                self._write_pair(each, "weight", observer)
            errors[each.name] = measure_weight_error(
                weight,
                each.module.get_parameter("weight_scale"),
                getattr(each.module, "weight_zero_point", None),
                args,
                getattr(each.module, "weight_global_scale", None),
            )
        return errors

    def write_activations(self) -> None:
        """Scales and zero points of static activations."""
        active = [each for each in self._observed if each.activation_observers]
        for each in self._counted("activations", active):
            for base_name in each.activation_observers:
                if not args_of(each.scheme, base_name).dynamic:
                    self._write_pair(each, base_name, self._observer(each, base_name))

    def _write_pair(self, each: ObservedModule, base_name: str, observer: Observer) -> None:
        scale, zero_point = observer.get_qparams()
        if scale is None or zero_point is None:
            raise CalipersError(f"{observer.name}: the observer gave no scale")
        args = args_of(each.scheme, base_name)
        write_qparam(each.module, f"{base_name}_scale", scale, args, each.name)
        write_qparam(each.module, f"{base_name}_zero_point", zero_point, args, each.name)

    def _observer(self, each: ObservedModule, base_name: str) -> Observer:
        return self._substitutes.get((each.name, base_name), each.observers[base_name])

    def _counted(self, stage: str, modules: Sequence[ObservedModule]) -> Iterator[ObservedModule]:
        for done, each in enumerate(modules, start=1):
            yield each
            if self._progress is not None:
                self._progress(stage, done, len(modules))


def _has_global_scale(each: ObservedModule) -> bool:
    return any(args_of(each.scheme, name).strategy == _TENSOR_GROUP for name in each.observers)


def _weight_of(each: ObservedModule) -> torch.Tensor:
    """The module's weight, brought in where it is offloaded: ask once, keep it while needed."""
    weight: torch.Tensor = each.module.get_parameter("weight")
    return weight


@contextmanager
def _borrowed_memory(observer: Observer) -> Iterator[None]:
    """Give a weight's observer memory for its work alone; what it had gathered before is kept."""
    gathered = {name: value.clone() for name, value in observer.state().items()}
    try:
        yield
    finally:
        observer.load_state(gathered)


def _initialize(observed: Sequence[ObservedModule], choice: ObserverChoice) -> None:
    """Empty qparams on every module, with the observers that were really used in its scheme.

    Modules of one scheme share one object, as after `apply_quantization_config`.
    """
    recorded: dict[int, QuantizationScheme] = {}
    for each in observed:
        scheme = recorded.get(id(each.scheme))
        if scheme is None:
            scheme = recorded[id(each.scheme)] = each.scheme.model_copy(deep=True)
            _record_observers(scheme, choice)
        initialize_module_for_quantization(each.module, scheme)


def _record_observers(scheme: QuantizationScheme, choice: ObserverChoice) -> None:
    if scheme.weights is not None and needs_observer(scheme.weights):
        scheme.weights = choice.recorded_args("weight", scheme.weights)
    if scheme.input_activations is not None and needs_observer(scheme.input_activations):
        scheme.input_activations = choice.recorded_args("input", scheme.input_activations)
    if scheme.output_activations is not None and needs_observer(scheme.output_activations):
        scheme.output_activations = choice.recorded_args("output", scheme.output_activations)


def _report(
    each: ObservedModule,
    substitutes: Substitutes,
    weight_error: float | None,
) -> ModuleReport:
    chosen = {name: observer.args.observer for name, observer in each.observers.items()}
    weights = each.scheme.weights
    fallback = tuple(name for name in each.observers if (each.name, name) in substitutes)
    for base_name in fallback:
        logger.warning("{}.{} saw no data: the fallback was used", each.name, base_name)
    return ModuleReport(
        name=each.name,
        weight_observer=chosen.get("weight"),
        weight_bits=weights.num_bits if weights is not None else None,
        weight_error=weight_error,
        activation_observer=chosen.get("input", chosen.get("output")),
        tokens=each.tokens,
        fallback=fallback,
        objective=None
        if "weight" in fallback
        else getattr(each.weight_observer, "objective", None),
        activations=_activations(each.scheme),
    )


def _activations(scheme: QuantizationScheme) -> Literal["static", "local", "dynamic"] | None:
    """How activations are quantized: inputs tell, outputs where inputs are not quantized."""
    args = scheme.input_activations or scheme.output_activations
    if args is None:
        return None
    if args.dynamic == DynamicType.LOCAL:
        return "local"
    return "dynamic" if args.dynamic else "static"
