"""The hooks of calipers on modules, for whoever wants inputs, outputs, attention states or calls.

No other file of the package sets a hook on a module. `calipers.calibration` sets these for a whole
model, `Observer.attach` for one module by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple, TypeAlias

from compressed_tensors.modeling import IMPL_ATTR, KV_CACHE_ATTR
from torch import Tensor, nn

from calipers.observers.masks import current_mask
from calipers.observers.shared_updates import SharedUpdates, updates_of
from calipers.ranges.surroundings import undisturbed

__all__ = ["Seen", "Side", "add_call_hook", "add_hook", "first_tensor", "remove_hooks"]

Side: TypeAlias = Literal["input", "output", "q", "k", "v"]


class Seen(NamedTuple):
    """What one call of a module shows on one side.

    Args:
        side: Which side.
        value: The first tensor, detached; those tokens of it that count where the mask of the batch
            fits. Ids of an Embedding have a last dimension of 1; an attention state has the shape
            (batch, heads, tokens, head_dim), or (heads, tokens, head_dim) once tokens are left out.
        tokens: How many tokens that are: values over the size of the last dimension, of an
            attention state over that of all heads.
        unmasked: Whether the batch has a mask that does not fit the value, so that all counts.
        updates: What observers of other modules learnt from the same value, just before; None where
            that is not known.
    """

    side: Side
    value: Tensor
    tokens: int
    unmasked: bool
    updates: SharedUpdates | None = None


def first_tensor(values: Iterable[object]) -> Tensor | None:
    """The input of a module among the arguments that its hook is given; None without one."""
    return next((value for value in values if isinstance(value, Tensor)), None)


def add_hook(module: nn.Module, side: Side, receive: Callable[[Seen], object]) -> None:
    """Let a bound method see what a module is called with, what it returns, or an attention state.

    It is called without gradients, autocast and inference mode, and only where there is a value.
    Copies of the module call the copy of the method's owner.

    Args:
        module: The module; for a state an attention module with the submodules of
            compressed-tensors that states pass through.
        side: "input", "output", or the state "q", "k" or "v".
        receive: A method of the owner, by which `remove_hooks` knows the hook again.
    """
    state = _STATES.get(side)
    if state is not None:
        carrier = module.get_submodule(state.carrier)
        carrier.register_forward_pre_hook(_StateHook(receive, side, state), with_kwargs=True)
    elif side == "input":
        module.register_forward_pre_hook(_Hook(receive), with_kwargs=True)
    else:
        module.register_forward_hook(_Hook(receive), with_kwargs=True)


def add_call_hook(module: nn.Module, receive: Callable[[nn.Module], object]) -> None:
    """Call a bound method with a module whenever that is called; see `add_hook`."""
    module.register_forward_pre_hook(_CallHook(receive))


def remove_hooks(module: nn.Module, owner: object) -> None:
    """Remove the hooks whose methods are of this owner, and no others."""
    # By owner rather than by handles kept somewhere, so that copies of a model detach as well.
    carriers = (module._modules.get(name) for name in (IMPL_ATTR, KV_CACHE_ATTR))
    for each in (module, *carriers):
        if each is None:
            continue
        for side in ("_forward_pre_hooks", "_forward_hooks"):
            hooks = getattr(each, side)
            for key in [k for k, hook in hooks.items() if getattr(hook, "owner", None) is owner]:
                del hooks[key]
                getattr(each, f"{side}_with_kwargs").pop(key, None)


class _State(NamedTuple):
    """Where an attention state passes by: a submodule of compressed-tensors, and its argument."""

    carrier: str
    place: int
    argument: str


_STATES: dict[str, _State] = {
    "q": _State(IMPL_ATTR, 1, "query"),
    "k": _State(KV_CACHE_ATTR, 0, "key_states"),
    "v": _State(KV_CACHE_ATTR, 1, "value_states"),
}


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
        side: Side = "output" if output else "input"
        mask = None if value.is_nested else current_mask()
        ids = isinstance(module, nn.Embedding) and not output
        updates = None if ids else updates_of(value, mask)
        if updates is not None and updates.seen is not None:
            self.receive(updates.seen._replace(side=side))
            return
        value = value.detach()
        if ids:
            value = value.unsqueeze(-1)
        fits = mask is not None and mask.fits(value.shape)
        if mask is not None and fits:
            value = mask.select(value)
        features = 1 if value.is_nested or not value.dim() else value.shape[-1]
        tokens = value.numel() // max(1, features)
        seen = Seen(side, value, tokens, mask is not None and not fits, updates)
        if updates is not None:
            updates.seen = seen
        self.receive(seen)


class _StateHook(_CallHook):
    """A hook on what an attention state passes through; finds the tokens of it that count."""

    def __init__(self, receive: Callable[..., object], side: Side, state: _State) -> None:
        super().__init__(receive)
        self.side: Side = side
        self.state = state

    @undisturbed()
    def __call__(self, module: nn.Module, *call: Any) -> None:
        args, kwargs = call
        place = self.state.place
        value = args[place] if len(args) > place else kwargs.get(self.state.argument)
        if not isinstance(value, Tensor) or not value.numel():
            return
        value = value.detach()
        mask = current_mask()
        # A mask is of (batch, tokens), and heads come before tokens here.
        by_token = value.transpose(1, 2) if value.dim() == 4 else value
        fits = mask is not None and value.dim() == 4 and mask.fits(by_token.shape)
        if mask is not None and fits:
            value = mask.select(by_token).transpose(0, 1)
        of_a_token = value.shape[-1] * (value.shape[-3] if value.dim() > 2 else 1)
        tokens = value.numel() // max(1, of_a_token)
        self.receive(Seen(self.side, value, tokens, mask is not None and not fits))
