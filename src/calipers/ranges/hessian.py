"""Scales by the error d'Hd of a layer's output, d = dequantized - x, H a block of the inputs' X'X.

For fixed codes q the best scale is (q'Hx) / (q'Hq), and its error is x'Hx - (q'Hx)^2 / (q'Hq). The
diagonal of H alone ranks the candidates of a window; the full product is taken for the best of
them, and for scales about the winner.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from calipers.ranges.codes import codes_about_covering, has_scale_codes
from calipers.ranges.engines import choose_engine
from calipers.ranges.group_sums import Batch, Candidates, GroupBatch, Sums
from calipers.ranges.native.call import NativeBox
from calipers.ranges.optimal_native import NativeBatch, search_batch, supports
from calipers.ranges.projection import (
    Scales,
    Scheme,
    candidate_scales,
    candidate_spread,
    min_max_scales,
)
from calipers.ranges.rounding import round_to_codes
from calipers.ranges.views import GroupedView

__all__ = ["search_by_hessian"]

#: Candidates that get the full product: of the window, and about the winner. Eight more in the
#: window make the error smaller by less than a thousandth.
FULL, FINE = 6, 8
#: Values worked on at a time.
PIECE = 2**19


def search_by_hessian(
    view: GroupedView,
    hessian: Tensor,
    low: Tensor,
    high: Tensor,
    scheme: Scheme,
    *,
    engine: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each group with the smallest sum of d'Hd over its rows.

    Args:
        view: The values, whose last dimension runs along the input columns of a group.
        hessian: X'X, shape (column groups, blocks, size, size): the columns of a group of the view
            cut into blocks one after the other, the last filled up with zeros. One column group
            where all groups span all columns.
        low: Minimum of each group, of the view's `qparam_shape`.
        high: Maximum of each group.
        scheme: What is searched for. Of scale codes (NVFP4, MX) the octaves about the smallest
            covering one are tried.
        engine: "eager" or "native", which ranks candidates; None chooses.

    Returns:
        Scale and zero point, float32, of the view's `qparam_shape`, as they will be stored. No
        group's error is greater than with minimum and maximum.
    """
    plain = min_max_scales(low, high, scheme)
    zeros = torch.zeros_like(plain.scale) if plain.zero_point is None else plain.zero_point
    scale, zero_point = plain.scale.clone(), zeros.clone()
    chosen = choose_engine(view.values.device, engine, view.values.numel())
    native = chosen == "native" and supports(scheme.args, view.values.dtype)
    for where, work in _batches(view, hessian, scheme, native):
        shape = scale[where].shape
        part = Scales(plain.scale[where].reshape(-1), zeros[where].reshape(-1))
        found = _search(work, low[where].reshape(-1), high[where].reshape(-1), part, scheme)
        scale[where] = found.scale.view(shape)
        if found.zero_point is not None:
            zero_point[where] = found.zero_point.view(shape)
    return scale, zero_point


@dataclass(frozen=True)
class _Work:
    """Some groups with their blocks of the Hessian.

    Args:
        values: Shape (column groups * blocks, fronts * rows of a group, size), float32.
        hessian: Shape (column groups * blocks, size, size).
        fronts: Groups that lie above one another in the same columns.
        column_groups: Groups beside each other.
        blocks: Blocks of columns of a group.
        batch: The groups with the diagonal of the Hessian for weights.
    """

    values: Tensor
    hessian: Tensor
    fronts: int
    column_groups: int
    blocks: int
    batch: Batch

    def spread(self, per_group: Tensor) -> Tensor:
        """A number for each group, (fronts * column groups,), as it goes with the values."""
        by_column = per_group.view(self.fronts, self.column_groups).t()
        rows = self.values.shape[1] // self.fronts
        by_row = by_column.repeat_interleave(rows, dim=1).unsqueeze(1)
        return by_row.expand(-1, self.blocks, -1).reshape(-1, self.values.shape[1], 1)

    def total(self, products: Tensor) -> Tensor:
        """Sum of products of the values' shape over each group, float64."""
        by_row = products.sum(-1).double()
        by_row = by_row.view(self.column_groups, self.blocks, self.fronts, -1)
        return by_row.sum((1, 3)).t().reshape(-1)


