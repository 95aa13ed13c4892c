"""Sums over groups for many candidate scales at once: what every scale search is made of.

`GroupBatch` brings a view's values together as (groups, n) float32, some groups at a time, and
evaluates sums of a candidate tile over them, eagerly or by a kernel of an engine. The groups of a
`ReadBatch` are read by an engine where they lie.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Protocol

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor

from calipers.engines.kernels import CandidateSums, EngineGroups
from calipers.formats import Format
from calipers.grouping import Groups, chunk_size

__all__ = ["Batch", "Candidates", "GroupBatch", "Sums", "batches_of"]

#: Longest run of values summed in float32 by one loop; longer groups are summed run by run.
LONGEST_RUN = 4096


@dataclass(frozen=True)
class GroupPiece:
    """Values of some groups, or a part of the values of each.

    Args:
        where: Index of the groups in the view's `qparam_shape`.
        values: Shape (groups, n), float32.
        weight: Importance, of the same shape; None weighs all alike.
    """

    where: tuple[slice, ...]
    values: Tensor
    weight: Tensor | None


def group_pieces(view: Groups, importance: Groups | None, limit: int) -> Iterator[GroupPiece]:
    """Walk through a view; what is not finite becomes zero where the view leaves it out.

    Args:
        view: The values, of any floating dtype.
        importance: Their weights, of the same shape; None weighs all alike.
        limit: Most values of a piece, one row at least.
    """
    weights = None if importance is None else importance.chunks(limit)
    # Pieces with parts of groups may differ in what they hold of the same groups.
    shared = _SharedWeights() if view.group_size <= limit else None
    for where, piece in view.chunks(limit):
        # In float32 a piece stays in the cache; sixteen-bit loads beside integer arithmetic would
        # not be vectorized.
        values = piece.float()
        if view.finite_only:
            values = torch.where(values.isfinite(), values, 0)
        values = values.reshape(prod(piece.shape[: len(where)]), -1)
        weight = None
        if weights is not None:
            part = next(weights)[1]
            flat = part.reshape(-1) if shared is None else shared.flat(part, where)
            weight = flat.view(values.shape)
        yield GroupPiece(where, values, weight)


class _SharedWeights:
    """The weights of a piece one after the other; of pieces with the same ones, one copy."""

    def __init__(self) -> None:
        self._last: tuple[tuple[object, ...], Tensor] | None = None

    def flat(self, weight: Tensor, where: tuple[slice, ...]) -> Tensor:
        """The weights, contiguous."""
        if weight.stride(0) != 0:
            return weight.reshape(-1)
        same = (weight.shape, *((part.start, part.stop) for part in where[1:]))
        if self._last is None or self._last[0] != same:
            self._last = same, weight.reshape(-1)
        return self._last[1]


def number_of_runs(length: int) -> int:
    """Number of equal runs, none longer than LONGEST_RUN, that a group is summed in."""
    for runs in range(-(-length // LONGEST_RUN), length // 64 + 1):
        if length % runs == 0:
            return runs
    return 1


@dataclass(frozen=True)
class Sums:
    """What to sum for each candidate, with x in units of its group's base and codes q of x / p.

    Args:
        format: The number format.
        kind: "least squares": sum w x q and sum w q^2; "all": these two and sum w (x - p q)^2;
            "polish": the same, the first two in float64; "bounded residual": sum w (x - p q)^2,
            and one more row, the sum of w (x - high p)_+^2 for the last candidate p, which no
            smaller scale undercuts.
        tile: Number of candidates of a call.
    """

    format: Format
    kind: str
    tile: int

    def __call__(
        self,
        values: Tensor,
        weight: Tensor | None,
        inverse_base: Tensor,
        ratio: Tensor,
        zero_point: Tensor | None,
    ) -> Tensor:
        """Sums of each row for each candidate.

        Args:
            values: Shape (rows, n), float32.
            weight: Of the same shape, >= 0; None weighs all alike.
            inverse_base: Shape (rows,): x = value * inverse_base.
            ratio: Candidate scales in units of the base, shape (tile, rows).
            zero_point: Of the same shape; None for zero.

        Returns:
            Shape (sums * tile [+ 1], rows), one sum after the other.
        """
        x = values * inverse_base.unsqueeze(-1)
        if not self.format.integer:
            x = x.abs()  # codes are symmetric: sizes do
        wx = x if weight is None else x * weight
        per_candidate = [
            self._of_candidate(
                x, wx, weight, ratio[i], None if zero_point is None else zero_point[i]
            )
            for i in range(self.tile)
        ]
        rows = [sums[k] for k in range(len(per_candidate[0])) for sums in per_candidate]
        if self.kind == "bounded residual":
            over = (x - self.format.high * ratio[self.tile - 1].unsqueeze(-1)).clamp(min=0)
            rows.append(_weighted(over, weight, over).sum(-1))
        return torch.stack(rows)

    def of_all(self, found: Tensor) -> Tensor:
        """The rows that `kind` asks for, out of the 3 * tile + 1 rows that a kernel computes."""
        count = found.shape[0] // 3
        if self.kind == "least squares":
            return found[: 2 * count]
        return found[2 * count :] if self.kind == "bounded residual" else found[: 3 * count]

    def _of_candidate(
        self,
        x: Tensor,
        wx: Tensor,
        weight: Tensor | None,
        ratio: Tensor,
        zero_point: Tensor | None,
    ) -> tuple[Tensor, ...]:
        zero = None if zero_point is None else zero_point.unsqueeze(-1)
        codes = self.format.round(x * (1 / ratio).unsqueeze(-1), zero)
        if self.kind == "bounded residual":
            rest = x - codes * ratio.unsqueeze(-1)
            return (_weighted(rest, weight, rest).sum(-1),)
        # Sums of the last fit: in float64 they are the same in any order.
        dtype = torch.float64 if self.kind == "polish" else torch.float32
        a = (wx * codes).sum(-1, dtype=dtype)
        b = _weighted(codes, weight, codes).sum(-1, dtype=dtype)
        if self.kind == "least squares":
            return a, b
        rest = x - codes * ratio.unsqueeze(-1)
        return a, b, _weighted(rest, weight, rest).sum(-1).to(dtype)


def _weighted(a: Tensor, weight: Tensor | None, b: Tensor) -> Tensor:
    return a * b if weight is None else a * weight * b


@dataclass(frozen=True)
class Candidates:
    """Candidate scales of the groups of a batch.

    Args:
        inverse_base: Inverse of each group's unit of scale, shape (groups,), float32.
        ratio: Scales in units of the base, shape (candidates, groups), float32.
        zero_point: Of the same shape; None for zero.
    """

    inverse_base: Tensor
    ratio: Tensor
    zero_point: Tensor | None = None

    def of(self, where: tuple[slice, ...], shape: tuple[int, ...]) -> Candidates:
        """Those of some groups, by index into groups of this shape."""

        def part(values: Tensor | None) -> Tensor | None:
            if values is None:
                return None
            lead = values.dim() - 1
            whole = values.view(*values.shape[:lead], *shape)
            return whole[(slice(None),) * lead + where].reshape(*values.shape[:lead], -1)

        return Candidates(part(self.inverse_base), part(self.ratio), part(self.zero_point))  # type: ignore[arg-type]


class Batch(Protocol):
    """Some groups of a view, of which sums can be had."""

    @property
    def where(self) -> tuple[slice, ...]:
        """Index of the groups in the view's `qparam_shape`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of that part of the qparams."""

    @property
    def whole(self) -> EngineGroups | None:
        """The groups where an engine can search them by itself."""

    @property
    def selectable(self) -> bool:
        """Whether some of the groups make a batch of their own."""

    def sum(self, sums: Sums, candidates: Candidates) -> Tensor:
        """The sums of every group, shape (number of sums, groups)."""


