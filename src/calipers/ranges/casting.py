"""`cast_range`: a range in the dtype in which its scale is computed."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["cast_range"]


def cast_range(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast, with what the dtype cannot hold taken to its limits (an expanded float16 range)."""
    if values.dtype == dtype:
        return values
    limits = torch.finfo(dtype)
    if limits.max < torch.finfo(values.dtype).max:
        values = values.clamp(limits.min, limits.max)
    return values.to(dtype)
