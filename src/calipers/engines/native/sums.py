"""Sums for candidate scales, on the CPU in C++."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from calipers.engines.native.abi import (
    NativeBox,
    NativeFormat,
    SumTask,
    address,
    library,
    number_of_parts,
)

__all__ = ["sum_candidates"]


def sum_candidates(
    box: NativeBox,
    number_format: NativeFormat,
    inverse_base: Tensor,
    ratios: Tensor,
    zeros: Tensor | None,
) -> Tensor:
    """All sums of each group, shape (3 * candidates + 1, groups), float64.

    Args:
        box: The values and their weights.
        number_format: How codes round.
        inverse_base: Shape (groups,): x = value * inverse_base, float32.
        ratios: Candidate scales in units of the base, shape (candidates, groups).
        zeros: Zero points, of the same shape; None for zero.
    """
    inverse, ratios = inverse_base.contiguous(), ratios.contiguous()
    zeros = None if zeros is None else zeros.contiguous()
    count, units = ratios.shape[0], box.groups * box.runs
    found = torch.empty(3 * count + 1, units, dtype=torch.float64, device="cpu")
    task = SumTask(
        box,
        number_format,
        address(inverse, count=box.groups),
        address(ratios, count=count * box.groups),
        address(zeros, count=count * box.groups),
        count,
        address(found, torch.float64),
    )
    parts = number_of_parts(box.blocks, box.groups * box.size * count)
    library().sum_candidates(ctypes.byref(task), ctypes.c_int64(parts))
    return found.view(-1, box.groups, box.runs).sum(-1)
