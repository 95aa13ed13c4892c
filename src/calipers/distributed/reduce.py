"""`reduce_statistics`: what the ranks saw becomes one, by the word of each statistic."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import reduce
from itertools import groupby, pairwise
from math import prod
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from calipers.distributed.collectives import gather_objects, merge_flat
from calipers.distributed.meeting import TIMEOUT, Ranks
from calipers.errors import RankError
from calipers.observers.statistics import HoldsStatistics, Statistic, Word
from calipers.ranges.surroundings import undisturbed

__all__ = ["reduce_over", "reduce_statistics"]

#: Most bytes of a flat buffer; a single statistic may be larger.
_LARGEST_BUFFER = 2**28

#: What a rank says of a statistic: a count, or dtype and shape of a tensor, or that it has none.
_Told: TypeAlias = "int | tuple[torch.dtype, tuple[int, ...]] | None"


def reduce_statistics(
    holders: Iterable[HoldsStatistics],
    group: dist.ProcessGroup | None = None,
    timeout: float = TIMEOUT,
    *,
    device: torch.device | None = None,
) -> None:
    """Let every rank hold what all ranks saw: the same, bit for bit, on each of them.

    Statistics are merged by their word in the order of ranks, as `Observer.merge` would: exactly
    for "min", "max" and integer sums, in float64 for sums of inputs, and weighed by batches for
    moving averages, which is approximate. What saw nothing on a rank leaves no mark. All small
    facts travel in one exchange, and tensors in one flat buffer for each word and dtype.

    Args:
        holders: Observers, or other holders of statistics: on all ranks the same, in the same
            order. What several of them share is taken once.
        group: The processes that saw different data; None for all of torch.distributed. Where that
            is not initialised, nothing is done.
        timeout: See `Ranks`.
        device: Where statistics go of which this rank had none; None for the backend's own.

    Raises:
        RankError: A rank did not come, failed, or has other holders, or statistics of another
            shape. All ranks raise then and all statistics are kept, but for a rank that is lost
            while results travel.
        ValueError: Values of ranks that cannot be pooled, as in `Observer.merge`.

    Example:
        Under `torchrun`, after each rank has run its share of the data:

        >>> from compressed_tensors.quantization import QuantizationArgs
        >>> from calipers.observers import StaticMinMaxObserver
        >>> observer = StaticMinMaxObserver("input", QuantizationArgs(num_bits=8))
        >>> observer.observe(torch.tensor([[-1.0, 2.0]]))
        >>> reduce_statistics([observer])
    """
    reduce_over(Ranks(group, timeout), holders, device=device)


@undisturbed()
def reduce_over(
    ranks: Ranks,
    holders: Iterable[HoldsStatistics],
    stage: str = "reducing statistics",
    *,
    device: torch.device | None = None,
) -> None:
    """As `reduce_statistics`, over ranks that are known; `stage` is what errors call it."""
    if ranks.size == 1:
        return
    holders = list(holders)
    parts = list({id(part): part for each in holders for part in each._parts()}.values())
    with ExitStack() as locks:
        for part in parts:
            locks.enter_context(part._update.lock)
        for part in parts:
            part._settle()
        told = gather_objects(ranks, _Manifest.of(parts), stage)
        _refuse_other_holders(ranks, told)
        merged = _merged_counts(parts, told)
        pieces = list(_pieces(ranks, parts, told, merged))
        for buffer in _buffers(pieces):
            _merge_buffer(ranks, buffer, parts, merged, stage, device)
        for part, values in zip(parts, merged, strict=True):
            part.__dict__.update(values)
        for each in holders:
            each._changed()


@dataclass(frozen=True)
class _Manifest:
    """What a rank holds: of each part its name and class, and what it says of its statistics."""

    names: list[tuple[str, str]]
    told: list[tuple[_Told, ...]]

    @classmethod
    def of(cls, parts: Sequence[HoldsStatistics]) -> _Manifest:
        return cls(
            [(part.name, type(part).__name__) for part in parts],
            [tuple(_tell(getattr(part, name)) for name in part.statistics) for part in parts],
        )


def _tell(value: Any) -> _Told:
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape)
    return None if value is None else int(value)


def _refuse_other_holders(ranks: Ranks, told: Sequence[_Manifest]) -> None:
    first = told[0].names
    for rank, manifest in enumerate(told):
        if manifest.names == first:
            continue
        odd = [(a, b) for a, b in zip(first, manifest.names, strict=False) if a != b]
        shown = f"{odd[0][1]} where {ranks.name_of([0])} has {odd[0][0]}" if odd else "others"
        raise RankError(
            f"{ranks.name_of([rank])} holds {len(manifest.names)} statistics, {ranks.name_of([0])} "
            f"{len(first)}: {shown}; all ranks must calibrate the same model by the same scheme"
        )


@dataclass(frozen=True)
class _Piece:
    """One statistic that is a tensor, of which some ranks hold a value.

    Args:
        part: Number of the part that holds it.
        name: Its attribute name.
        word: How values become one.
        dtype: Of the result.
        shape: Of all values.
        present: Ranks that hold a value.
        batches: Batches behind the value of each rank.
    """

    part: int
    name: str
    word: Word
    dtype: torch.dtype
    shape: tuple[int, ...]
    present: tuple[int, ...]
    batches: tuple[int, ...]

    @property
    def size(self) -> int:
        return prod(self.shape)

    def fold(self, rows: Tensor) -> Tensor:
        """Merge the values of all ranks, shape (ranks, n), in the order of those that hold any."""
        statistic = Statistic(self.word)
        merged, batches = rows[self.present[0]], self.batches[self.present[0]]
        for rank in self.present[1:]:
            merged = statistic.merge(merged, rows[rank], batches, self.batches[rank])
            batches += self.batches[rank]
        return merged


def _merged_counts(
    parts: Sequence[HoldsStatistics], told: Sequence[_Manifest]
) -> list[dict[str, Any]]:
    """Sums of counts, by part and name; None where no rank counted anything."""
    merged: list[dict[str, Any]] = []
    for number, part in enumerate(parts):
        values: dict[str, Any] = {}
        for place, (name, statistic) in enumerate(part.statistics.items()):
            if statistic.integer:
                found = [each.told[number][place] for each in told]
                counts = [each for each in found if isinstance(each, int)]
                values[name] = sum(counts) if counts else None
        merged.append(values)
    return merged


def _pieces(
    ranks: Ranks,
    parts: Sequence[HoldsStatistics],
    told: Sequence[_Manifest],
    merged: list[dict[str, Any]],
) -> Iterator[_Piece]:
    """All that has to travel; empty tensors, which tell a dtype, are put into `merged` at once."""
    for number, part in enumerate(parts):
        names = list(part.statistics)
        for place, (name, statistic) in enumerate(part.statistics.items()):
            if statistic.integer:
                continue
            found = {
                rank: each.told[number][place]
                for rank, each in enumerate(told)
                if each.told[number][place] is not None
            }
            tensors = {rank: value for rank, value in found.items() if isinstance(value, tuple)}
            if not tensors:
                continue
            part._check_dtypes(name, [dtype for dtype, _ in tensors.values()])
            word: Word = "last" if part._is_replaced(name) else statistic.reduce
            if word == "last":
                tensors = dict([max(tensors.items())])
            shapes = {shape for _, shape in tensors.values()}
            if len(shapes) > 1:
                each_shape = ", ".join(
                    f"{ranks.name_of([rank])} {shape}" for rank, (_, shape) in tensors.items()
                )
                raise RankError(f"{part.name}: cannot merge {name} of shapes {each_shape}")
            (shape,) = shapes
            dtype = reduce(torch.promote_types, [dtype for dtype, _ in tensors.values()])
            if not prod(shape):
                merged[number][name] = torch.empty(shape, dtype=dtype, device="cpu")
                continue
            at = names.index(statistic.count) if statistic.count in names else None
            batches = [0 if at is None else each.told[number][at] or 0 for each in told]
            yield _Piece(
                number,
                name,
                word,
                dtype,
                shape,
                tuple(tensors),
                tuple(int(each) for each in batches if isinstance(each, int)),
            )


def _buffers(pieces: Sequence[_Piece]) -> Iterator[list[_Piece]]:
    """Pieces of one word and dtype that travel together."""

    def kind(piece: _Piece) -> tuple[str, str]:
        return piece.word, str(piece.dtype)

    for _, alike in groupby(sorted(pieces, key=kind), kind):
        buffer: list[_Piece] = []
        held = 0
        for piece in alike:
            size = piece.size * piece.dtype.itemsize
            if buffer and held + size > _LARGEST_BUFFER:
                yield buffer
                buffer, held = [], 0
            buffer.append(piece)
            held += size
        yield buffer


def _merge_buffer(
    ranks: Ranks,
    buffer: Sequence[_Piece],
    parts: Sequence[HoldsStatistics],
    merged: list[dict[str, Any]],
    stage: str,
    device: torch.device | None,
) -> None:
    """Let the pieces of one buffer travel, and put the results into `merged`."""
    ends = [0]
    for piece in buffer:
        ends.append(ends[-1] + piece.size)
    spans = list(pairwise(ends))
    flat = torch.zeros(ends[-1], dtype=buffer[0].dtype, device=ranks.device)
    for piece, (start, end) in zip(buffer, spans, strict=True):
        if ranks.rank in piece.present:
            flat[start:end] = getattr(parts[piece.part], piece.name).reshape(-1)

    def merge(rows: Tensor, where: slice) -> Tensor:
        share = torch.empty_like(rows[0])
        for piece, (start, end) in zip(buffer, spans, strict=True):
            low, high = max(start, where.start) - where.start, min(end, where.stop) - where.start
            if low < high:
                share[low:high] = piece.fold(rows[:, low:high])
        return share

    found = merge_flat(ranks, flat, merge, stage)
    for piece, (start, end) in zip(buffer, spans, strict=True):
        own = getattr(parts[piece.part], piece.name)
        place = device or found.device if own is None else own.device
        whole = found[start:end].view(piece.shape)
        merged[piece.part][piece.name] = whole.clone() if whole.device == place else whole.to(place)
