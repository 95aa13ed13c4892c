"""What a calibration will do to a model, settled before any work: `plan_observers`."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from compressed_tensors.offload import disable_onloading
from compressed_tensors.quantization import DynamicType, QuantizationArgs, QuantizationConfig
from loguru import logger

from calipers.calibration.architectures import has_fused_experts
from calipers.calibration.attention import STATES
from calipers.calibration.checks import OnUnfit, resolve_and_check
from calipers.calibration.config import KVCacheLike, SchemeLike, resolve_config
from calipers.calibration.held_out import Samples
from calipers.calibration.observed import ObservedModule, ObservedTensor, build_observer
from calipers.calibration.parts import Only
from calipers.calibration.shadows import Shadows
from calipers.calibration.targets import TENSORS, Reason, Resolution, Target
from calipers.errors import CalipersError, MissingDataError
from calipers.observers import Observer
from calipers.observers.options import check_option_names
from calipers.observers.plugins import spelled_as_registered

__all__ = [
    "ObserverChoice",
    "Plan",
    "needs_observer",
    "plan_observers",
    "refuse_beside_statistics",
    "refuse_without_data",
    "without_modules",
]

_DEFAULT_WEIGHT_OBSERVER = "optimal"
#: Without data: on weights the smallest plain squared error can make a model worse than this.
_DEFAULT_WITHOUT_DATA = "memoryless_minmax"
_DEFAULT_ACTIVATION_OBSERVER = "static_minmax"


def needs_observer(args: QuantizationArgs) -> bool:
    """Static quantization needs one, "local" one for its global scale, dynamic none."""
    return args.dynamic in (False, DynamicType.LOCAL)


@dataclass(frozen=True)
class ObserverChoice:
    """What the caller asked for; it comes before what the scheme names and before the defaults.

    Args:
        weight: Observer of weights; None takes the scheme's, else "optimal" where there is data and
            "memoryless_minmax" where there is none (and for an Embedding, which has no inputs).
        activation: Observer of static activations; None takes the scheme's, else "static_minmax".
        options: Options of the weight observers, over those of the scheme.
        has_data: Whether batches will be run.
        shadows: Which observers look at each tensor beside these.
    """

    weight: str | None = None
    activation: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    has_data: bool = False
    shadows: Shadows = field(default_factory=Shadows)

    def check(self) -> None:
        """Refuse what needs no model to be known as wrong, before anything is done to one.

        Raises:
            CalipersError: An unknown observer.
            ValueError: An option that the observer named for weights does not have.
        """
        for name in (self.weight, self.activation):
            if name is not None:
                Observer.get_value_from_registry(spelled_as_registered(name))
        if self.weight is not None:
            kind = Observer.get_value_from_registry(spelled_as_registered(self.weight))
            given = [name for name in self.options if name not in kind.ignored_options]
            check_option_names(kind.__name__, kind.Options, given)

    def build(
        self, name: str, base_name: str, args: QuantizationArgs, module: torch.nn.Module
    ) -> Observer:
        """Build the observer of one tensor; nothing is attached.

        Args:
            name: The module's name in the model; the observer is called "{name}.{base_name}".
            base_name: A key of `TENSORS`.
            args: The tensor's arguments; never changed.
            module: The module that holds it.

        Raises:
            CalipersError: Unknown observer (lists the known ones), or one that weighs weights by
                inputs chosen for an activation or an Embedding.
            ValueError: Unknown or invalid options, from the observer itself.
        """
        choice = self
        if base_name == "weight" and isinstance(module, torch.nn.Embedding):
            choice = replace(self, has_data=False)
        chosen = choice.name_for(base_name, args)
        observer = build_observer(name, base_name, choice.recorded_args(base_name, args), module)
        if observer.needs_data:
            why = f"observer {chosen!r} weighs a weight by its layer's inputs: it cannot measure"
            if base_name != "weight":
                raise CalipersError(f"{why} the {base_name} activations of {name}")
            if isinstance(module, torch.nn.Embedding):
                told = f"the Embedding {name}, whose inputs are token ids; ignore it"
                raise CalipersError(f"{why} {told}")
        return observer

    def name_for(self, base_name: str, args: QuantizationArgs) -> str:
        """The observer's name as registered, with underscores."""
        if base_name == "weight":
            default = _DEFAULT_WEIGHT_OBSERVER if self.has_data else _DEFAULT_WITHOUT_DATA
            chosen = self.weight or args.observer or default
        else:
            chosen = self.activation or args.observer or _DEFAULT_ACTIVATION_OBSERVER
        return spelled_as_registered(chosen)

    def recorded_args(self, base_name: str, args: QuantizationArgs) -> QuantizationArgs:
        """A copy of the arguments that names the observer used and all options given.

        Options that the scheme gives to one observer are not handed to another.
        """
        chosen = self.name_for(base_name, args)
        same = args.observer is None or spelled_as_registered(args.observer) == chosen
        options = dict(args.observer_kwargs) if same else {}
        if base_name == "weight":
            options.update(self.options)
        return args.model_copy(update={"observer": chosen, "observer_kwargs": options}, deep=True)


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

    @property
    def states(self) -> dict[str, tuple[str, ...]]:
        """The states that are observed of each attention module, by its name."""
        return {each.name: tuple(each.tensors) for each in self.observed if each.is_attention}


