"""Scales by the error of a layer's output, from blocks of the inputs' X'X and the inputs' mean.

For errors d = dequantized - x of a row the error of its output is d'X'Xd. Of X'X the blocks of the
columns that share a scale are known, and of the rest the part that the mean m of the inputs makes,
m m' for each token: most of it where inputs are not centred, as they come out of an activation
function or of a norm with a bias. So a group's error is d'Hd + 2 r m'd, with H its block and r what
the other groups of the row add to the mean of the output. One group after the other is given the
best scale, the others as they are.

For fixed codes q the best scale is (q'Hx - r m'q) / (q'Hq).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from calipers.ranges.codes import all_scales, has_scale_codes
from calipers.ranges.projection import Scales, Scheme, min_max_scales
from calipers.ranges.rounding import round_to_codes
from calipers.ranges.views import GroupedView

__all__ = ["refine_by_hessian"]

#: Candidates about a scale, as factors: how far they reach, and how many there are.
REACH, CANDIDATES = 0.2, 13
#: The same for scales that are codes: steps to each side.
CODE_STEPS = 3
#: How often every group is looked at.
ROUNDS = 2
#: Values of a column group that are worked on at a time.
PIECE = 2**18


def refine_by_hessian(
    view: GroupedView,
    start: tuple[Tensor, Tensor],
    extremes: tuple[Tensor, Tensor],
    hessian: Tensor,
    mean: Tensor,
    scheme: Scheme,
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
        mean: Sum of the inputs over the root of their number, shape (column groups, blocks, size).
        scheme: What is searched for.

    Returns:
        Scale and zero point, as in `start`. In no group is d'Hd greater than with minimum and
        maximum.
    """
    plain = min_max_scales(*extremes, scheme)
    zeros = torch.zeros_like(plain.scale) if plain.zero_point is None else plain.zero_point
    scale, zero_point = start[0].clone(), start[1].clone()
    count = view.qparam_shape[-1]
    for where, piece in view.pieces(max(1, count) * PIECE):
        first, last, _ = where[-1].indices(count)
        kept = len(where)
        columns = [
            _Columns(
                piece.select(kept - 1, number - first),
                kept - 1,
                view.finite_only,
                hessian[number if len(hessian) > 1 else 0],
                mean[number if len(mean) > 1 else 0],
                scheme,
            )
            for number in range(first, last)
        ]
        flat = [each[where].reshape(-1, last - first) for each in (scale, zero_point)]
        its_plain = [each[where].reshape(-1, last - first) for each in (plain.scale, zeros)]
        _refine(columns, flat, its_plain)
        for whole, part in zip((scale, zero_point), flat, strict=True):
            whole[where] = part.view(whole[where].shape)
    return scale, zero_point


def _refine(columns: list[_Columns], found: list[Tensor], plain: list[Tensor]) -> None:
    """Go through the column groups of some rows; scales and zero points are changed in place."""
    scale, zero_point = found
    shares = [each.share(Scales(scale[:, i], zero_point[:, i])) for i, each in enumerate(columns)]
    total = torch.stack(shares).sum(0)
    for _ in range(ROUNDS):
        for i, each in enumerate(columns):
            rest = total - shares[i]
            best, share = each.best(
                Scales(scale[:, i], zero_point[:, i]), Scales(plain[0][:, i], plain[1][:, i]), rest
            )
            scale[:, i] = best.scale
            if best.zero_point is not None:
                zero_point[:, i] = best.zero_point
            shares[i], total = share, rest + share