@dataclass(frozen=True)
class GroupBatch:
    """Some whole groups of a view: small ones in memory, large ones walked through in pieces.

    Args:
        where: Index of the groups in the view's `qparam_shape`.
        shape: Shape of that part of the qparams.
        values: Shape (groups, n), float32; None for groups that do not fit into a piece.
        weight: Importance, of the same shape.
        walk: For large groups: yields their pieces.
        code: What evaluates the sums.
    """

    where: tuple[slice, ...]
    shape: tuple[int, ...]
    values: Tensor | None
    weight: Tensor | None
    walk: Callable[[], Iterator[GroupPiece]] | None
    code: CandidateSums

    @property
    def whole(self) -> None:
        """No engine searches groups in memory by itself."""
        return None

    @property
    def selectable(self) -> bool:
        """Whether the groups are in memory."""
        return self.values is not None

    def select(self, groups: Tensor) -> GroupBatch:
        """Some of the groups, by index, as a batch of their own; of groups in memory only."""
        assert self.values is not None
        weight = None if self.weight is None else self.weight[groups]
        return replace(
            self, shape=(groups.numel(),), values=self.values[groups], weight=weight, where=()
        )

    def sum(self, sums: Sums, candidates: Candidates) -> Tensor:
        """The sums of every group, shape (number of sums, groups)."""
        if self.values is not None:
            return self._sum(sums, self.values, self.weight, candidates)
        assert self.walk is not None
        total: Tensor | None = None
        for piece in self.walk():
            its_candidates = candidates.of(piece.where, self.shape)
            part = self._sum(sums, piece.values, piece.weight, its_candidates).double()
            if total is None:
                total = part.new_zeros(part.shape[0], *self.shape)
            index = (slice(None), *piece.where)
            target = total[index]
            target += part.view(target.shape)
        assert total is not None
        return total.view(total.shape[0], -1)

    def _sum(
        self, sums: Sums, values: Tensor, weight: Tensor | None, candidates: Candidates
    ) -> Tensor:
        groups, inverse = values.shape[0], candidates.inverse_base
        ratio, zero_point = candidates.ratio, candidates.zero_point
        runs = number_of_runs(values.shape[1])
        if runs > 1:
            values = values.view(groups * runs, -1)
            weight = None if weight is None else weight.view(values.shape)
            inverse = inverse.repeat_interleave(runs)
            ratio = ratio.repeat_interleave(runs, dim=1)
            if zero_point is not None:
                zero_point = zero_point.repeat_interleave(runs, dim=1)
        sum_rows = self.code.sum_rows
        if sum_rows is not None and sums.kind != "polish":  # which wants float64, once
            found = sums.of_all(sum_rows(sums.format, values, weight, inverse, ratio, zero_point))
        else:
            found = sums(values, weight, inverse, ratio, zero_point)
        return found.view(-1, groups, runs).sum(-1) if runs > 1 else found


