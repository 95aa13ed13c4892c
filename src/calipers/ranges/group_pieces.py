"""A view's values piece by piece as (groups, n)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from calipers.ranges.views import GroupedView

__all__ = ["GroupPiece", "group_pieces", "group_size", "number_of_runs"]

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


def group_size(view: GroupedView) -> int:
    """Number of values that share a qparam."""
    return prod(view.shape) // max(1, prod(view.qparam_shape))


def group_pieces(
    view: GroupedView, importance: GroupedView | None, limit: int
) -> Iterator[GroupPiece]:
    """Walk through a view; what is not finite becomes zero where the view leaves it out.

    Args:
        view: The values, of any floating dtype.
        importance: Their weights, of the same shape; None weighs all alike.
        limit: Most values of a piece, one row at least.
    """
    weights = None if importance is None else importance.pieces(limit)
    # Pieces with parts of groups may differ in what they hold of the same groups.
    shared = _SharedWeights() if group_size(view) <= limit else None
    for where, piece in view.pieces(limit):
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
