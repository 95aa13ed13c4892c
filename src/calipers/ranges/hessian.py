"""Scales by the error of a layer's output, from blocks of the inputs' X'X and a sketch of the rest.

For errors d = dequantized - x of a row the error of its output is d'X'Xd. Of X'X the blocks of the
columns that share a scale are known, and of the rest LL', what a sketch tells of it (`sketch`). So
a group's error is d'Hd + 2 d'Lr, with H its block, L the rows of its columns, and r = sum L'd over
the other groups of the row. One group after the other is given the best of many scales, the others
as they are: codes that are rounded at another scale make up for each other in another way, and of
many ways one is good.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy
from torch import Tensor

from calipers.engines.dispatch import run
from calipers.engines.kernels import COUPLED, Coupled, CoupledColumns, Problem
from calipers.formats import has_scale_codes
from calipers.grouping import Groups
from calipers.ranges.least_squares import Scales, ScaleSpec, min_max_scales
from calipers.ranges.scale_codes import all_scales

__all__ = ["refine_by_hessian", "sum_coupled"]


class _Sweep(NamedTuple):
    """Which other scales are tried."""

    #: How far factors reach with integers of 4 bits (half as far with each bit more), and floats.
    reach: float
    #: Number of factors to each side, for each of three zero points.
    sides: int
    #: Scales to each side where scales are codes.
    codes: int


#: Of a row's groups each can make up for the others' errors, and a few scales give it ways enough;
#: one scale for a whole row (strategy channel) has but itself, and what it leaves jumps between
#: neighbours: it takes the best of many.
SWEEP, ROW_SWEEP = _Sweep(0.125, 10, 5), _Sweep(0.35, 70, 5)
#: Values of a column group that are worked on at a time; of several column groups a quarter each.
CHUNK = 2**20

#: As `sum_coupled`.
SumCoupled = Callable[..., Tensor]
#: Some rows, and their values.
_Values = list[tuple[slice, Tensor]]


def refine_by_hessian(
    view: Groups,
    start: tuple[Tensor, Tensor],
    extremes: tuple[Tensor, Tensor],
    hessian: Tensor,
    factors: Tensor,
    spec: ScaleSpec,
    engine: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Scales and zero points with a smaller error of the output than those given.

    Args:
        view: The values, whose last dimension runs along the input columns of a group.
        start: Scale and zero point of each group, float32, of the view's `qparam_shape`, as they
            will be stored; the optimum for the diagonal of X'X is a good one.
        extremes: Minimum and maximum of each group.
        hessian: X'X, shape (column groups, blocks, size, size): the columns of a group of the view
            cut into blocks one after the other, the last filled up with zeros. One column group
            where all groups span all columns.
        factors: L such that LL' stands for X'X outside of these blocks, shape
            (column groups, blocks, size, rank).
        spec: Which scales can be chosen.
        engine: "eager" or "native"; None chooses, see `calipers.engines.dispatch`.

    Returns:
        Scale and zero point, as in `start`. In no group is d'Hd greater than with minimum and
        maximum.
    """
    work = view.values.numel() * 2 * _sweep(spec.args).sides
    problem = Problem(view.values.device, work, args=spec.args)

    def refine(coupled: Coupled) -> tuple[Tensor, Tensor]:
        return _refine_view(view, start, extremes, hessian, factors, spec, coupled)

    return run(COUPLED, Coupled(sum_coupled), refine, problem, engine)


