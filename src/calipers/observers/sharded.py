"""A weight that is spread over ranks (DTensor): which groups lie in this rank's shard.

Groups that lie in one shard each are measured there, without communication. Of others the extremes
are measured shard by shard and brought together, a value a group; what searches needs them whole.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import ceil
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy
from loguru import logger
from torch import Tensor

__all__ = ["QParamLayout", "Shard", "gather", "is_spread", "reduce_extremes"]

Shape: TypeAlias = tuple[int, ...]

_TENSOR = QuantizationStrategy.TENSOR


def is_spread(tensor: object) -> bool:
    """Whether a tensor is a DTensor of which ranks hold different parts."""
    loaded: Any = sys.modules.get("torch.distributed.tensor")
    if loaded is None or not isinstance(tensor, loaded.DTensor):
        return False
    spread: Any = tensor
    return any(
        not placement.is_replicate() and spread.device_mesh.size(number) > 1
        for number, placement in enumerate(spread.placements)
    )


def gather(tensor: Tensor, name: str, why: str) -> Tensor:
    """The whole of a DTensor, on every rank."""
    logger.debug("{}: gathered from all ranks, since {}", name, why)
    whole: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    return whole


@dataclass(frozen=True)
class QParamLayout:
    """Where the qparams of a spread weight lie: as the groups do.

    Args:
        mesh: The ranks.
        placements: Of the qparams, one for each dimension of the mesh.
        shape: Of the qparams of the whole weight.
        local: Of those of this rank's shard.
        dtype: Of the weight.
    """

    mesh: Any
    placements: tuple[Any, ...]
    shape: Shape
    local: Shape
    dtype: torch.dtype

    def spread(self, own: Tensor) -> Tensor:
        """A DTensor of what each rank has."""
        from torch.distributed.tensor import DTensor

        whole = torch.empty(self.shape, dtype=own.dtype, device="meta")
        return DTensor.from_local(
            own.reshape(self.local),
            self.mesh,
            self.placements,
            run_check=False,
            shape=whole.shape,
            stride=whole.stride(),
        )


@dataclass(frozen=True)
class Shard:
    """This rank's part of a weight, cut along some dimensions as torch.chunk does.

    Args:
        local: Its values.
        shape: Of the whole weight.
        offset: Where the part begins in the whole, by dimension.
        chunk: Largest part that a rank has, by dimension.
        cuts: Dimension of the mesh that cuts a dimension of the weight, by the latter.
        mesh: The ranks.
        extents: Values that share a scale, by dimension.
        one: Whether all of the weight shares one scale.
    """

    local: Tensor
    shape: Shape
    offset: Shape
    chunk: Shape
    cuts: dict[int, int]
    mesh: Any
    extents: Shape
    one: bool

    @classmethod
    def of(cls, tensor: Any, args: QuantizationArgs) -> Shard | None:
        """The shard of a weight that is spread; None where it is spread in some other way."""
        from torch.distributed.tensor import Shard as Placement

        mesh, shape, one = tensor.device_mesh, tuple(tensor.shape), args.strategy == _TENSOR
        if len(shape) < 2 and not one:
            return None
        cuts: dict[int, int] = {}
        for number, placement in enumerate(tensor.placements):
            if placement.is_replicate() or mesh.size(number) == 1:
                continue
            if type(placement) is not Placement or placement.dim % len(shape) in cuts:
                return None
            cuts[placement.dim % len(shape)] = number
        chunk = tuple(ceil(n / mesh.size(cuts[d])) if d in cuts else n for d, n in enumerate(shape))
        offset = tuple(
            min(n, chunk[d] * mesh.get_local_rank(cuts[d])) if d in cuts else 0
            for d, n in enumerate(shape)
        )
        extents = _extents(shape, args)
        return cls(tensor.to_local(), shape, offset, chunk, cuts, mesh, extents, one)

    @property
    def torn(self) -> tuple[int, ...]:
        """Dimensions along which groups lie in several shards."""
        return tuple(d for d in self.cuts if self.one or self.chunk[d] % self.extents[d])

    @property
    def columns(self) -> slice:
        """Columns of the weight that the shard has."""
        return slice(self.offset[-1], self.offset[-1] + self.local.shape[-1])

    def layout(self) -> QParamLayout:
        """Where the qparams lie."""
        from torch.distributed.tensor import Replicate
        from torch.distributed.tensor import Shard as Placement

        placements: list[Any] = [Replicate()] * self.mesh.ndim
        dtype = self.local.dtype
        if self.one:
            return QParamLayout(self.mesh, tuple(placements), (1,), (1,), dtype)
        for dim, number in self.cuts.items():
            if dim not in self.torn:
                placements[number] = Placement(dim)
        whole = tuple(ceil(n / size) for n, size in zip(self.shape, self.extents, strict=True))
        local = tuple(
            ceil(self.local.shape[d] / self.extents[d])
            if d in self.cuts and d not in self.torn
            else count
            for d, count in enumerate(whole)
        )
        return QParamLayout(self.mesh, tuple(placements), whole, local, dtype)

    def pieces(self) -> Iterator[tuple[Tensor, tuple[slice, ...]]]:
        """Parts of the shard that begin where a group does or lie in one, each with its qparams.

        Yields:
            Values, and where their qparams lie among those of `layout`.
        """
        spans = []
        for dim, size in enumerate(self.local.shape):
            head = min(size, -self.offset[dim] % self.extents[dim])
            spans.append([(a, b) for a, b in ((0, head), (head, size)) if a < b])
        for cut in product(*spans):
            piece, where = self.local, []
            for dim, (start, end) in enumerate(cut):
                piece = piece.narrow(dim, start, end - start)
                extent = self.extents[dim]
                first = (self.offset[dim] + start) // extent
                if dim in self.cuts and dim not in self.torn:
                    first -= self.offset[dim] // extent
                where.append(slice(first, first + ceil((end - start) / extent)))
            yield piece, tuple(where)


def _extents(shape: Shape, args: QuantizationArgs) -> Shape:
    """How many values along each dimension of a weight share a scale, the last ones perhaps fewer.

    Example:
        >>> _extents((6, 8), QuantizationArgs(num_bits=4, strategy="group", group_size=4))
        (1, 4)
    """
    strategy = QuantizationStrategy(args.strategy)
    if strategy == _TENSOR:
        return tuple(max(1, n) for n in shape)
    ends: Sequence[int] = (1, shape[-1])
    if strategy == QuantizationStrategy.BLOCK and args.block_structure is not None:
        ends = args.block_structure
    elif strategy != QuantizationStrategy.CHANNEL and args.group_size:
        ends = (1, args.group_size)
    return tuple(max(1, n) for n in (*[1] * (len(shape) - 2), *ends[-len(shape) :]))


def reduce_extremes(
    shard: Shard, low: Tensor, high: Tensor, dims: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Smallest and largest values over the ranks that cut some dimensions of a weight.

    Args:
        shard: This rank's shard.
        low: Smallest values of it, Inf where it has none.
        high: Largest values, -Inf where it has none; same shape and dtype.
        dims: Dimensions of the weight.

    Returns:
        As `low` and `high`, equal on all ranks of these dimensions. One small collective for each.
    """
    ends = torch.stack([low, -high])
    wide = ends if ends.dtype == torch.float64 else ends.float()  # not all backends take others
    for dim in dims:
        dist.all_reduce(wide, dist.ReduceOp.MIN, group=shard.mesh.get_group(shard.cuts[dim]))
    return wide[0].to(low.dtype), (-wide[1]).to(high.dtype)
