"""`checked_global_scale`: a global scale that a search can divide by."""

from __future__ import annotations

import torch
from torch import Tensor

from calipers.ranges.memory import plain_values

__all__ = ["checked_global_scale"]


def checked_global_scale(scale: object, device: torch.device | None = None) -> Tensor:
    """A global scale as one positive finite number in float32, shape (1,).

    Args:
        scale: One element, of any shape and real dtype.
        device: Where it is needed; None leaves it where it is.

    Raises:
        ValueError: What came instead, without the name of what it is for.
    """
    expected = "global_scale: expected one positive finite number, shape (1,)"
    if not isinstance(scale, Tensor):
        raise ValueError(f"{expected}, got {type(scale).__name__}")
    try:
        value = plain_values(scale)
    except ValueError as error:
        raise ValueError(f"global_scale: {error}") from error
    if value.numel() != 1:
        raise ValueError(f"{expected}, got shape {tuple(value.shape)}")
    value = value.to(device=device, dtype=torch.float32).reshape(1)
    number = float(value)
    if not 0 < number < torch.inf:  # NaN is neither
        raise ValueError(f"{expected}, got {number}")
    return value