@dataclass(frozen=True)
class ReadBatch:
    """Some whole groups of a view, which an engine reads where they lie."""

    groups: EngineGroups

    @property
    def where(self) -> tuple[slice, ...]:
        """Index of the groups in the view's `qparam_shape`."""
        return self.groups.where

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of that part of the qparams."""
        return self.groups.shape

    @property
    def whole(self) -> EngineGroups | None:
        """The groups, unless they are so long that they are read in runs."""
        return self.groups if self.groups.in_one_run else None

    @property
    def selectable(self) -> bool:
        """Groups cannot be told apart: a call costs little for those that are done."""
        return False

    def sum(self, sums: Sums, candidates: Candidates) -> Tensor:
        """The sums of every group, as `GroupBatch.sum`, float64."""
        found = self.groups.sum(candidates.inverse_base, candidates.ratio, candidates.zero_point)
        return sums.of_all(found)


def batches_of(
    view: Groups,
    importance: Groups | None,
    args: QuantizationArgs,
    code: CandidateSums,
) -> Iterator[GroupBatch | ReadBatch]:
    """All groups of a view, some at a time, in the way that suits an engine.

    Args:
        view: The values, of any floating dtype.
        importance: The weights of the values, of the same shape; None weighs all alike.
        args: Quantization arguments.
        code: What evaluates the sums.
    """
    if code.read_groups is None:
        yield from group_batches(view, importance, code)
    else:
        for groups in code.read_groups(view, importance, args):
            yield ReadBatch(groups)


def group_batches(
    view: Groups, importance: Groups | None, code: CandidateSums
) -> Iterator[GroupBatch]:
    """All groups of a view, some at a time, in bounded scratch memory.

    Args:
        view: The values, of any floating dtype; what is not finite becomes zero where the view
            leaves it out.
        importance: The weights of the values, of the same shape; None weighs all alike.
        code: What evaluates the sums.
    """
    limit = chunk_size(view.values)
    shape = view.qparam_shape
    if view.group_size > limit:
        everything = tuple(slice(None) for _ in shape)
        walk = functools.partial(group_pieces, view, importance, limit)
        yield GroupBatch(everything, shape, None, None, walk, code)
        return
    for piece in group_pieces(view, importance, limit):
        found = tuple(len(range(*s.indices(n))) for s, n in zip(piece.where, shape, strict=True))
        yield GroupBatch(piece.where, found, piece.values, piece.weight, None, code)
