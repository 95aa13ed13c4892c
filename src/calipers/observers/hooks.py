"""The hooks of calipers on modules: inputs, outputs and calls, to those who want to see them.

No other file of the package sets a hook on a module. `calipers.calibration` sets these for a whole
model, `Observer.attach` for one module by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple, TypeAlias

from torch import Tensor, nn

from calipers.observers.masks import current_mask
from calipers.ranges.surroundings import undisturbed

__all__ = ["Seen", "Side", "add_call_hook", "add_hook", "first_tensor", "remove_hooks"]

Side: TypeAlias = Literal["input", "output"]


class Seen(NamedTuple):
    """What one call of a module shows on one side.

    Args:
        side: Which side.
        value: The first tensor, detached; those tokens of it that count where the mask of the batch
            fits. Ids of an Embedding have a last dimension of 1.
        tokens: How many tokens that are: values over the size of the last dimension.
        unmasked: Whether the batch has a mask that does not fit the value, so that all counts.
    """

    side: Side
    value: Tensor
    tokens: int
    unmasked: bool


def first_tensor(values: Iterable[object]) -> Tensor | None:
    """The input of a module among the arguments that its hook is given; None without one."""
    return next((value for value in values if isinstance(value, Tensor)), None)


def add_hook(module: nn.Module, side: Side, receive: Callable[[Seen], object]) -> None:
    """Let a bound method see what a module is called with, or what it returns.

    It is called without gradients, autocast and inference mode, and only where there is a value.
    Copies of the module call the copy of the method's owner.

    Args:
        module: The module.
        side: "input" or "output".
        receive: A method of the owner, by which `remove_hooks` knows the hook again.
    """
    if side == "input":
        module.register_forward_pre_hook(_Hook(receive), with_kwargs=True)
    else:
        module.register_forward_hook(_Hook(receive), with_kwargs=True)


def add_call_hook(module: nn.Module, receive: Callable[[nn.Module], object]) -> None:
    """Call a bound method with a module whenever that is called; see `add_hook`."""
    module.register_forward_pre_hook(_CallHook(receive))


def remove_hooks(module: nn.Module, owner: object) -> None:
    """Remove the hooks whose methods are of this owner, and no others."""
    # By owner rather than by handles kept somewhere, so that copies of a model detach as well.
    for side in ("_forward_pre_hooks", "_forward_hooks"):
        hooks = getattr(module, side)
        for key in [k for k, hook in hooks.items() if getattr(hook, "owner", None) is owner]:
            del hooks[key]
            getattr(module, f"{side}_with_kwargs").pop(key, None)


class _CallHook:
    """A forward hook; a class, so that a copied model can be pickled with it."""

    def __init__(self, receive: Callable[..., object]) -> None:
        self.receive = receive

    @property
    def owner(self) -> object:
        return getattr(self.receive, "__self__", None)

    def __call__(self, module: nn.Module, *_: Any) -> None:
        self.receive(module)


class _Hook(_CallHook):
    """A forward hook that finds the value, and the tokens of it that count."""

    @undisturbed()
    def __call__(self, module: nn.Module, *call: Any) -> None:
        args, kwargs, *output = call
        values: Iterable[object] = (*args, *kwargs.values())
        if output:
            values = output[0] if isinstance(output[0], (list, tuple)) else output
        value = first_tensor(values)
        if value is None or not value.numel():
            return
        value = value.detach()
        if isinstance(module, nn.Embedding) and not output:
            value = value.unsqueeze(-1)
        mask = None if value.is_nested else current_mask()
        fits = mask is not None and mask.fits(value.shape)
        if mask is not None and fits:
            value = mask.select(value)
        features = 1 if value.is_nested or not value.dim() else value.shape[-1]
        tokens = value.numel() // max(1, features)
        side: Side = "output" if output else "input"
        self.receive(Seen(side, value, tokens, mask is not None and not fits))
