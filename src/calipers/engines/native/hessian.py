"""Sums of candidates over coupled columns, on the CPU in C++."""

from __future__ import annotations

import ctypes

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor

from calipers.engines.kernels import Problem
from calipers.engines.native import abi
from calipers.engines.native.abi import (
    LANES,
    CoupledTask,
    NativeFormat,
    address,
    library,
    number_of_parts,
)

__all__ = ["sum_coupled", "supports"]


def supports(problem: Problem) -> bool:
    """Whether the kernels know the number format; values are float32."""
    assert problem.args is not None
    return abi.supports(problem.args)


def sum_coupled(
    x: Tensor,
    products: Tensor,
    slopes: Tensor,
    hessian: Tensor,
    factors: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    args: QuantizationArgs,
) -> Tensor:
    """As `calipers.ranges.hessian.sum_coupled`, code by code as they change."""
    groups, count = scale.shape
    blocks, rows, size = x.shape
    by_column = [_fill(each, size) for each in (x, products, slopes)]
    matrix = _fill(hessian, size)
    matrix = torch.nn.functional.pad(matrix, (0, 0, 0, -size % LANES)).contiguous()
    rank = factors.shape[-1] if blocks > 1 else 0
    factors = torch.nn.functional.pad(factors, (0, -rank % LANES, 0, -size % LANES)).contiguous()
    scales = scale.contiguous()
    zeros = None if zero_point is None else zero_point.contiguous()
    width, whole_rank = size + -size % LANES, rank + -rank % LANES
    shares = torch.zeros(rows, count, whole_rank, dtype=torch.float32, device="cpu")
    found = torch.zeros(3, rows, count, dtype=torch.float64, device="cpu")
    task = CoupledTask(
        NativeFormat.of(args, None),
        *(address(each, count=blocks * rows * width) for each in by_column),
        address(matrix, count=blocks * width * width),
        address(factors, count=blocks * width * whole_rank if rank else None),
        address(scales, count=groups * count),
        address(zeros, count=groups * count),
        blocks,
        rows,
        width,
        whole_rank,
        rows // groups,
        count,
        address(shares),
        address(found, torch.float64),
    )
    parts = number_of_parts(rows, x.numel() * count)
    library().sum_coupled(ctypes.byref(task), ctypes.c_int64(parts))
    return found


def _fill(by_column: Tensor, size: int) -> Tensor:
    """The last dimension filled up to whole vectors."""
    if size % LANES == 0:
        return by_column.contiguous()
    return torch.nn.functional.pad(by_column, (0, -size % LANES))
