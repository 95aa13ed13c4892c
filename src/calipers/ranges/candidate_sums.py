"""Sums over groups for a tile of candidate scales: what every scale search is made of.

A `MemoryChunk` holds the values of some groups as (groups, n) float32 and sums over them, eagerly
or by a kernel of an engine. The groups of an `EngineChunk` are read by an engine where they lie.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import prod

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor

from calipers.engines.kernels import CandidateSums, EngineGroups
from calipers.formats import Format
from calipers.grouping import Groups, chunk_size

__all__ = ["Candidates", "Chunk", "MemoryChunk", "Sums", "chunks_of"]

#: Most values that one loop sums in float32; longer groups are summed split by split.
LONGEST_SPLIT = 4096


@dataclass(frozen=True)
class Rows:
    """Values of some groups, or a split of each, one group a row.

    Args:
        where: Index of the groups among the qparams.
        values: Shape (groups, n), float32.
        importance: That of each value, of the same shape; None weighs all alike.
    """

    where: tuple[slice, ...]
    values: Tensor
    importance: Tensor | None


def rows_of(view: Groups, importance: Groups | None, limit: int) -> Iterator[Rows]:
    """Walk through a view; what is not finite becomes zero where the view leaves it out.

    Args:
        view: The values, of any floating dtype.
        importance: That of the values, of the same shape; None weighs all alike.
        limit: Most values of a chunk, one row at least.
    """
    others = None if importance is None else importance.chunks(limit)
    # Chunks with splits of groups may differ in what they hold of the same groups.
    shared = _SharedImportance() if view.group_size <= limit else None
    for where, chunk in view.chunks(limit):
        # In float32 a chunk stays in the cache; sixteen-bit loads beside integer arithmetic would
        # not be vectorized.
        values = chunk.float()
        if view.finite_only:
            values = torch.where(values.isfinite(), values, 0)
        values = values.reshape(prod(chunk.shape[: len(where)]), -1)
        its_importance = None
        if others is not None:
            other = next(others)[1]
            flat = other.reshape(-1) if shared is None else shared.flat(other, where)
            its_importance = flat.view(values.shape)
        yield Rows(where, values, its_importance)


class _SharedImportance:
    """The importance of a chunk as one row; chunks of rows that share it share a copy."""

    def __init__(self) -> None:
        self._last: tuple[tuple[object, ...], Tensor] | None = None

    def flat(self, importance: Tensor, where: tuple[slice, ...]) -> Tensor:
        """The importance, one-dimensional and contiguous."""
        if importance.stride(0) != 0:
            return importance.reshape(-1)
        same = (importance.shape, *((span.start, span.stop) for span in where[1:]))
        if self._last is None or self._last[0] != same:
            self._last = same, importance.reshape(-1)
        return self._last[1]


def number_of_splits(length: int) -> int:
    """Number of equal splits of a group, none longer than LONGEST_SPLIT."""
    for splits in range(-(-length // LONGEST_SPLIT), length // 64 + 1):
        if length % splits == 0:
            return splits
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
        importance: Tensor | None,
        inverse_base: Tensor,
        factor: Tensor,
        zero_point: Tensor | None,
    ) -> Tensor:
        """Sums of each row for each candidate.

        Args:
            values: Shape (rows, n), float32.
            importance: Of the same shape, >= 0; None weighs all alike.
            inverse_base: Shape (rows,): x = value * inverse_base.
            factor: Candidate scales in units of the base, shape (tile, rows).
            zero_point: Of the same shape; None for zero.

        Returns:
            Shape (sums * tile [+ 1], rows), one sum after the other.
        """
        x = values * inverse_base.unsqueeze(-1)
        if not self.format.integer:
            x = x.abs()  # codes are symmetric: sizes do
        wx = x if importance is None else x * importance
        per_candidate = [
            self._of_candidate(
                x, wx, importance, factor[i], None if zero_point is None else zero_point[i]
            )
            for i in range(self.tile)
        ]
        rows = [sums[k] for k in range(len(per_candidate[0])) for sums in per_candidate]
        if self.kind == "bounded residual":
            over = (x - self.format.high * factor[self.tile - 1].unsqueeze(-1)).clamp(min=0)
            rows.append(_weighted(over, importance, over).sum(-1))
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
        importance: Tensor | None,
        factor: Tensor,
        zero_point: Tensor | None,
    ) -> tuple[Tensor, ...]:
        zero = None if zero_point is None else zero_point.unsqueeze(-1)
        codes = self.format.round(x * (1 / factor).unsqueeze(-1), zero)
        if self.kind == "bounded residual":
            rest = x - codes * factor.unsqueeze(-1)
            return (_weighted(rest, importance, rest).sum(-1),)
        # Sums of the last fit: in float64 they are the same in any order.
        dtype = torch.float64 if self.kind == "polish" else torch.float32
        a = (wx * codes).sum(-1, dtype=dtype)
        b = _weighted(codes, importance, codes).sum(-1, dtype=dtype)
        if self.kind == "least squares":
            return a, b
        rest = x - codes * factor.unsqueeze(-1)
        return a, b, _weighted(rest, importance, rest).sum(-1).to(dtype)


def _weighted(a: Tensor, importance: Tensor | None, b: Tensor) -> Tensor:
    return a * b if importance is None else a * importance * b


@dataclass(frozen=True)
class Candidates:
    """Candidate scales of each group of a chunk.

    Args:
        inverse_base: Inverse of each group's unit of scale, shape (groups,), float32.
        factor: Of each candidate on the base, shape (candidates, groups), float32.
        zero_point: Of the same shape; None for zero.
    """

    inverse_base: Tensor
    factor: Tensor
    zero_point: Tensor | None = None

    def of(self, where: tuple[slice, ...], shape: tuple[int, ...]) -> Candidates:
        """The candidates of some groups, by index into groups of this shape."""

        def pick(values: Tensor | None) -> Tensor | None:
            if values is None:
                return None
            lead = values.dim() - 1
            whole = values.view(*values.shape[:lead], *shape)
            return whole[(slice(None),) * lead + where].reshape(*values.shape[:lead], -1)

        return Candidates(pick(self.inverse_base), pick(self.factor), pick(self.zero_point))  # type: ignore[arg-type]


@dataclass(frozen=True)
class MemoryChunk:
    """Some whole groups: short ones in memory, long ones walked through in splits.

    Args:
        where: Index of the groups among the qparams.
        shape: Shape of these qparams.
        values: Shape (groups, n), float32; None for groups longer than a chunk.
        importance: That of each value, of the same shape.
        walk: For long groups: yields splits of them.
        code: What evaluates the sums.
    """

    where: tuple[slice, ...]
    shape: tuple[int, ...]
    values: Tensor | None
    importance: Tensor | None
    walk: Callable[[], Iterator[Rows]] | None
    code: CandidateSums

    @property
    def whole(self) -> None:
        """No engine searches groups in memory by itself."""
        return None

    def select(self, groups: Tensor) -> MemoryChunk:
        """Some of the groups, by index, as a chunk of their own: of groups in memory alone."""
        assert self.values is not None
        importance = None if self.importance is None else self.importance[groups]
        return replace(
            self,
            shape=(groups.numel(),),
            values=self.values[groups],
            importance=importance,
            where=(),
        )

    def sum(self, sums: Sums, candidates: Candidates) -> Tensor:
        """The sums of every group, shape (number of sums, groups)."""
        if self.values is not None:
            return self._sum(sums, self.values, self.importance, candidates)
        assert self.walk is not None
        total: Tensor | None = None
        for rows in self.walk():
            its_candidates = candidates.of(rows.where, self.shape)
            found = self._sum(sums, rows.values, rows.importance, its_candidates).double()
            if total is None:
                total = found.new_zeros(found.shape[0], *self.shape)
            index = (slice(None), *rows.where)
            target = total[index]
            target += found.view(target.shape)
        assert total is not None
        return total.view(total.shape[0], -1)

    def _sum(
        self, sums: Sums, values: Tensor, importance: Tensor | None, candidates: Candidates
    ) -> Tensor:
        groups, inverse = values.shape[0], candidates.inverse_base
        factor, zero_point = candidates.factor, candidates.zero_point
        splits = number_of_splits(values.shape[1])
        if splits > 1:
            values = values.view(groups * splits, -1)
            importance = None if importance is None else importance.view(values.shape)
            inverse = inverse.repeat_interleave(splits)
            factor = factor.repeat_interleave(splits, dim=1)
            if zero_point is not None:
                zero_point = zero_point.repeat_interleave(splits, dim=1)
        sum_rows = self.code.sum_rows
        if sum_rows is not None and sums.kind != "polish":  # which wants float64, once
            found = sums.of_all(
                sum_rows(sums.format, values, importance, inverse, factor, zero_point)
            )
        else:
            found = sums(values, importance, inverse, factor, zero_point)
        return found.view(-1, groups, splits).sum(-1) if splits > 1 else found


@dataclass(frozen=True)
class EngineChunk:
    """Some whole groups, which an engine reads where they lie; see `MemoryChunk`.

    Args:
        whole: The groups, unless they are so long that the engine splits them.
    """

    where: tuple[slice, ...]
    shape: tuple[int, ...]
    groups: EngineGroups
    whole: EngineGroups | None

    def sum(self, sums: Sums, candidates: Candidates) -> Tensor:
        """The sums of every group, as `MemoryChunk.sum`, float64."""
        found = self.groups.sum(candidates.inverse_base, candidates.factor, candidates.zero_point)
        return sums.of_all(found)


Chunk = MemoryChunk | EngineChunk


def chunks_of(
    view: Groups,
    importance: Groups | None,
    args: QuantizationArgs,
    code: CandidateSums,
) -> Iterator[Chunk]:
    """All groups of a view, some at a time, in the way that suits an engine.

    Args:
        view: The values, of any floating dtype.
        importance: That of the values, of the same shape; None weighs all alike.
        args: Quantization arguments.
        code: What evaluates the sums.
    """
    if code.read_groups is None:
        yield from memory_chunks(view, importance, code)
    else:
        for groups in code.read_groups(view, importance, args):
            whole = groups if groups.whole else None
            yield EngineChunk(groups.where, groups.shape, groups, whole)


def memory_chunks(
    view: Groups, importance: Groups | None, code: CandidateSums
) -> Iterator[MemoryChunk]:
    """All groups of a view, some at a time, in bounded scratch memory.

    Args:
        view: The values, of any floating dtype; what is not finite becomes zero where the view
            leaves it out.
        importance: That of the values, of the same shape; None weighs all alike.
        code: What evaluates the sums.
    """
    limit = chunk_size(view.values)
    shape = view.qparam_shape
    if view.group_size > limit:
        everything = tuple(slice(None) for _ in shape)
        walk = functools.partial(rows_of, view, importance, limit)
        yield MemoryChunk(everything, shape, None, None, walk, code)
        return
    for rows in rows_of(view, importance, limit):
        found = tuple(len(range(*s.indices(n))) for s, n in zip(rows.where, shape, strict=True))
        yield MemoryChunk(rows.where, found, rows.values, rows.importance, None, code)
