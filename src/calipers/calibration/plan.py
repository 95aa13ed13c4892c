"""`plan_observers`: what a calibration will do to a model, settled before any work."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from compressed_tensors.offload import disable_onloading
from compressed_tensors.quantization import QuantizationConfig
from loguru import logger

from calipers.calibration.architectures import has_fused_experts
from calipers.calibration.calls import find_never_called
from calipers.calibration.checks import OnUnfit, resolve_and_check
from calipers.calibration.choice import ObserverChoice
from calipers.calibration.observed import ObservedModule, build_observed
from calipers.calibration.schemes import SchemeLike, resolve_config
from calipers.calibration.targets import Reason, Resolution
from calipers.errors import CalipersError
from calipers.observers import Observer

__all__ = ["Plan", "plan_observers", "without_modules", "without_never_called"]


@dataclass(frozen=True)
class Plan:
    """What a calibration will do, known before any work.

    Attributes:
        config: The resolved config.
        resolution: The modules to quantize, and those left alone with their reasons.
        observed: The modules to quantize with their observers, attached to nothing.
        choice: How the observers were chosen.
    """

    config: QuantizationConfig
    resolution: Resolution
    observed: list[ObservedModule]
    choice: ObserverChoice


def plan_observers(
    model: torch.nn.Module,
    scheme: SchemeLike,
    choice: ObserverChoice,
    ignore: str | Iterable[str],
    on_unfit: OnUnfit = "error",
    scheme_options: Mapping[str, Any] | None = None,
) -> Plan:
    """Resolve, check and build all that `attach` needs; the model is not touched.

    Raises:
        ValueError: As `attach`.
    """
    choice.check()
    _refuse_twice(model)
    config = resolve_config(scheme, ignore, scheme_options)
    resolution = resolve_and_check(model, config, on_unfit)
    _warn_of_fused_experts(model)
    return Plan(config, resolution, build_observed(resolution.targets, choice), choice)


def without_never_called(model: torch.nn.Module, plan: Plan) -> Plan:
    """The plan less the layers that the model's own example input passes by.

    For a calibration without data, whose batches would tell; see `find_never_called`.
    """
    uncalled = find_never_called(model, [each.name for each in plan.observed])
    return without_modules(plan, uncalled, "never called")


def without_modules(plan: Plan, names: Collection[str], reason: Reason) -> Plan:
    """The plan with these modules left alone, for one reason."""
    if not names:
        return plan
    resolution = plan.resolution.without(dict.fromkeys(names, reason))
    observed = [each for each in plan.observed if each.name not in names]
    return replace(plan, resolution=resolution, observed=observed)


def _warn_of_fused_experts(model: torch.nn.Module) -> None:
    """Say that experts kept in one parameter stay unquantized, which no table of layers shows."""
    with disable_onloading():
        names = [name for name, module in model.named_modules() if has_fused_experts(module)]
    if names:
        logger.warning(
            "{} modules hold experts fused into one parameter ({}, ...), which compressed-tensors "
            "cannot quantize: they stay as they are, and under packed formats transformers cannot "
            "load the checkpoint back, since it expects quantized experts (save checks that)",
            len(names),
            names[0],
        )


def _refuse_twice(model: torch.nn.Module) -> None:
    names = [name for name, module in model.named_modules() if isinstance(module, Observer)]
    if names:
        raise CalipersError(
            f"the model has {len(names)} observers attached already ({names[0]}, ...): call "
            "detach() on their calibration first"
        )
