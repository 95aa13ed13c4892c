"""Scales of groups whose columns are coupled, on the CPU in C++."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor

from calipers.engines.kernels import Coupled, Pair, Problem
from calipers.engines.native import abi
from calipers.engines.native.abi import (
    LANES,
    CoupledTask,
    NativeFormat,
    SweepTask,
    address,
    library,
    number_of_parts,
)

__all__ = ["CoupledColumns", "coupled", "sum_coupled", "supports"]

#: Columns that a matrix is multiplied by at a time, and rows of a tile, as in sweeps.h.
PANEL, TILE_ROWS = 16, 24


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
    whole = size + -size % LANES
    by_column = [_filled(each, whole).contiguous() for each in (x, products, slopes)]
    matrix = _filled(hessian, whole)
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


class CoupledColumns:
    """As `calipers.engines.kernels.CoupledColumns`, rows by tiles."""

    def __init__(self, hessian: Tensor, factors: Tensor, args: QuantizationArgs) -> None:
        self._groups, self._blocks, self._size, _ = hessian.shape
        more = -self._size % PANEL
        self._width = self._size + more
        rank = factors.shape[-1] if self._groups * self._blocks > 1 else 0
        self._rank = rank + -rank % PANEL
        matrix = torch.nn.functional.pad(hessian.flatten(0, 1), (0, more, 0, more))
        factors = factors[..., :rank].flatten(0, 1)
        factors = torch.nn.functional.pad(factors, (0, self._rank - rank, 0, more))
        self._shared = (
            matrix.contiguous(),
            factors.contiguous(),
            _panels(matrix),
            _panels(factors),
            _panels(factors.transpose(-1, -2)),
        )
        self._format = NativeFormat.of(args, None)
        self._state: _State | None = None

    def rows_at_a_time(self, most: int) -> int:
        """As `calipers.engines.kernels.CoupledColumns.rows_at_a_time`: tiles for every thread."""
        at_once = TILE_ROWS * torch.get_num_threads()
        return max(1, most // at_once) * at_once

    def refine(
        self, values: Tensor, start: Pair, plain: Pair, candidates: Pair, fresh: Sequence[bool]
    ) -> Pair:
        """As `calipers.engines.kernels.CoupledColumns.refine`."""
        rows, groups, blocks = len(values), self._groups, self._blocks
        parts, width, rank, count = groups * blocks, self._width, self._rank, len(fresh)
        values = _filled(values, blocks * self._size).unflatten(-1, (blocks, self._size))
        values = _filled(values, width).contiguous()
        by_group = [None if each is None else each.contiguous() for each in (*start, *plain)]
        by_candidate = [None if each is None else each.contiguous() for each in candidates]
        scale = torch.empty(rows, groups, dtype=torch.float32, device="cpu")
        zero_point = None if start[1] is None else torch.empty_like(scale)
        flags = torch.tensor(fresh, dtype=torch.uint8, device="cpu")
        if self._state is None or self._state.rows != rows:
            self._state = _State.empty(rows, groups, blocks, width, rank)
        task = SweepTask(
            self._format,
            address(values, count=rows * parts * width),
            *(address(each) for each in self._shared),
            *(address(each, count=rows * groups) for each in by_group),
            *(address(each, count=rows * groups * count) for each in by_candidate),
            address(flags, torch.uint8),
            *(rows, groups, blocks, width, rank, count),
            address(scale, count=rows * groups),
            address(zero_point, count=rows * groups),
            *(address(each) for each in self._state.floats),
            *(address(each, torch.float64) for each in self._state.doubles),
        )
        pieces = number_of_parts(-(-rows // TILE_ROWS), values.numel() * count)
        library().refine_rows(ctypes.byref(task), ctypes.c_int64(pieces))
        return scale, zero_point


@dataclass(frozen=True)
class _State:
    """What is known of some rows, in the order of the structure's fields."""

    rows: int
    floats: tuple[Tensor | None, ...]
    doubles: tuple[Tensor, ...]

    @classmethod
    def empty(cls, rows: int, groups: int, blocks: int, width: int, rank: int) -> _State:
        """Memory for it, to be filled in."""
        parts = groups * blocks

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(rows, *shape, dtype=dtype, device="cpu")

        floats = (
            *(empty(parts, width) for _ in range(2)),
            empty(parts, rank) if blocks > 1 else None,
            empty(groups, rank),
            empty(rank),
        )
        return cls(rows, floats, tuple(empty(groups, dtype=torch.float64) for _ in range(2)))


coupled = Coupled(sum_coupled, CoupledColumns)


def _filled(by_column: Tensor, width: int) -> Tensor:
    """The last dimension filled up with zeros."""
    missing = width - by_column.shape[-1]
    return torch.nn.functional.pad(by_column, (0, missing)) if missing else by_column


def _panels(matrices: Tensor) -> Tensor:
    """Columns in panels, shape (parts, columns / PANEL, rows, PANEL)."""
    columns: Tensor = matrices.unflatten(-1, (-1, PANEL))
    return columns.transpose(-3, -2).contiguous()
