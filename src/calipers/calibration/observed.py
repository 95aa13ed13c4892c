"""`ObservedModule`: one module with its observers and the hooks that feed them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from torch.utils.hooks import RemovableHandle

from calipers.calibration.choice import ObserverChoice, needs_observer
from calipers.calibration.targets import Target
from calipers.observers import Observer
from calipers.observers.hooks import first_tensor
from calipers.observers.masks import current_mask
from calipers.observers.statistics import UpdateState

__all__ = ["ObservedModule", "build_observed"]


@dataclass(eq=False)
class ObservedModule:
    """A module to quantize, its observers by base name, and how many tokens it has seen.

    Attributes:
        name: The module's name in the model.
        module: The module itself.
        scheme: The scheme it gets.
        observers: "weight", "input", "output" to their observers.
        tokens: Tokens that passed through while attached, those aside that a mask leaves out;
            counted where data is observed.
        unmasked: Whether it saw, in a batch with a mask, a value that is not arranged by token
            (those of a routed expert), all of which counted.
    """

    name: str
    module: torch.nn.Module
    scheme: QuantizationScheme
    observers: dict[str, Observer]
    tokens: int = 0
    unmasked: bool = False
    _handles: list[RemovableHandle] = field(default_factory=list)
    _attached: bool = False
    _update: UpdateState = field(default_factory=UpdateState)
    _before_batch: tuple[int, bool] = (0, False)

    @property
    def weight_observer(self) -> Observer | None:
        """Observer of the weight, None where the scheme leaves weights alone."""
        return self.observers.get("weight")

    @property
    def activation_observers(self) -> dict[str, Observer]:
        """Observers of "input" and "output", those that there are."""
        return {name: each for name, each in self.observers.items() if name != "weight"}

    @property
    def wants_data(self) -> bool:
        """Whether any of its observers needs batches to run through the model."""
        weight = self.weight_observer
        return bool(self.activation_observers) or (weight is not None and weight.needs_data)

    def attach(self) -> None:
        """Add the observers as submodules `{base_name}_observer`, and the hooks."""
        self._attached = True
        for base_name, observer in self.observers.items():
            self.module.register_module(f"{base_name}_observer", observer)
            if base_name == "weight":
                observer.attach(self.module)
        if self.wants_data:
            self._hook(self.module.register_forward_pre_hook, self._see_input)
        if "output" in self.observers:
            self._hook(self.module.register_forward_hook, self._see_output)

    def remove_hooks(self) -> None:
        """Stop observing; the observers stay."""
        while self._handles:
            self._handles.pop().remove()
        weight = self.weight_observer
        if weight is not None and self._attached:
            weight.detach(self.module)

    def begin_batch(self) -> None:
        """Start a batch of the model; until `end_batch`, `undo_batch` takes it back."""
        self._before_batch = self.tokens, self.unmasked
        for observer in self.observers.values():
            observer.begin_batch()

    def end_batch(self) -> None:
        """Keep what the batch gave."""
        for observer in self.observers.values():
            observer.end_batch()

    def undo_batch(self) -> None:
        """Forget what the batch gave."""
        self.tokens, self.unmasked = self._before_batch
        for observer in self.observers.values():
            observer.undo_batch()

    def detach(self) -> None:
        """Remove hooks and observers; nothing of them stays on the module."""
        self.remove_hooks()
        if self._attached:
            for base_name in self.observers:
                self.module._modules.pop(f"{base_name}_observer", None)
        self._attached = False

    def _hook(self, register: Callable[..., RemovableHandle], hook: Callable[..., None]) -> None:
        self._handles.append(register(hook, with_kwargs=True))

    @torch.no_grad()
    def _see_input(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        value = first_tensor([*args, *kwargs.values()])
        if value is None:
            return
        if isinstance(module, torch.nn.Embedding):
            value = value.unsqueeze(-1)  # ids
        mask = current_mask()
        elements = value.numel()
        if mask is not None and mask.fits(value.shape):
            elements = mask.counted(value)
        with self._update.lock:
            self.tokens += elements // max(1, value.shape[-1])
        if "input" in self.observers:
            self._feed("input", value)
        elif mask is not None and not mask.fits(value.shape):
            self.unmasked = True

    @torch.no_grad()
    def _see_output(
        self,
        module: torch.nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        output: object,
    ) -> None:
        outputs = output if isinstance(output, (list, tuple)) else [output]
        value = first_tensor(outputs)
        if value is not None:
            self._feed("output", value)

    def _feed(self, base_name: str, value: torch.Tensor) -> None:
        observer = self.observers[base_name]
        if value.numel() == 0:
            return
        mask = current_mask()
        if mask is not None:
            if mask.fits(value.shape):
                value = mask.select(value)
            else:
                self.unmasked = True
        if args_of(self.scheme, base_name).dynamic:
            observer.observe_global(value.detach())
        else:
            observer.observe(value.detach())


def args_of(scheme: QuantizationScheme, base_name: str) -> QuantizationArgs:
    """The scheme's arguments for "weight", "input" or "output"; they must be there."""
    args: QuantizationArgs | None = {
        "weight": scheme.weights,
        "input": scheme.input_activations,
        "output": scheme.output_activations,
    }[base_name]
    if args is None:
        raise KeyError(base_name)
    return args


def build_observed(targets: Iterable[Target], choice: ObserverChoice) -> list[ObservedModule]:
    """Build the observers of all targets; nothing is attached.

    Raises:
        ValueError: An unknown observer or an invalid option.
    """
    return [
        ObservedModule(
            target.name,
            target.module,
            target.scheme,
            {
                base_name: choice.build(target.name, base_name, args, target.module)
                for base_name, args in target.args.items()
                if needs_observer(args)
            },
        )
        for target in targets
    ]
