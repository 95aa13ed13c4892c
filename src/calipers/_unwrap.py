"""`unwrap`: the model inside of torch.compile, DataParallel and their like."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["unwrap", "without_wrappers"]

#: Under these names wrappers hold the one module that they add nothing to: torch.compile,
#: DataParallel and DistributedDataParallel, FSDP, activation checkpointing.
_INNER_NAMES = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def unwrap(model: nn.Module) -> nn.Module:
    """The innermost model of nested wrappers; a model that is none comes back as it is.

    A wrapper is a module that holds nothing but one child, under a name that torch's own wrappers
    use (`_orig_mod`, `module`, ...): torch.compile, DataParallel, DistributedDataParallel and
    classes made like them. The inner model is the same object, so what is done to it shows through
    the wrapper.
    """
    inner = _inner(model)
    while inner is not None:
        model, inner = inner, _inner(inner)
    return model


@contextmanager
def without_wrappers(model: nn.Module) -> Iterator[None]:
    """Take out the wrappers inside of a model, and put them back at the end.

    For models of which single blocks are compiled: inside of this context their modules have the
    names that a checkpoint knows.
    """
    found = [
        (parent, name, child)
        for parent in list(model.modules())
        if _inner(parent) is None
        for name, child in parent._modules.items()
        if child is not None and _inner(child) is not None
    ]
    try:
        for parent, name, child in found:
            parent._modules[name] = unwrap(child)
        yield
    finally:
        for parent, name, child in found:
            parent._modules[name] = child


def _inner(module: nn.Module) -> nn.Module | None:
    children = module._modules
    if len(children) != 1 or module._parameters or module._buffers:
        return None
    ((name, child),) = children.items()
    return child if name in _INNER_NAMES else None
