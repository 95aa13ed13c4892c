"""`undo_on_error`: quantization that could not be finished, taken back whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationMetadata

__all__ = ["undo_on_error"]

# compressed-tensors puts these on the instance: the quantized forward, and the one that an
# offloaded module calls
_FORWARDS = ("forward", "_original_forward_func")


@contextmanager
def undo_on_error(modules: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Leave the modules as they were before the block where the block raises.

    Quantization parameters, schemes, status and the wrapped forward are removed; the exception
    goes on. Nothing happens where the block ends well.

    Args:
        modules: Modules that are not quantized yet.
    """
    before = [(module, _instance_forwards(module)) for module in modules]
    try:
        yield
    except BaseException:
        for module, forwards in before:
            QuantizationMetadata.clear_quantization(module)
            for name in ("quantization_status", *_FORWARDS):
                module.__dict__.pop(name, None)
            module.__dict__.update(forwards)
        raise


def _instance_forwards(module: torch.nn.Module) -> dict[str, Any]:
    return {name: module.__dict__[name] for name in _FORWARDS if name in module.__dict__}
