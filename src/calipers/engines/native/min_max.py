"""Smallest and largest value of every group, in C++."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from calipers.engines.kernels import Problem
from calipers.engines.native.abi import (
    MinMax,
    NativeStrides,
    address,
    knows,
    library,
    number_of_parts,
)
from calipers.grouping import Groups

__all__ = ["min_max", "supports"]


def supports(problem: Problem) -> bool:
    """Whether the kernels can read the values."""
    return knows(*problem.dtypes)


def min_max(view: Groups) -> tuple[Tensor, Tensor]:
    """As `calipers.ranges.min_max`, for values on the CPU of a dtype that kernels know."""
    strides = NativeStrides.of(view)
    low = view.values.new_empty(strides.groups, strides.runs)
    high = torch.empty_like(low)
    task = MinMax(strides, address(low, low.dtype), address(high, low.dtype))
    parts = number_of_parts(low.numel(), view.values.numel())
    library().min_max(ctypes.byref(task), ctypes.c_int64(parts))
    if strides.runs > 1:
        low, high = low.amin(1), high.amax(1)
    return low.view(view.qparam_shape), high.view(view.qparam_shape)
