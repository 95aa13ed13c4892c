"""Grouped views: a tensor's values brought together by the qparam they share, without a copy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from types import EllipsisType

import torch
from torch import Tensor

__all__ = ["Arrangement", "GroupedView"]

#: Values of a piece: 2**18 float32 are 1 MiB, which stays in the second-level cache of one core.
CPU_PIECE = 2**18
#: Smaller pieces would cost more in calls than they save in memory.
SMALLEST_PIECE = 2**14
#: On an accelerator the cost of a launch counts, not the cache.
ACCELERATOR_PIECE = 2**24

Index = tuple[int | slice | EllipsisType | Tensor, ...]


def piece_size(values: Tensor) -> int:
    """Number of values that one step of a pass over a tensor should work on.

    At most an eighth of the tensor, so that the handful of copies of a piece that a step needs
    stays under one copy of the whole.
    """
    largest = CPU_PIECE if values.device.type == "cpu" else ACCELERATOR_PIECE
    return min(largest, max(SMALLEST_PIECE, values.numel() // 8))


@dataclass(frozen=True)
class GroupedView:
    """A strided view of observed values and the dimensions over which one qparam spans.

    Args:
        values: The values, any strides. Dimensions outside `reduce_dims` are the qparams.
        reduce_dims: Non-negative dimensions of `values` (of the gathered values where `columns`
            is given) that share one qparam.
        where: Index into the qparams of the whole value where this view's results belong.
        columns: Positions of the last dimension of `values`, shape (groups, size), to be gathered
            piece by piece, so that the last dimension is replaced by those two; None for none.
        finite_only: Leave NaN and Inf out.

    Example:
        A weight of shape (rows, cols) in groups of 128: values (rows, cols // 128, 128),
        reduce_dims (2,), and results of shape (rows, cols // 128).
    """

    values: Tensor
    reduce_dims: tuple[int, ...]
    where: Index = (...,)
    columns: Tensor | None = None
    finite_only: bool = False

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Shape of the values once gathered."""
        if self.columns is None:
            return tuple(self.values.shape)
        return (*self.values.shape[:-1], *self.columns.shape)

    @cached_property
    def kept_dims(self) -> tuple[int, ...]:
        """Dimensions that tell qparams apart."""
        return tuple(d for d in range(len(self.shape)) if d not in self.reduce_dims)

    @cached_property
    def qparam_shape(self) -> tuple[int, ...]:
        """Shape of this view's results."""
        return tuple(self.shape[d] for d in self.kept_dims)

    @cached_property
    def group_size(self) -> int:
        """Number of values that share a qparam; 0 without qparams."""
        return prod(self.shape) // max(1, prod(self.qparam_shape))

    def finite(self) -> GroupedView:
        """The same view with NaN and Inf left out."""
        return replace(self, finite_only=True)

    def gathered(self) -> Tensor:
        """All values in one tensor of `shape`: a view of `values` unless columns are gathered."""
        return self.values if self.columns is None else self.values[..., self.columns]

    def canonical(self) -> Tensor:
        """Values as `(num_observations, *qparam_shape, group_size)`; a view where strides allow.

        Reduced dimensions in front of the first kept one become observations, all others the group.
        Left-out values are zero here, which changes neither scale nor error.
        """
        kept = self.kept_dims
        front = [d for d in self.reduce_dims if d < kept[0]]
        back = [d for d in self.reduce_dims if d > kept[0]]
        values = self.gathered().permute(*front, *kept, *back)
        if self.finite_only:
            values = torch.where(values.isfinite(), values, 0)
        return values.reshape(_size(self.shape, front), *self.qparam_shape, _size(self.shape, back))

    def pieces(self, limit: int | None = None) -> Iterator[tuple[tuple[slice, ...], Tensor]]:
        """Walk through the values in pieces of about `limit` values.

        Args:
            limit: Most values of a piece, one row at least; None chooses by device.

        Yields:
            Slices into the qparams of this view (a piece may hold a part of a group), and the
            values with all kept dimensions in front and all reduced ones behind.
        """
        limit = limit or piece_size(self.values)
        kept, order = self.kept_dims, (*self.kept_dims, *self.reduce_dims)
        # Gathered columns stay whole: only dimensions that exist before the gathering are cut.
        cuttable = [d for d in order if self.columns is None or d < self.values.dim() - 1]
        for cut in _cuts(self.shape, cuttable, limit):
            values = self.values
            for dim, part in cut.items():
                values = values.narrow(dim, part.start, part.stop - part.start)
            if self.columns is not None:
                values = values[..., self.columns]
            slices = tuple(cut.get(d, slice(0, self.shape[d])) for d in kept)
            yield slices, values.permute(order)


@dataclass(frozen=True)
class Arrangement:
    """How a value falls into views: one where all groups have one size, more where some are short.

    Args:
        qparam_shape: Shape of the scales of the whole value.
        views: Views that together hold every value once.
    """

    qparam_shape: tuple[int, ...]
    views: tuple[GroupedView, ...]

    def assemble(self, parts: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Put the results of all views together.

        Args:
            parts: For each view its results, tensors of as many elements as its qparams.

        Returns:
            As many tensors as each part has, each of shape `qparam_shape`.
        """
        if len(parts) == 1:
            return tuple(
                t if t.shape == self.qparam_shape else t.reshape(self.qparam_shape)
                for t in parts[0]
            )
        whole = tuple(t.new_empty(self.qparam_shape) for t in parts[0])
        for view, part in zip(self.views, parts, strict=True):
            for target, source in zip(whole, part, strict=True):
                target[view.where] = source.reshape(view.qparam_shape)
        return whole


def _size(shape: tuple[int, ...], dims: list[int]) -> int:
    total = 1
    for dim in dims:
        total *= shape[dim]
    return total


def _cuts(shape: tuple[int, ...], dims: list[int], limit: int) -> Iterator[dict[int, slice]]:
    """Boxes of at most `limit` elements that cover `shape`, cut along `dims`, first ones first."""
    inner = 1
    for size in shape:
        inner *= size
    if inner <= limit or not dims:
        yield {}
        return
    dim, rest = dims[0], dims[1:]
    size = shape[dim]
    inner //= size
    step = max(1, limit // inner)
    for start in range(0, size, step):
        part = slice(start, min(size, start + step))
        box = tuple(step if d == dim else s for d, s in enumerate(shape))
        for further in _cuts(box, rest, limit) if step == 1 else ({},):
            yield {dim: part, **further}