def _refine_view(
    view: Groups,
    start: tuple[Tensor, Tensor],
    extremes: tuple[Tensor, Tensor],
    hessian: Tensor,
    factors: Tensor,
    spec: ScaleSpec,
    coupled: Coupled,
) -> tuple[Tensor, Tensor]:
    plain = min_max_scales(*extremes, spec)
    zeros = torch.zeros_like(plain.scale) if plain.zero_point is None else plain.zero_point
    scale, zero_point = start[0].clone(), start[1].clone()
    count = view.qparam_shape[-1]
    whole_rows = view.values.numel() // max(1, math.prod(view.qparam_shape[:-1]))
    rows = None
    if coupled.columns is not None and len(hessian) == count and len(view.reduce_dims) == 1:
        rows = coupled.columns(hessian, factors, spec.args)
        limit = rows.rows_at_a_time(CHUNK // max(1, whole_rows)) * whole_rows
    else:
        limit = max(count * CHUNK // 4, CHUNK, whole_rows)
    for where, chunk in view.chunks(limit):
        first, last, _ = where[-1].indices(count)
        flat = [each[where].reshape(-1, last - first) for each in (scale, zero_point)]
        its_plain = [each[where].reshape(-1, last - first) for each in (plain.scale, zeros)]
        if rows is not None:
            values = chunk.reshape(-1, count, chunk.shape[-1])
            _refine_rows(rows, _in_float32(values, view.finite_only), flat, its_plain, spec)
        else:
            columns = [
                _Columns(
                    chunk.select(len(where) - 1, number - first),
                    len(where) - 1,
                    view.finite_only,
                    hessian[number if len(hessian) > 1 else 0],
                    factors[number if len(factors) > 1 else 0],
                    spec,
                    coupled.sum_coupled,
                )
                for number in range(first, last)
            ]
            _refine(columns, flat, its_plain)
        for all_of_them, part in zip((scale, zero_point), flat, strict=True):
            all_of_them[where] = part.view(all_of_them[where].shape)
    return scale, zero_point


def _in_float32(values: Tensor, finite_only: bool) -> Tensor:
    """Values in float32, zeros in place of those that are left out."""
    values = values.float()
    return torch.where(values.isfinite(), values, 0) if finite_only else values


def _refine_rows(
    coupled: CoupledColumns,
    values: Tensor,
    found: list[Tensor],
    plain: list[Tensor],
    spec: ScaleSpec,
) -> None:
    """As `_refine`, by an engine, of groups of one row each: values (rows, groups, columns)."""
    start, its_plain = Scales(*found), Scales(*plain)
    if spec.args.symmetric:
        start, its_plain = Scales(start.scale), Scales(its_plain.scale)
    candidates, fresh = _candidates(start, spec)
    scale, zero_point = coupled.refine(
        values, start.tensors, its_plain.tensors, candidates.tensors, fresh
    )
    found[0].copy_(scale)
    if zero_point is not None:
        found[1].copy_(zero_point)


def _refine(columns: list[_Columns], found: list[Tensor], plain: list[Tensor]) -> None:
    """Go through the column groups of some rows; scales and zero points are changed in place."""
    candidates, own, limits = [], [], []
    total = found[0].new_zeros((), dtype=torch.float32)
    for i, each in enumerate(columns):
        start, its_plain = _column(found, i), _column(plain, i)
        candidates.append(_candidates(start, each.spec)[0])
        error, share = each.judge(start)
        limit, plain_share = each.judge(its_plain)
        bad = ~(error <= limit)
        _put(found, i, its_plain.where(bad, start))
        own.append(torch.where(bad, limit, error))
        limits.append(limit)
        total = torch.where(each.by_row(bad).unsqueeze(-1), plain_share, share) + total
    for i, each in enumerate(columns):
        best, total = each.best(_column(found, i), candidates[i], own[i], limits[i], total)
        _put(found, i, best)


def _column(pair: list[Tensor], index: int) -> Scales:
    return Scales(pair[0][:, index], pair[1][:, index])


def _put(pair: list[Tensor], index: int, scales: Scales) -> None:
    pair[0][:, index] = scales.scale
    if scales.zero_point is not None:
        pair[1][:, index] = scales.zero_point


@dataclass(frozen=True)
class _Columns:
    """Some groups that lie above one another in the same columns.

    Args:
        raw: Their values, as in the view: kept dimensions, then reduced ones, columns last.
        num_kept: Number of kept dimensions.
        finite_only: Leave NaN and Inf out.
        hessian: X'X of the columns, shape (blocks, size, size).
        factors: What couples blocks and groups, shape (blocks, size, rank).
        spec: Which scales can be chosen.
        summing: `sum_coupled`, or that of an engine.
    """

    raw: Tensor
    num_kept: int
    finite_only: bool
    hessian: Tensor
    factors: Tensor
    spec: ScaleSpec
    summing: SumCoupled

    @property
    def groups(self) -> int:
        """Number of groups."""
        return math.prod(self.raw.shape[: self.num_kept])

    @property
    def rows(self) -> int:
        """Number of rows of each group."""
        return math.prod(self.raw.shape[self.num_kept : -1])

    def by_row(self, by_group: Tensor) -> Tensor:
        """A number of each group for each of its rows, along the first dimension."""
        return by_group if self.rows == 1 else by_group.repeat_interleave(self.rows, 0)

    def of_groups(self, by_row: Tensor) -> Tensor:
        """Sums over the rows of each group, along the first dimension."""
        return by_row if self.rows == 1 else by_row.unflatten(0, (self.groups, -1)).sum(1)

    def judge(self, scales: Scales, values: _Values | None = None) -> tuple[Tensor, Tensor]:
        """Of each group d'Hd, float64, and of each row L'd, (groups * rows, rank), float32."""
        own, share = [], []
        for rows, x in values or self._values():
            errors = self._errors(x, scales, rows)
            by_block = errors @ self.factors
            own.append(_quadratic(errors @ self.hessian, errors, by_block))
            share.append(by_block.sum(0))
        return self.of_groups(torch.cat(own)), torch.cat(share)

    def best(
        self, start: Scales, candidates: Scales, own: Tensor, limit: Tensor, total: Tensor
    ) -> tuple[Scales, Tensor]:
        """The best scales, as stored, and the sum of L'd with them.

        Args:
            start: Scales as they are.
            candidates: Which others are tried, (groups, candidates).
            own: d'Hd of each group with them.
            limit: d'Hd of each group with the scales of minimum and maximum: never exceeded.
            total: Sum of L'd over all column groups, (groups * rows, rank).
        """
        values = list(self._values()) if self.raw.numel() <= CHUNK else None
        own_of_each, coupled, share = self._score(candidates, start, total, values)
        allowed = own_of_each <= limit.unsqueeze(1)
        error = torch.where(allowed, own_of_each + 2 * coupled, torch.inf)
        index = error.nan_to_num(nan=torch.inf).argmin(1, keepdim=True)
        winner = candidates.each(lambda tensor: tensor.gather(1, index)[:, 0])
        # What ranked them cancels where codes have many bits: the winner's own error decides.
        rest = total - share
        its_own, its_share = self.judge(winner, values)
        coupling = (rest * (its_share - share)).sum(1, dtype=torch.float64)
        gain = 2 * self.of_groups(coupling) + its_own - own
        # A comparison with NaN (a scale that overflowed, a group of zeros) fails.
        better = (gain < 0) & (its_own <= limit)
        share = torch.where(self.by_row(better).unsqueeze(-1), its_share, share)
        return winner.where(better, start), rest + share

    def _score(
        self, candidates: Scales, start: Scales, total: Tensor, values: _Values | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of each candidate d'Hd, and d'Lr but for a constant; of each row L'd at the start."""
        sums, constant, shares = [], [], []
        for rows, x in values or self._values():
            share = (self._errors(x, start, rows) @ self.factors).sum(0)
            shares.append(share)
            slopes = (total[rows] - share) @ self.factors.transpose(-1, -2)
            products = x @ self.hessian
            if len(self.factors) > 1:
                by_block = x @ self.factors
                products += (by_block.sum(0) - by_block) @ self.factors.transpose(-1, -2)
            constant.append((x * products).sum((0, 2), dtype=torch.float64))
            part = self._of_rows(candidates, rows)
            scales = part.scale, part.zero_point, self.spec.args
            sums.append(self.summing(x, products, slopes, self.hessian, self.factors, *scales))
        quadratic, linear, slope = (self.of_groups(each) for each in torch.cat(sums, 1))
        scale = candidates.scale.double()
        own = self.of_groups(torch.cat(constant)).unsqueeze(1) + scale * (
            scale * quadratic - 2 * linear
        )
        return own, scale * slope, torch.cat(shares)

    def _values(self) -> Iterator[tuple[slice, Tensor]]:
        """Rows, and their values, shape (blocks, rows, size), float32."""
        raw = self.raw.reshape(-1, self.raw.shape[-1])
        blocks, size, _ = self.factors.shape
        step = max(1, CHUNK // (blocks * size))
        step = max(1, step // self.rows) * self.rows if self.groups > 1 else step
        for first in range(0, len(raw), step):
            values = _in_float32(raw[first : first + step], self.finite_only)
            if values.shape[-1] < blocks * size:
                values = torch.nn.functional.pad(values, (0, blocks * size - values.shape[-1]))
            values = values.view(-1, blocks, size).transpose(0, 1).contiguous()
            yield slice(first, first + step), values

    def _of_rows(self, scales: Scales, rows: slice) -> Scales:
        """The scales of the groups of some rows: rows of whole groups, or of the only group."""
        if self.groups > 1:
            rows = slice(rows.start // self.rows, rows.stop // self.rows)
        else:
            rows = slice(None)
        return scales.each(lambda tensor: tensor[rows])

    def _errors(self, x: Tensor, scales: Scales, rows: slice) -> Tensor:
        """Dequantized values less the values."""
        part = self._of_rows(scales, rows)
        scale = part.scale.repeat_interleave(x.shape[1] // len(part.scale))
        return _codes(x, part, self.spec).mul_(scale.unsqueeze(-1)).sub_(x)


def _sweep(args: QuantizationArgs) -> _Sweep:
    return ROW_SWEEP if args.strategy == QuantizationStrategy.CHANNEL else SWEEP


def _candidates(start: Scales, spec: ScaleSpec) -> tuple[Scales, list[bool]]:
    """Scales as stored, and zero points, in a new last dimension.

    From the start on upwards, then downwards, neighbours side by side, and so for each sign and
    zero point.

    Returns:
        The candidates, and for each whether one of these walks begins with it.
    """
    device = start.scale.device
    scale = start.scale.unsqueeze(-1)
    sweep = _sweep(spec.args)
    if has_scale_codes(spec.args):
        table = all_scales(spec, device)
        # The start is one of them, but for the rounding of a division.
        index = torch.searchsorted(table, scale * (1 - 1e-3))
        steps = [*range(sweep.codes + 1), *range(-1, -sweep.codes - 1, -1)]
        offsets = torch.tensor(steps, dtype=torch.int64, device=device)
        found = Scales(table[(index + offsets).clamp(0, table.numel() - 1)])
        return found, [step in (0, -1) for step in steps]
    codes, symmetric = spec.format, bool(spec.args.symmetric)
    reach = sweep.reach * 0.5 ** (codes.num_bits - 4 if codes.integer else 0)
    sides = sweep.sides
    steps = [*range(sides + 1), *range(-1, -sides - 1, -1)]
    fresh = [step in (0, -1) for step in steps]
    factors = 1 + torch.tensor(steps, dtype=torch.float32, device=device) * (reach / sides)
    if spec.negative_scales:
        factors, fresh = torch.cat([factors, -factors]), fresh * 2
    stored = spec.store(scale * factors)
    stored = torch.where(stored == 0, scale, stored)  # too small to be stored
    if symmetric:
        return Scales(stored), fresh
    assert start.zero_point is not None
    shifts = torch.tensor([0, -1, 1], dtype=torch.float32, device=device)
    zeros = (start.zero_point.unsqueeze(-1) + shifts).clamp(codes.low, codes.high)
    zeros = zeros.repeat_interleave(len(fresh), -1)
    return Scales(stored.repeat(*(1,) * start.scale.dim(), 3), zeros), fresh * 3


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
    """The sums that the errors of candidates are made of: the reference.

    With codes q of a row at a scale, relative to the zero point, and M the matrix of all blocks:
    q'Mq, q'Mx, and q times the slopes.

    Args:
        x: Values, shape (blocks, rows, size), float32.
        products: Mx, of the same shape.
        slopes: What else codes are multiplied by, of the same shape.
        hessian: Blocks of M on its diagonal, shape (blocks, size, size).
        factors: The others are products of these, shape (blocks, size, rank).
        scale: Candidates, shape (groups, candidates), float32; each group has the same number of
            rows, which stand together.
        zero_point: Zero points of the same shape; None for zero.
        args: The number format.

    Returns:
        Shape (3, rows, candidates), float64.
    """
    candidates, spec = Scales(scale, zero_point), ScaleSpec(args, torch.float32)
    count = scale.shape[1]
    found = torch.empty(3, x.shape[1], count, dtype=torch.float64, device=x.device)
    for k in range(count):
        one = candidates.each(operator.itemgetter((slice(None), k)))
        q = _codes(x, one, spec)
        found[0, :, k] = _quadratic(q @ hessian, q, q @ factors)
        found[1, :, k] = (q * products).sum(-1).sum(0, dtype=torch.float64)
        found[2, :, k] = (q * slopes).sum(-1).sum(0, dtype=torch.float64)
    return found


def _quadratic(products: Tensor, u: Tensor, by_block: Tensor) -> Tensor:
    """Of each row u'Mu, float64, given Hu and L'u of each block; the first is overwritten."""
    total = products.mul_(u).sum(-1).sum(0, dtype=torch.float64)
    if len(by_block) > 1:
        by_block = by_block.double()
        total += by_block.sum(0).square().sum(-1) - by_block.square().sum((0, -1))
    return total


def _codes(x: Tensor, scales: Scales, spec: ScaleSpec) -> Tensor:
    """Codes relative to the zero point, of the values' shape; scales by group, (groups,)."""
    rows = x.shape[1] // len(scales.scale)
    # Divided, as compressed-tensors does it: the largest value lies on a tie with min/max, and to
    # which side it goes is not all the same here.
    scaled = x / scales.scale.repeat_interleave(rows).unsqueeze(-1)
    if spec.args.symmetric or scales.zero_point is None:
        return spec.format.round(scaled)
    return spec.format.round(scaled, scales.zero_point.repeat_interleave(rows).unsqueeze(-1))
