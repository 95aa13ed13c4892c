"""`attach`: observers onto a model, ready to see batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch

from calipers._unwrap import unwrap, without_wrappers
from calipers.calibration.checks import OnUnfit
from calipers.calibration.choice import ObserverChoice
from calipers.calibration.given import expect_model
from calipers.calibration.plan import plan_observers
from calipers.calibration.schemes import SchemeLike
from calipers.calibration.session import Calibration

__all__ = ["attach"]


def attach(
    model: torch.nn.Module,
    scheme: SchemeLike,
    *,
    observer: str | None = None,
    observer_options: Mapping[str, Any] | None = None,
    activation_observer: str | None = None,
    ignore: str | Iterable[str] = (),
    on_unfit: OnUnfit = "error",
    scheme_options: Mapping[str, Any] | None = None,
) -> Calibration:
    """Attach observers to every module that the scheme targets.

    Nothing else about the model changes: it runs in full precision until `Calibration.freeze`.
    Dynamically quantized activations get no observer; "local" ones (NVFP4 inputs) get one that
    watches the global range alone.

    Args:
        model: Any torch model with Linear or Embedding layers, offloaded or not. Of a wrapper
            (torch.compile, DataParallel and their like) the model inside is meant: modules have
            its names, and batches run through it uncompiled. Wrappers around single blocks are
            taken out until the calibration is frozen or detached.
        scheme: A QuantizationConfig, a QuantizationScheme, a preset name ("W4A16"), or the path
            of a YAML file; see `resolve_config`. Never changed.
        observer: Observer of weights; None takes the one that the scheme names, else
            "memoryless_minmax", which needs no batches ("optimal" is better where there are some).
        observer_options: Options of the weight observers, over those of the scheme.
        activation_observer: Observer of static activations; None takes the one that the scheme
            names, else "static_minmax".
        ignore: Modules left alone: names, class names or "re:" patterns, of layers or of what
            contains them. Output heads and routers are left alone in any case, unless a target of
            the scheme is the exact name of one.
        on_unfit: Modules whose columns a group size does not divide: "error" refuses the scheme,
            "skip" leaves them alone.
        scheme_options: Arguments of the scheme's weights that are to be others, as
            `{"group_size": 64}`; see `resolve_config`.

    Returns:
        The calibration: run batches, freeze, detach.

    Raises:
        SchemeError: An unknown scheme, or one that modules cannot take; lists all of them.
        CalipersError: Observers are attached already, an observer is unknown, or a path came in
            place of the model.
        ValueError: An unknown or invalid option. Nothing has been attached then.
    """
    expect_model(model, "calipers.attach(model, ...)")
    choice = ObserverChoice(observer, activation_observer, dict(observer_options or {}))
    inner = unwrap(model)
    with ExitStack() as wrappers:
        wrappers.enter_context(without_wrappers(inner))
        plan = plan_observers(inner, scheme, choice, ignore, on_unfit, scheme_options)
        return Calibration(inner, plan, wrappers.pop_all())
    raise AssertionError  # an ExitStack of these lets no exception vanish