@dataclass(frozen=True)
class _Columns:
    """Some groups that lie above one another in the same columns.

    Args:
        raw: Their values, as in the view: kept dimensions, then reduced ones, columns last.
        num_kept: Number of kept dimensions.
        finite_only: Leave NaN and Inf out.
        hessian: X'X of the columns, shape (blocks, size, size).
        mean: Of the inputs, shape (blocks, size).
        scheme: What is searched for.
    """

    raw: Tensor
    num_kept: int
    finite_only: bool
    hessian: Tensor
    mean: Tensor
    scheme: Scheme

    @property
    def groups(self) -> int:
        """Number of groups."""
        return math.prod(self.raw.shape[: self.num_kept])

    def values(self) -> Tensor:
        """Shape (blocks, groups * rows, size), float32."""
        values = self.raw.float()
        if self.finite_only:
            values = torch.where(values.isfinite(), values, 0)
        blocks, size = self.mean.shape
        values = values.reshape(-1, values.shape[-1])
        if values.shape[-1] < blocks * size:
            values = torch.nn.functional.pad(values, (0, blocks * size - values.shape[-1]))
        return values.view(-1, blocks, size).transpose(0, 1).contiguous()

    def share(self, scales: Scales) -> Tensor:
        """What the errors of each row add to the mean of its output, shape (groups * rows,)."""
        return self._of_mean(self._errors(self.values(), scales)).sum(0)

    def best(self, start: Scales, plain: Scales, rest: Tensor) -> tuple[Scales, Tensor]:
        """The best scales, as stored, and the share of each row with them.

        Args:
            start: Scales as they are.
            plain: Those of minimum and maximum.
            rest: What the other column groups add to the mean of the output, (groups * rows,).
        """
        x = self.values()
        best, (best_error, best_own, best_share) = start, self._judge(x, start, rest)
        plain_error, plain_own, plain_share = self._judge(x, plain, rest)
        bad = ~(best_own <= plain_own)
        best, best_error = plain.where(bad, best), torch.where(bad, plain_error, best_error)
        best_share = torch.where(self._by_row(bad), plain_share, best_share)
        for candidate in self._candidates(x, start, rest):
            error, own, share = self._judge(x, candidate, rest)
            # A comparison with NaN (a scale that overflowed, a group of zeros) fails.
            better = (error < best_error) & (own <= plain_own) & (candidate.scale != 0)
            best, best_error = candidate.where(better, best), torch.where(better, error, best_error)
            best_share = torch.where(self._by_row(better), share, best_share)
        return best, best_share

    def _candidates(self, x: Tensor, start: Scales, rest: Tensor) -> Iterator[Scales]:
        if has_scale_codes(self.scheme.args):
            yield from self._codes_about(start)
            return
        # Projected, and ranked by the error that their codes have then; only the best is stored.
        hx = x @ self.hessian
        gain = torch.full_like(start.scale, -torch.inf, dtype=torch.float64)
        winner = start
        for candidate in self._factors(start):
            q = self._codes(x, candidate)
            a = self._total(hx, x, q) - self._of_groups(rest * self._of_mean(q).sum(0))
            b = self._total(q @ self.hessian, q, q)
            projected = Scales((a / b).float(), candidate.zero_point)
            same_sign = projected.scale * candidate.scale > 0
            better = (b > 0) & same_sign & (a * a / b > gain)
            winner, gain = projected.where(better, winner), torch.where(better, a * a / b, gain)
        yield Scales(self.scheme.store(winner.scale), winner.zero_point)

    def _factors(self, start: Scales) -> Iterator[Scales]:
        rounding = self.scheme.rounding
        signs = (1, -1) if self.scheme.signed else (1,)
        for sign in signs:
            for factor in (1 + REACH * torch.linspace(-1, 1, CANDIDATES)).tolist():
                scale = start.scale * (sign * factor)
                if self.scheme.args.symmetric:
                    yield Scales(scale)
                    continue
                assert start.zero_point is not None
                for shift in (-1, 0, 1):
                    zero = (start.zero_point + shift).clamp(rounding.low, rounding.high)
                    yield Scales(scale, zero)

    def _codes_about(self, start: Scales) -> Iterator[Scales]:
        table = all_scales(self.scheme, start.scale.device)
        # The start is one of them, but for the rounding of a division.
        index = torch.searchsorted(table, start.scale * (1 - 1e-3))
        for step in range(-CODE_STEPS, CODE_STEPS + 1):
            yield Scales(table[(index + step).clamp(0, table.numel() - 1)])

    def _judge(self, x: Tensor, scales: Scales, rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Error of each group beside the others, d'Hd alone, and the share of each row."""
        errors = self._errors(x, scales)
        own = self._total(errors @ self.hessian, errors, errors)
        share = self._of_mean(errors).sum(0)
        return own + 2 * self._of_groups(rest * share), own, share

    def _errors(self, x: Tensor, scales: Scales) -> Tensor:
        """Dequantized values less the values."""
        return self._codes(x, scales).mul_(self._by_row(scales.scale).unsqueeze(-1)).sub_(x)

    def _codes(self, x: Tensor, scales: Scales) -> Tensor:
        """Codes relative to the zero point, of the values' shape."""
        rounding, symmetric = self.scheme.rounding, bool(self.scheme.args.symmetric)
        scaled = x * self._by_row(1 / scales.scale).unsqueeze(-1)
        if not rounding.integer:
            return round_to_codes(scaled.abs(), None, rounding).mul_(scaled.sign())
        if symmetric or scales.zero_point is None:
            return scaled.round_().clamp_(rounding.low, rounding.high)
        shift = self._by_row(scales.zero_point).unsqueeze(-1)
        return scaled.add_(shift).round_().clamp_(rounding.low, rounding.high).sub_(shift)

    def _total(self, hu: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """U'Hv of each group, float64, given uH; of different blocks by the mean alone."""
        by_row = (hu * v).sum(-1).double().sum(0)
        if len(self.mean) > 1:
            left, right = self._of_mean(u), self._of_mean(v)
            by_row += left.sum(0) * right.sum(0) - (left * right).sum(0)
        return self._of_groups(by_row)

    def _of_mean(self, u: Tensor) -> Tensor:
        """The mean's product with each row, by block, (blocks, groups * rows), float64."""
        return (u @ self.mean.unsqueeze(-1)).squeeze(-1).double()

    def _of_groups(self, by_row: Tensor) -> Tensor:
        return by_row.view(self.groups, -1).sum(1)

    def _by_row(self, by_group: Tensor) -> Tensor:
        rows = math.prod(self.raw.shape[self.num_kept : -1])
        return by_group if rows == 1 else by_group.repeat_interleave(rows)
