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
    NativeBox,
    NativeFormat,
    ProjectionTask,
    address,
    library,
    number_of_parts,
)
from calipers.engines.native.sums import sum_candidates
from calipers.grouping import Groups

__all__ = ["NativeGroups", "candidate_sums", "read_groups", "supports"]

#: Values whose groups are searched by one call: what is kept of each group meanwhile stays small.
BATCH = 2**23


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
        box: The values and their weights.
        number_format: How codes round; scales are made elsewhere.
    """

    where: tuple[slice, ...]
    shape: tuple[int, ...]
    box: NativeBox
    number_format: NativeFormat

    @property
    def in_one_run(self) -> bool:
        """Runs of values of long groups have to be summed before a scale is chosen."""
        return bool(self.box.runs == 1)

    def sum(self, inverse_base: Tensor, ratio: Tensor, zero_point: Tensor | None) -> Tensor:
        """As `sum_candidates`."""
        return sum_candidates(self.box, self.number_format, inverse_base, ratio, zero_point)

    def project(
        self,
        inverse_base: Tensor,
        zero_point: Tensor | None,
        ratios: Tensor,
        offsets: Tensor,
        factors: Tensor,
        rounds: int,
        residual: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """The best scale of each group in units of its base, and its zero point.

        Args:
            inverse_base: Inverse of each group's unit of scale, shape (groups,), float32.
            zero_point: Zero point of the whole range of each group; None: none.
            ratios: Candidates in units of the base.
            offsets: What each adds to the zero point.
            factors: Finer candidates about the best one, as factors.
            rounds: How often these are tried.
            residual: Whether errors are summed themselves.
        """
        factors = factors.contiguous()
        best = torch.empty_like(inverse_base)
        best_zero = None if zero_point is None else torch.empty_like(inverse_base)
        task = ProjectionTask(
            self.box,
            self.number_format,
            address(inverse_base, count=self.box.groups),
            address(zero_point, count=self.box.groups),
            address(ratios),
            address(offsets, count=ratios.numel()),
            ratios.numel(),
            address(factors),
            factors.numel(),
            rounds,
            residual,
            address(best),
            address(best_zero),
        )
        parts = self._parts(ratios.numel() + rounds * factors.numel())
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
            self.box,
            self.number_format,
            address(table),
            table.numel(),
            address(covering, torch.int64, self.box.groups),
            above,
            start,
            address(best, torch.int64),
        )
        library().search_codes(ctypes.byref(task), ctypes.c_int64(self._parts(start + 1)))
        return best

    def _parts(self, candidates: int) -> int:
        return number_of_parts(self.box.blocks, self.box.groups * self.box.size * candidates)


def read_groups(
    view: Groups, importance: Groups | None, args: QuantizationArgs
) -> Iterator[NativeGroups]:
    """All groups of a view, some at a time, as they lie in memory."""
    number_format = NativeFormat.of(args, None)
    if prod(view.shape) <= BATCH or view.group_size > BATCH:
        everything = tuple(slice(None) for _ in view.qparam_shape)
        box = NativeBox.of(view, importance)
        yield NativeGroups(everything, view.qparam_shape, box, number_format)
        return
    weights = None if importance is None else importance.chunks(BATCH)
    for where, piece in view.chunks(BATCH):
        reduced = tuple(range(len(where), piece.dim()))
        part = Groups(piece, reduced, finite_only=view.finite_only)
        weight = None if weights is None else Groups(next(weights)[1], reduced)
        box = NativeBox.of(part, weight)
        yield NativeGroups(where, part.qparam_shape, box, number_format)


candidate_sums = CandidateSums(read_groups=read_groups)