def plan_observers(
    model: torch.nn.Module,
    scheme: SchemeLike | None,
    choice: ObserverChoice,
    ignore: str | Iterable[str],
    on_unfit: OnUnfit = "error",
    scheme_options: Mapping[str, Any] | None = None,
    kv_cache: KVCacheLike = None,
    only: Only | None = None,
    *,
    spare_shadows: bool = False,
) -> Plan:
    """Resolve, check and build all that `attach` needs; the model is not touched.

    With `spare_shadows` those that would look at nothing are left out of the plan's choice, where
    they are refused otherwise.

    Raises:
        ValueError: As `attach`.
    """
    choice.check()
    _refuse_twice(model)
    config = resolve_config(scheme, ignore, scheme_options, kv_cache)
    resolution = resolve_and_check(model, config, on_unfit, only)
    _warn_of_fused_experts(model)
    observed = [_observed(each, choice) for each in resolution.targets]
    tensors = [tensor for each in observed for tensor in each.tensors.values()]
    built = [(each.base_name, each.observers) for each in tensors]
    if spare_shadows:
        choice = replace(choice, shadows=choice.shadows.without_unused(built))
    else:
        choice.shadows.refuse_unused(built)
    return Plan(config, resolution, observed, choice)


def without_modules(plan: Plan, names: Collection[str], reason: Reason) -> Plan:
    """The plan with these modules left alone, for one reason."""
    if not names:
        return plan
    resolution = plan.resolution.without(dict.fromkeys(names, reason))
    observed = [each for each in plan.observed if each.name not in names]
    return replace(plan, resolution=resolution, observed=observed)


def refuse_beside_statistics(data: bool, shadows: Shadows, all_experts: bool) -> None:
    """Refuse what makes no sense where statistics stand in for data.

    Args:
        data: Whether there is data as well.
        shadows: Observers to be compared.
        all_experts: Whether every expert is to see every token.

    Raises:
        CalipersError: Names it.
    """
    told = "statistics (--statistics) stand in for data, so that"
    if data:
        raise CalipersError(f"{told} there cannot be data (--data) as well")
    if shadows:
        raise CalipersError(f"{told} observers cannot be compared: shadows (--shadow) need data")
    if all_experts:
        raise CalipersError(f"{told} all_experts (--all-experts) has no effect: observe with it")


def refuse_without_data(plan: Plan) -> None:
    """Refuse observers that need data where there is none.

    Raises:
        MissingDataError: Says why, and for which modules.
    """
    reasons: dict[str, list[str]] = {}
    for tensor in (tensor for each in plan.observed for tensor in each.tensors.values()):
        kind = type(tensor.observer).__name__
        if tensor.base_name != "weight":
            why = f"{_what(tensor)} are quantized statically ({kind} must see them)"
        else:
            asking = [type(each).__name__ for each in tensor.observers if each.needs_data]
            if not asking:
                continue
            why = f"{asking[0]} weighs weights by their layer's inputs"
        reasons.setdefault(why, []).append(tensor.name)
    if reasons:
        lines = [
            f"  {why}: {len(names)} modules, {names[0]}{', ...' * (len(names) > 1)}"
            for why, names in reasons.items()
        ]
        raise MissingDataError(
            "\n".join(
                [
                    "this calibration needs data, and data is None:",
                    *lines,
                    "Pass data= (--data FILE): batches, as mappings of arguments (input_ids=...), "
                    "tensors, or tuples of arguments; or text, as strings or a file, with "
                    "tokenizer=.",
                ]
            )
        )


def _what(tensor: ObservedTensor) -> str:
    kind = "states of attention" if tensor.base_name in STATES else "activations"
    return f"{tensor.base_name} {kind}"


def _observed(target: Target, choice: ObserverChoice) -> ObservedModule:
    """A target with its observers, attached to nothing."""
    tensors = {}
    for base_name, args in target.args.items():
        if needs_observer(args):
            where = (target.name, base_name, args, target.module)
            first = choice.build(*where)
            observers = [first, *choice.shadows.build(*where, first)]
            tensors[base_name] = ObservedTensor(
                target.name, target.module, base_name, args, observers
            )
    # Batches are held out from all modules alike, sampled where there is something to judge.
    judged = {
        TENSORS[name].side
        for name, each in tensors.items()
        if len(each.observers) > 1 or name != "weight"
    }
    samples = None
    if choice.shadows or judged:
        samples = Samples(judged, holds_out=bool(choice.shadows))
    return ObservedModule(target.name, target.module, target.scheme, tensors, samples=samples)


def _warn_of_fused_experts(model: torch.nn.Module) -> None:
    """Say that experts stay unquantized that could not be taken apart into Linear layers."""
    with disable_onloading():
        fused = {name: each for name, each in model.named_modules() if has_fused_experts(each)}
    hooked = [name for name, module in fused.items() if hasattr(module, "_hf_hook")]
    if hooked:
        logger.warning(
            "{} modules hold experts fused into one parameter ({}, ...) and have hooks of "
            "accelerate around their forwards, so that they cannot be taken apart: they stay as "
            "they are, unless compressed_tensors.offload.from_accelerate(model) takes the hooks "
            "off before",
            len(hooked),
            hooked[0],
        )
    names = [name for name in fused if name not in hooked]
    if names:
        logger.warning(
            "{} modules hold experts fused into one parameter ({}, ...) in a way that is not "
            "known, so that they cannot be quantized: they stay as they are, and under packed "
            "formats transformers cannot load the checkpoint back, since it expects quantized "
            "experts (save checks that)",
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
