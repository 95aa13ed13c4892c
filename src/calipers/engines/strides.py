"""Where the values of a view lie in memory: what kernels need to read them as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from torch import Tensor

from calipers.grouping import Groups

__all__ = ["MOST_DIMS", "Dim", "Strides"]

#: Dimensions that kernels can walk through, kept and reduced ones each.
MOST_DIMS = 3


@dataclass(frozen=True)
class Dim:
    """A dimension: its size and the strides of values and their importance along it."""

    size: int
    value: int
    importance: int


@dataclass(frozen=True)
class Strides:
    """Where values and their importance lie, by dimension: kept and reduced ones.

    Args:
        values: The values, of any strides.
        importance: That of the values, or None.
        columns: As of the view, contiguous: its first dimension is the innermost kept one.
        kept: Dimensions that tell groups apart, outermost first, `MOST_DIMS` at most.
        reduced: Dimensions of a group; one where columns are gathered.
    """

    values: Tensor
    importance: Tensor | None
    columns: Tensor | None
    kept: list[Dim]
    reduced: list[Dim]

    @classmethod
    def of(cls, view: Groups, importance: Groups | None) -> Strides:
        """Where the values of a view and their importance lie."""
        others = None if importance is None else importance.values
        behind = view.values.dim() - 1
        dims = [
            Dim(size, view.values.stride(d), 0 if others is None else others.stride(d))
            for d, size in enumerate(view.values.shape)
        ]
        if view.columns is not None:
            # A list of columns is the innermost kept dimension; it gives the place in the row.
            kept = [*_merge(dims[:behind]), Dim(view.columns.shape[0], 0, 0)]
            reduced = [dims[behind]]
        else:
            kept = _merge([dims[d] for d in view.kept_dims])
            reduced = _merge([dims[d] for d in view.reduce_dims])
        if max(len(kept), len(reduced)) <= MOST_DIMS:
            columns = None if view.columns is None else view.columns.long().contiguous()
            return cls(view.values, others, columns, kept, reduced)
        # A layout of none of the strategies: brought into order by a copy.
        return cls._copied(view, importance)

    @classmethod
    def _copied(cls, view: Groups, importance: Groups | None) -> Strides:
        groups = prod(view.qparam_shape)
        length = view.group_size
        order = (*view.kept_dims, *view.reduce_dims)
        copies = [
            None if each is None else each.gathered().permute(order).contiguous()
            for each in (view, importance)
        ]
        assert copies[0] is not None
        kept, reduced = [Dim(groups, length, length)], [Dim(length, 1, 1)]
        return cls(copies[0], copies[1], None, kept, reduced)


def _merge(dims: Sequence[Dim]) -> list[Dim]:
    """Dimensions merged to as few as the strides allow, at least one."""
    merged: list[Dim] = []
    for dim in dims:
        if dim.size == 1:
            continue
        last = merged[-1] if merged else None
        if (
            last is not None
            and last.value == dim.value * dim.size
            and last.importance == dim.importance * dim.size
        ):
            merged[-1] = Dim(last.size * dim.size, dim.value, dim.importance)
        else:
            merged.append(dim)
    return merged or [Dim(1, 0, 0)]
