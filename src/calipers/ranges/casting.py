"""Ranges in the dtype in which their scale is computed, and ranges made wider, all finite."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["cast_range", "expand_range"]


def cast_range(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast, with what the dtype cannot hold taken to its limits (an expanded float16 range)."""
    if values.dtype == dtype:
        return values
    limits = torch.finfo(dtype)
    if limits.max < torch.finfo(values.dtype).max:
        values = values.clamp(limits.min, limits.max)
    return values.to(dtype)


def expand_range(values: Tensor, factor: float) -> Tensor:
    """Float32 values times a factor; what float32 cannot hold is taken to its limits.

    Args:
        values: Ends of ranges, of any floating dtype. Inf, the end of a range of nothing, stays.
        factor: At least 1.
    """
    limits = torch.finfo(torch.float32)
    grown = (values.float() * factor).clamp(limits.min, limits.max)
    return torch.where(values.isinf(), values.float(), grown)
