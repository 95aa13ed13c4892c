"""`build_observer`: which observer measures a tensor, and with which options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from compressed_tensors.quantization import DynamicType, QuantizationArgs

from calipers.errors import CalipersError
from calipers.observers import Observer
from calipers.observers.options import check_option_names

__all__ = ["ObserverChoice", "needs_observer"]

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
    """

    weight: str | None = None
    activation: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    has_data: bool = False

    def check(self) -> None:
        """Refuse what needs no model to be known as wrong, before anything is done to one.

        Raises:
            CalipersError: An unknown observer.
            ValueError: An option that the observer named for weights does not have.
        """
        for name in (self.weight, self.activation):
            if name is not None:
                Observer.get_value_from_registry(_normal(name))
        if self.weight is not None:
            kind = Observer.get_value_from_registry(_normal(self.weight))
            given = [name for name in self.options if name not in kind.ignored_options]
            check_option_names(kind.__name__, kind.Options, given)

    def build(
        self, name: str, base_name: str, args: QuantizationArgs, module: torch.nn.Module
    ) -> Observer:
        """Build the observer of one tensor; nothing is attached.

        Args:
            name: The module's name in the model; the observer is called "{name}.{base_name}".
            base_name: "weight", "input" or "output".
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
        observer: Observer = Observer.load_from_registry(
            chosen,
            base_name=base_name,
            args=choice.recorded_args(base_name, args),
            module=module,
        )
        if observer.needs_data:
            _refuse_without_inputs(chosen, name, base_name, module)
        observer.name = f"{name}.{base_name}" if name else base_name
        return observer

    def name_for(self, base_name: str, args: QuantizationArgs) -> str:
        """The observer's name as registered, with underscores."""
        if base_name == "weight":
            default = _DEFAULT_WEIGHT_OBSERVER if self.has_data else _DEFAULT_WITHOUT_DATA
            chosen = self.weight or args.observer or default
        else:
            chosen = self.activation or args.observer or _DEFAULT_ACTIVATION_OBSERVER
        return _normal(chosen)

    def recorded_args(self, base_name: str, args: QuantizationArgs) -> QuantizationArgs:
        """A copy of the arguments that names the observer used and all options given.

        Options that the scheme gives to one observer are not handed to another.
        """
        chosen = self.name_for(base_name, args)
        same = args.observer is None or _normal(args.observer) == chosen
        options = dict(args.observer_kwargs) if same else {}
        if base_name == "weight":
            options.update(self.options)
        return args.model_copy(update={"observer": chosen, "observer_kwargs": options}, deep=True)


def _refuse_without_inputs(chosen: str, name: str, base_name: str, module: torch.nn.Module) -> None:
    why = f"observer {chosen!r} weighs a weight by its layer's inputs: it cannot measure"
    if base_name != "weight":
        raise CalipersError(f"{why} the {base_name} activations of {name}")
    if isinstance(module, torch.nn.Embedding):
        raise CalipersError(f"{why} the Embedding {name}, whose inputs are token ids; ignore it")


def _normal(name: str) -> str:
    return name.lower().replace("-", "_")
