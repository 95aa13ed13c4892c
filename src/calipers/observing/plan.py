"""`plan_statistics`: a plan that watches all a model's layers, for no scheme in particular."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from torch import nn

from calipers.calibration.attention import STATES, find_attention, find_model_problems
from calipers.calibration.checks import resolve_and_check
from calipers.calibration.config import resolve_config
from calipers.calibration.observed import ObservedModule, ObservedTensor
from calipers.calibration.parts import Only
from calipers.calibration.plan import ObserverChoice, Plan
from calipers.calibration.targets import Target
from calipers.checkpoint.names import checkpoint_names
from calipers.errors import CalipersError, SchemeError
from calipers.observers import Observer, OptimalObserver, StaticMinMaxObserver
from calipers.observers.histogram import HistogramObserver
from calipers.statistics_files.derive import finest_args, product_args
from calipers.statistics_files.manifest import Options

__all__ = ["kinds_of", "plan_statistics", "renamed_modules"]

#: What stands for any activation that has one scale.
_TENSOR = QuantizationArgs(num_bits=8, strategy="tensor")


def plan_statistics(
    model: nn.Module,
    options: Options,
    ignore: str | Iterable[str] = (),
    include: str | Iterable[str] = (),
    only: Only | None = None,
) -> Plan:
    """Resolve which modules are watched, and build what watches them; the model is not touched.

    Args:
        model: With experts taken apart.
        options: What is gathered.
        ignore: Modules left alone, as in `calibrate`.
        include: Exact names of layers that are left alone otherwise: output heads, routers.
        only: As in `calibrate`.

    Raises:
        SchemeError: Patterns that match nothing, modules that cannot be quantized anyway, states of
            attention that cannot be watched.
    """
    exact = [include] if isinstance(include, str) else list(include)
    scheme = QuantizationScheme(
        targets=["Linear", *exact],
        weights=product_args(None),
        input_activations=_TENSOR,
        output_activations=_TENSOR if options.outputs else None,
    )
    config = QuantizationConfig(config_groups={"group_0": scheme})
    kv_cache = _TENSOR if options.states else None
    config = resolve_config(config, ignore, kv_cache=kv_cache)
    resolution = resolve_and_check(model, config, "error", only)
    targets = resolution.targets
    if options.states == "qkv":
        targets = _with_queries(model, targets)
    if not targets:
        raise CalipersError("there is nothing to observe: the model has no Linear that is not left")
    observed = [_observed(each, options) for each in targets]
    return Plan(config, resolution, observed, ObserverChoice(has_data=True))


def renamed_modules(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Modules to their names in checkpoints, where those are others."""
    found = checkpoint_names(model, names)
    return {name: stored for name, stored in found.items() if stored != name}


def kinds_of(tensor: ObservedTensor) -> dict[str, Observer]:
    """The observers of a tensor by the kind of statistics that they gather."""
    if tensor.base_name == "weight":
        return {"moments": tensor.observer}
    return dict(zip(("extremes", "histogram"), tensor.observers, strict=False))


def _with_queries(model: nn.Module, targets: list[Target]) -> list[Target]:
    names = [each.name for each in targets if each.is_attention]
    problems = list(find_model_problems(model, find_attention(model), names, cache=True))
    if problems:
        raise SchemeError("\n  ".join(["queries cannot be watched:", *problems]))
    return [replace(each, base_names=STATES) if each.is_attention else each for each in targets]


def _observed(target: Target, options: Options) -> ObservedModule:
    tensors = {}
    for base_name, args in target.args.items():
        if base_name == "weight":
            objective = "imatrix" if options.products is None else "hessian"
            observers: list[Observer] = [
                OptimalObserver(
                    base_name, product_args(options.products), target.module, objective=objective
                )
            ]
        else:
            fine = finest_args(base_name)
            observers = [StaticMinMaxObserver(base_name, fine, target.module)]
            if options.histograms:
                # an attention state by head, which is as cheap; an input as a whole
                whole = args if fine.group_size else fine
                observers.append(HistogramObserver(base_name, whole, target.module))
        for observer in observers:
            observer.name = f"{target.name}.{base_name}" if target.name else base_name
        tensors[base_name] = ObservedTensor(target.name, target.module, base_name, args, observers)
    return ObservedModule(target.name, target.module, target.scheme, tensors)
