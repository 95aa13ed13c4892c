"""Starting Triton's kernels."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from calipers.memory import UnreadableError, is_readable

__all__ = ["OPTIONS", "launch", "on_device", "power_of_two"]

#: How kernels are compiled. The loops load nothing that is worth loading ahead. A product and its
#: sum are rounded once, as Triton does by itself up to 3.9.
OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Kernels are started on this device meanwhile."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def launch(kernel: Any, programs: int, arguments: dict[str, Any]) -> None:
    """Start a kernel: the one place, so that tests can look at what is started.

    Raises:
        UnreadableError: A tensor whose elements do not lie in memory.
    """
    for value in arguments.values():
        if isinstance(value, Tensor) and not is_readable(value):
            raise UnreadableError(f"a {type(value).__name__} cannot be read where it lies")
    kernel[(programs,)](**arguments, **OPTIONS)


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`, and 2."""
    return 1 << max(1, (number - 1).bit_length())
