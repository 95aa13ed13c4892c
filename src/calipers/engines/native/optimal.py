"""`search_optimal_scales` on the CPU in C++: all candidates while groups are in the cache."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from calipers.engines.native.abi import (
    CodeTask,
    NativeBox,
    NativeFormat,
    ProjectionTask,
    SumTask,
    address,
    library,
    number_of_parts,
    supports,
)
from calipers.ranges.codes import choose_code, covering_codes, has_scale_codes, search_codes
from calipers.ranges.group_sums import Batch, Candidates, Sums
from calipers.ranges.projection import (
    CANCELS,
    Scales,
    Scheme,
    choose_stored,
    fine_factors,
    fine_rounds,
    min_max_scales,
    project_batch,
    whole_range,
)
from calipers.ranges.views import GroupedView

__all__ = ["NativeBatch", "native_batches", "search_batch", "supports"]

#: Values whose groups are searched by one call: what is kept of each group meanwhile stays small.
BATCH = 2**23


@dataclass(frozen=True)
class NativeBatch:
    """Some whole groups of a view, as `GroupBatch`; the library reads them where they lie.

    Args:
        where: Index of the groups in the view's `qparam_shape`.
        shape: Shape of that part of the qparams.
        box: The values and their weights.
        scheme: What is searched for.
    """

    where: tuple[slice, ...]
    shape: tuple[int, ...]
    box: NativeBox
    scheme: Scheme

    @property
    def format(self) -> NativeFormat:
        """The number format; scales are made elsewhere."""
        return NativeFormat.of(self.scheme.args, None)

    @property
    def selectable(self) -> bool:
        """Groups cannot be told apart: a call costs little for those that are done."""
        return False

    def parts(self, candidates: int) -> int:
        """Number of parts for so many candidates."""
        return number_of_parts(self.box.blocks, self.box.groups * self.box.size * candidates)

    def sum(self, sums: Sums, candidates: Candidates) -> Tensor:
        """The sums of every group, as `GroupBatch.sum`, float64."""
        inverse, ratios = candidates.inverse_base.contiguous(), candidates.ratio.contiguous()
        zeros = None if candidates.zero_point is None else candidates.zero_point.contiguous()
        count, units = ratios.shape[0], self.box.groups * self.box.runs
        found = torch.empty(3 * count + 1, units, dtype=torch.float64, device="cpu")
        task = SumTask(
            self.box,
            self.format,
            address(inverse, count=self.box.groups),
            address(ratios, count=count * self.box.groups),
            address(zeros, count=count * self.box.groups),
            count,
            address(found, torch.float64),
        )
        library().sum_candidates(ctypes.byref(task), ctypes.c_int64(self.parts(count)))
        return sums.of_all(found.view(-1, self.box.groups, self.box.runs).sum(-1))


def native_batches(
    view: GroupedView, importance: GroupedView | None, scheme: Scheme
) -> Iterator[NativeBatch]:
    """All groups of a view, some at a time, as they lie in memory."""
    group_size = prod(view.shape) // max(1, prod(view.qparam_shape))
    if prod(view.shape) <= BATCH or group_size > BATCH:
        everything = tuple(slice(None) for _ in view.qparam_shape)
        box = NativeBox.of(view, importance)
        yield NativeBatch(everything, view.qparam_shape, box, scheme)
        return
    weights = None if importance is None else importance.pieces(BATCH)
    for where, piece in view.pieces(BATCH):
        reduced = tuple(range(len(where), piece.dim()))
        part = GroupedView(piece, reduced, finite_only=view.finite_only)
        weight = None if weights is None else GroupedView(next(weights)[1], reduced)
        yield NativeBatch(where, part.qparam_shape, NativeBox.of(part, weight), scheme)


def search_batch(batch: Batch, low: Tensor, high: Tensor, scheme: Scheme) -> Scales:
    """The optimal scales of some groups: by the library where it reads them.

    Args:
        batch: The groups.
        low: Minimum of each group, in the dtype of the values, shape (groups,).
        high: Maximum of each group.
        scheme: What is searched for.
    """
    codes = has_scale_codes(scheme.args)
    # Runs of values of long groups have to be summed before a scale is chosen.
    if not isinstance(batch, NativeBatch) or batch.box.runs > 1:
        return (search_codes if codes else project_batch)(batch, low, high, scheme)
    return (_search_codes if codes else _project)(batch, low, high, scheme)


def _project(batch: NativeBatch, low: Tensor, high: Tensor, scheme: Scheme) -> Scales:
    plain = min_max_scales(low, high, scheme)
    base, zero, ratios, offsets = whole_range(low.float(), high.float(), scheme)
    inverse, factors = 1 / base, fine_factors(scheme.rounding).contiguous()
    ratio = torch.empty_like(base)
    best_zero = None if zero is None else torch.empty_like(base)
    residual = not scheme.rounding.integer or scheme.rounding.num_bits >= CANCELS
    rounds = fine_rounds(scheme)
    task = ProjectionTask(
        batch.box,
        batch.format,
        address(inverse, count=batch.box.groups),
        address(zero, count=batch.box.groups),
        address(ratios),
        address(offsets, count=ratios.numel()),
        ratios.numel(),
        address(factors),
        factors.numel(),
        rounds,
        residual,
        address(ratio),
        address(best_zero),
    )
    candidates = ratios.numel() + rounds * factors.numel()
    library().project(ctypes.byref(task), ctypes.c_int64(batch.parts(candidates)))
    return choose_stored(batch, base, Scales(ratio, best_zero), plain, scheme)


def _search_codes(batch: NativeBatch, low: Tensor, high: Tensor, scheme: Scheme) -> Scales:
    table, covering, tile, above = covering_codes(low, high, scheme)
    best = torch.empty_like(covering)
    task = CodeTask(
        batch.box,
        batch.format,
        address(table),
        table.numel(),
        address(covering, torch.int64, batch.box.groups),
        above,
        tile - 1,
        address(best, torch.int64),
    )
    library().search_codes(ctypes.byref(task), ctypes.c_int64(batch.parts(tile)))
    return choose_code(table, best, low, high, scheme)
