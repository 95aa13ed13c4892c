"""Scales with the smallest squared error, on the CPU in C++, while groups are in the cache."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor

from calipers.engines.kernels import CandidateSums, Problem
from calipers.engines.native import abi
from calipers.engines.native.abi import (
    CodeTask,
    NativeFormat,
    NativeStrides,
    ProjectionTask,
    SumTask,
    address,
    library,
    number_of_parts,
)
from calipers.grouping import Groups

__all__ = ["NativeGroups", "candidate_sums", "read_groups", "supports"]

#: Values whose groups are searched by one call: what is kept of each group meanwhile stays small.
CHUNK = 2**23


def supports(problem: Problem) -> bool:
    """Whether the kernels know the number format and read the values and weights."""
    assert problem.args is not None
    return abi.supports(problem.args, *problem.dtypes)


@dataclass(frozen=True)
class NativeGroups:
    """Some whole groups of a view, as `EngineGroups`; the library reads them where they lie.

    Args:
        where: Index of the groups in the view's `qparam_shape`.
        shape: Shape of that part of the qparams.
        strides: The values and their weights.
        number_format: How codes round; scales are made elsewhere.
    """

    where: tuple[slice, ...]
    shape: tuple[int, ...]
    strides: NativeStrides
    number_format: NativeFormat

    @property
    def whole(self) -> bool:
        """Whether no group is cut: sums of splits are added before a scale is chosen."""
        return bool(self.strides.runs == 1)

    def sum(self, inverse_base: Tensor, factor: Tensor, zero_point: Tensor | None) -> Tensor:
        """All sums for candidates, shape (3 * candidates + 1, groups), float64.

        Args:
            inverse_base: Shape (groups,): x = value * inverse_base, float32.
            factor: Candidate scales in units of the base, shape (candidates, groups).
            zero_point: Zero points, of the same shape; None for zero.
        """
        strides, inverse, factor = self.strides, inverse_base.contiguous(), factor.contiguous()
        zeros = None if zero_point is None else zero_point.contiguous()
        count = factor.shape[0]
        shape = (3 * count + 1, strides.groups * strides.runs)
        found = torch.empty(shape, dtype=torch.float64, device="cpu")
        task = SumTask(
            strides,
            self.number_format,
            address(inverse, count=strides.groups),
            address(factor, count=count * strides.groups),
            address(zeros, count=count * strides.groups),
            count,
            address(found, torch.float64),
        )
        library().sum_candidates(ctypes.byref(task), ctypes.c_int64(self._parts(count)))
        return found.view(-1, strides.groups, strides.runs).sum(-1)

    def project(
        self,
        inverse_base: Tensor,
        zero_point: Tensor | None,
        factors: Tensor,
        offsets: Tensor,
        fine_factors: Tensor,
        rounds: int,
        residual: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """The best scale of each group in units of its base, and its zero point.

        Args:
            inverse_base: Inverse of each group's unit of scale, shape (groups,), float32.
            zero_point: Zero point of the whole range of each group; None: none.
            factors: Candidates in units of the base.
            offsets: What each adds to the zero point.
            fine_factors: Finer candidates about the best one, as factors on it.
            rounds: How often these are tried.
            residual: Whether errors are summed themselves.
        """
        fine_factors = fine_factors.contiguous()
        best = torch.empty_like(inverse_base)
        best_zero = None if zero_point is None else torch.empty_like(inverse_base)
        task = ProjectionTask(
            self.strides,
            self.number_format,
            address(inverse_base, count=self.strides.groups),
            address(zero_point, count=self.strides.groups),
            address(factors),
            address(offsets, count=factors.numel()),
            factors.numel(),
            address(fine_factors),
            fine_factors.numel(),
            rounds,
            residual,
            address(best),
            address(best_zero),
        )
        parts = self._parts(factors.numel() + rounds * fine_factors.numel())
        library().project(ctypes.byref(task), ctypes.c_int64(parts))
        return best, best_zero

    def search_scale_codes(self, table: Tensor, covering: Tensor, above: int, start: int) -> Tensor:
        """Index of the best scale of each group, int64.

        Args:
            table: All scales, ascending.
            covering: Index of the smallest scale that covers each group.
            above: Scales above it that are tried.
            start: Index of the first scale tried, at least.
        """
        best = torch.empty_like(covering)
        task = CodeTask(
            self.strides,
            self.number_format,
            address(table),
            table.numel(),
            address(covering, torch.int64, self.strides.groups),
            above,
            start,
            address(best, torch.int64),
        )
        library().search_codes(ctypes.byref(task), ctypes.c_int64(self._parts(start + 1)))
        return best

    def _parts(self, candidates: int) -> int:
        return number_of_parts(
            self.strides.blocks, self.strides.groups * self.strides.size * candidates
        )


def read_groups(
    view: Groups, importance: Groups | None, args: QuantizationArgs
) -> Iterator[NativeGroups]:
    """All groups of a view, some at a time, as they lie in memory."""
    number_format = NativeFormat.of(args, None)
    if prod(view.shape) <= CHUNK or view.group_size > CHUNK:
        everything = tuple(slice(None) for _ in view.qparam_shape)
        strides = NativeStrides.of(view, importance)
        yield NativeGroups(everything, view.qparam_shape, strides, number_format)
        return
    others = None if importance is None else importance.chunks(CHUNK)
    for where, chunk in view.chunks(CHUNK):
        reduced = tuple(range(len(where), chunk.dim()))
        groups = Groups(chunk, reduced, finite_only=view.finite_only)
        its_importance = None if others is None else Groups(next(others)[1], reduced)
        strides = NativeStrides.of(groups, its_importance)
        yield NativeGroups(where, groups.qparam_shape, strides, number_format)


candidate_sums = CandidateSums(read_groups=read_groups)
