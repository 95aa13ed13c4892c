"""`attach`: observers onto a model, ready to see batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from compressed_tensors.offload import disable_onloading
from compressed_tensors.quantization import QuantizationConfig
from loguru import logger

from calipers.calibration.checks import check_scheme
from calipers.calibration.choice import ObserverChoice
from calipers.calibration.observed import ObservedModule, build_observed
from calipers.calibration.schemes import SchemeLike, resolve_config
from calipers.calibration.session import Calibration
from calipers.errors import CalipersError
from calipers.observers import Observer

__all__ = ["attach", "plan_observers"]


def attach(
    model: torch.nn.Module,
    scheme: SchemeLike,
    *,
    observer: str | None = None,
    observer_options: Mapping[str, Any] | None = None,
    activation_observer: str | None = None,
    ignore: str | Iterable[str] = ("lm_head",),
) -> Calibration:
    """Attach observers to every module that the scheme targets.

    Nothing else about the model changes: it runs in full precision until `Calibration.freeze`.
    Dynamically quantized activations get no observer; "local" ones (NVFP4 inputs) get one that
    watches the global range alone.

    Args:
        model: Any torch model with Linear or Embedding layers, offloaded or not.
        scheme: A QuantizationConfig, a QuantizationScheme, a preset name ("W4A16"), or the path
            of a YAML file; see `resolve_config`. Never changed.
        observer: Observer of weights; None takes the one that the scheme names, else
            "memoryless_minmax", which needs no batches ("optimal" is better where there are some).
        observer_options: Options of the weight observers, over those of the scheme.
        activation_observer: Observer of static activations; None takes the one that the scheme
            names, else "static_minmax".
        ignore: Modules left alone: names, class names or "re:" patterns.

    Returns:
        The calibration: run batches, freeze, detach.

    Raises:
        SchemeError: An unknown scheme, or one that modules cannot take; lists all of them.
        CalipersError: Observers are attached already, or an observer is unknown.
        ValueError: An unknown or invalid option. Nothing has been attached then.
    """
    choice = ObserverChoice(observer, activation_observer, dict(observer_options or {}))
    config, observed = plan_observers(model, scheme, choice, ignore)
    return Calibration(model, config, observed, choice)


def plan_observers(
    model: torch.nn.Module,
    scheme: SchemeLike,
    choice: ObserverChoice,
    ignore: str | Iterable[str],
) -> tuple[QuantizationConfig, list[ObservedModule]]:
    """Resolve, check and build all that `attach` needs; the model is not touched.

    Raises:
        ValueError: As `attach`.
    """
    _refuse_twice(model)
    config = resolve_config(scheme, ignore)
    observed = build_observed(check_scheme(model, config), choice)
    _warn_of_fused_experts(model)
    return config, observed


def _warn_of_fused_experts(model: torch.nn.Module) -> None:
    """Say that experts kept in one parameter stay unquantized: it would show at loading only."""
    with disable_onloading():
        names = [
            name
            for name, module in model.named_modules()
            if any(p is not None and p.ndim == 3 for p in module._parameters.values())
            and not isinstance(module, torch.nn.modules.conv._ConvNd)
        ]
    if names:
        logger.warning(
            "{} modules hold experts fused into one parameter ({}, ...), which compressed-tensors "
            "cannot quantize: they stay as they are, and transformers cannot load a checkpoint of "
            "such a model back, since it expects quantized experts",
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