def _batches(
    view: GroupedView, hessian: Tensor, scheme: Scheme, native: bool
) -> Iterator[tuple[tuple[slice, ...], _Work]]:
    columns, blocks, size = hessian.shape[:3]
    group_size = math.prod(view.shape) // max(1, math.prod(view.qparam_shape))
    # Whole groups, and all column groups of a row of them.
    limit = max(PIECE, group_size * view.qparam_shape[-1])
    for where, piece in view.pieces(limit):
        groups = where[-1].indices(view.qparam_shape[-1])
        part = hessian if columns == 1 else hessian[groups[0] : groups[1]]
        batch = _weighted_batch(view, where, piece, part, scheme, native)
        values = piece.float()
        if view.finite_only:
            values = torch.where(values.isfinite(), values, 0)
        kept = math.prod(piece.shape[: len(where)])
        count = part.shape[0]
        values = values.reshape(kept // count, count, -1, piece.shape[-1])
        values = torch.nn.functional.pad(values, (0, blocks * size - piece.shape[-1]))
        fronts, _, rows, _ = values.shape
        values = values.view(fronts, count, rows, blocks, size).permute(1, 3, 0, 2, 4)
        values = values.reshape(count * blocks, fronts * rows, size)
        yield where, _Work(values, part.reshape(-1, size, size), fronts, count, blocks, batch)


def _weighted_batch(
    view: GroupedView,
    where: tuple[slice, ...],
    piece: Tensor,
    hessian: Tensor,
    scheme: Scheme,
    native: bool,
) -> Batch:
    """The groups of a piece with the diagonal of the Hessian for weights."""
    kept, cols = len(where), piece.shape[-1]
    diagonal = hessian.diagonal(dim1=-2, dim2=-1).flatten(1)[:, :cols]
    shape = [1] * piece.dim()
    shape[kept - 1], shape[-1] = diagonal.shape
    weight = diagonal.reshape(shape).expand(piece.shape)
    reduced = tuple(range(kept, piece.dim()))
    part = GroupedView(piece, reduced, finite_only=view.finite_only)
    if native:
        box = NativeBox.of(part, GroupedView(weight, reduced))
        return NativeBatch(where, part.qparam_shape, box, scheme)
    groups = math.prod(part.qparam_shape)
    values = part.canonical().float().reshape(groups, -1)
    return GroupBatch(where, part.qparam_shape, values, weight.reshape(groups, -1), None, "eager")


def _search(work: _Work, low: Tensor, high: Tensor, plain: Scales, scheme: Scheme) -> Scales:
    base, candidates = candidate_scales(low.float(), high.float(), scheme)
    x = work.values * work.spread(1 / base)
    if not scheme.rounding.integer:
        # Codes of floats are taken of sizes here: the sign goes back to them.
        sign: Tensor | None = x.sign()
    else:
        sign = None
    symmetric = candidates.zero_point is None

    rounding = scheme.rounding

    def codes(ratio: Tensor, zero: Tensor | None) -> Tensor:
        scaled = (x if sign is None else x.abs()) * work.spread(1 / ratio)
        if sign is not None:
            return round_to_codes(scaled, None, rounding) * sign
        if zero is None:
            return scaled.round_().clamp_(rounding.low, rounding.high)
        shift = work.spread(zero)
        return scaled.add_(shift).round_().clamp_(rounding.low, rounding.high).sub_(shift)

    def error_of(scale: Tensor, zero: Tensor | None) -> Tensor:
        ratio = scale / base
        rest = codes(ratio, zero).mul_(work.spread(ratio)).sub_(x)
        return work.total((rest @ work.hessian).mul_(rest))

    if has_scale_codes(scheme.args):
        candidates = Scales(codes_about_covering(low, high, scheme) / base)
        order = _ranks(work.batch, base, candidates, scheme, projected=False)
        scales = [plain.scale, *(candidates.at(index).scale * base for index in order)]
        errors = torch.stack([error_of(scale, None) for scale in scales])
        # Equal errors (a group of zeros) leave it at minimum and maximum.
        return Scales(torch.stack(scales)).at(errors.nan_to_num(torch.inf).argmin(0))

    order = _ranks(work.batch, base, candidates, scheme, projected=True)

    hx = x @ work.hessian
    own = work.total(hx * x)
    best = Scales(plain.scale / base, plain.zero_point if not symmetric else None)
    best_error = torch.full_like(own, torch.inf)

    def evaluate(ratio: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor]:
        """Projected scale, and the error that it has with these codes."""
        q = codes(ratio, zero)
        a, b = work.total(hx * q), work.total((q @ work.hessian).mul_(q))
        good = b > 0
        projected = torch.where(good, a / b, ratio.double())
        return projected.float(), torch.where(good, own - a * a / b, torch.inf)

    def take(ratio: Tensor, zero: Tensor | None) -> None:
        nonlocal best, best_error
        projected, error = evaluate(ratio, zero)
        better = error < best_error
        best = Scales(projected, zero).where(better, best)
        best_error = torch.where(better, error, best_error)

    for picked in (candidates.at(index) for index in order):
        take(picked.scale, picked.zero_point)
    # What the diagonal alone makes the best: the objective "imatrix" is no better in this one.
    diagonal = search_batch(work.batch, low, high, scheme)
    take(diagonal.scale / base, diagonal.zero_point)
    centre = best
    spread = candidate_spread(scheme.rounding)
    for factor in (1 + spread * torch.linspace(-1, 1, FINE)).tolist():
        take(centre.scale * factor, centre.zero_point)
    take(best.scale, best.zero_point)

    stored = scheme.store(best.scale * base)

    zero = None if symmetric else plain.zero_point
    good = error_of(stored, best.zero_point) < error_of(plain.scale, zero)
    return Scales(stored, best.zero_point).where(good, Scales(plain.scale, zero))


def _ranks(
    batch: Batch, base: Tensor, candidates: Scales, scheme: Scheme, *, projected: bool
) -> Tensor:
    """The `FULL` best candidates of each group by the diagonal alone, (FULL, groups).

    Args:
        batch: The groups.
        base: The unit of scale of each group.
        candidates: In that unit, (candidates, groups).
        scheme: What is searched for.
        projected: Whether a candidate stands for the best scale of its codes.
    """
    count = candidates.scale.shape[0]
    sums = batch.sum(Sums(scheme.rounding, "all", count), Candidates(1 / base, *candidates.tensors))
    a, b, error = sums.chunk(3)
    if projected:
        gap = a - candidates.scale * b
        error = torch.where(b > 0, error - gap * gap / b, torch.inf)
    return error.topk(min(FULL, count), dim=0, largest=False).indices
