"""Grouping: which values of a tensor share a scale. The recipe holds no values.

`Grouping.of` makes it of a shape, `Grouping.split` applies it to a tensor of that shape, and
`Grouping.join` puts what was found for the groups together.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from math import ceil, prod
from types import EllipsisType

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy
from torch import Tensor

from calipers.memory import named_tensor

__all__ = [
    "ACTIVATION_NAMES",
    "ATTENTION_NAMES",
    "BASE_NAMES",
    "Grouping",
    "Groups",
    "chunk_size",
    "group_values",
]

ACTIVATION_NAMES = ("input", "output")
ATTENTION_NAMES = ("q", "k", "v")
BASE_NAMES = ("weight", *ACTIVATION_NAMES, *ATTENTION_NAMES)

_TENSOR = QuantizationStrategy.TENSOR
_CHANNEL = QuantizationStrategy.CHANNEL
_GROUPS = (QuantizationStrategy.GROUP, QuantizationStrategy.TENSOR_GROUP)
_BLOCK = QuantizationStrategy.BLOCK
_TOKEN = QuantizationStrategy.TOKEN
_HEAD = QuantizationStrategy.ATTN_HEAD

_ALLOWED: dict[str, tuple[QuantizationStrategy, ...]] = {
    "weight": (_TENSOR, _CHANNEL, *_GROUPS, _BLOCK),
    **dict.fromkeys(ACTIVATION_NAMES, (_TENSOR, *_GROUPS, _TOKEN)),
    **dict.fromkeys(ATTENTION_NAMES, (_TENSOR, _HEAD)),
}

#: Values of a chunk: 2**18 float32 are 1 MiB, which stays in the second-level cache of one core.
CPU_CHUNK = 2**18
#: Smaller chunks would cost more in calls than they save in memory.
SMALLEST_CHUNK = 2**14
#: On an accelerator the cost of a launch counts, not the cache.
ACCELERATOR_CHUNK = 2**24
#: Groupings that are remembered: a model has few shapes of weights, but any number of tokens.
REMEMBERED = 256

Shape = tuple[int, ...]
Index = tuple[int | slice | EllipsisType | Tensor, ...]


def chunk_size(values: Tensor) -> int:
    """Number of values that one step of a pass over a tensor should work on.

    At most an eighth of the tensor, so that the handful of copies of a chunk that a step needs
    stays under one copy of the whole.
    """
    largest = CPU_CHUNK if values.device.type == "cpu" else ACCELERATOR_CHUNK
    return min(largest, max(SMALLEST_CHUNK, values.numel() // 8))


@dataclass(frozen=True)
class Groups:
    """Values of groups of one size: a strided tensor, and the dimensions that share a qparam.

    Args:
        values: The values, any strides. Dimensions outside `reduce_dims` are the qparams.
        reduce_dims: Non-negative dimensions of `values` (of the gathered values where `columns`
            is given) that share one qparam.
        where: Index into the qparams of the whole value where the results of these groups belong.
        columns: Positions of the last dimension of `values`, shape (groups, size), to be gathered
            chunk by chunk, so that the last dimension is replaced by those two; None for none.
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
    def shape(self) -> Shape:
        """Shape of the values once gathered."""
        if self.columns is None:
            return tuple(self.values.shape)
        return (*self.values.shape[:-1], *self.columns.shape)

    @cached_property
    def kept_dims(self) -> tuple[int, ...]:
        """Dimensions that tell qparams apart."""
        return tuple(d for d in range(len(self.shape)) if d not in self.reduce_dims)

    @cached_property
    def qparam_shape(self) -> Shape:
        """Shape of the results of these groups."""
        return tuple(self.shape[d] for d in self.kept_dims)

    @cached_property
    def group_size(self) -> int:
        """Number of values that share a qparam; 0 without qparams."""
        return prod(self.shape) // max(1, prod(self.qparam_shape))

    def finite(self) -> Groups:
        """The same groups with NaN and Inf left out."""
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
        sizes = (prod(self.shape[d] for d in dims) for dims in (front, back))
        return values.reshape(next(sizes), *self.qparam_shape, next(sizes))

    def chunks(self, limit: int | None = None) -> Iterator[tuple[tuple[slice, ...], Tensor]]:
        """Walk through the values in chunks of about `limit` values.

        Args:
            limit: Most values of a chunk, one row at least; None chooses by device.

        Yields:
            Slices into the qparams of these groups (a chunk may hold a split of a long group), and
            the values with all kept dimensions in front and all reduced ones behind.
        """
        limit = limit or chunk_size(self.values)
        kept, order = self.kept_dims, (*self.kept_dims, *self.reduce_dims)
        # Gathered columns stay whole: only dimensions that exist before the gathering are cut.
        cuttable = [d for d in order if self.columns is None or d < self.values.dim() - 1]
        for cut in _cuts(self.shape, cuttable, limit):
            values = self.values
            for dim, span in cut.items():
                values = values.narrow(dim, span.start, span.stop - span.start)
            if self.columns is not None:
                values = values[..., self.columns]
            slices = tuple(cut.get(d, slice(0, self.shape[d])) for d in kept)
            yield slices, values.permute(order)


def _cuts(shape: Shape, dims: list[int], limit: int) -> Iterator[dict[int, slice]]:
    """Slices of at most `limit` elements that cover `shape`, cut along `dims`, first ones first."""
    inner = prod(shape)
    if inner <= limit or not dims:
        yield {}
        return
    dim, rest = dims[0], dims[1:]
    size = shape[dim]
    step = max(1, limit // (inner // size))
    for start in range(0, size, step):
        span = slice(start, min(size, start + step))
        smaller = tuple(step if d == dim else s for d, s in enumerate(shape))
        for further in _cuts(smaller, rest, limit) if step == 1 else ({},):
            yield {dim: span, **further}


@dataclass(frozen=True)
class _Recipe:
    """How a value is viewed as groups of one size.

    Args:
        shape: Of the values as `Groups` has them, gathered where `columns` is given.
        reduce_dims: As of `Groups`.
        where: As of `Groups`.
        spans: Dimension, start and length of what is taken of the value.
        tokens_first: Whether heads and tokens of an attention state change places.
        columns: As of `Groups`.
    """

    shape: Shape
    reduce_dims: tuple[int, ...]
    where: Index = (...,)
    spans: tuple[tuple[int, int, int], ...] = ()
    tokens_first: bool = False
    columns: Tensor | None = None

    def apply(self, value: Tensor) -> Groups:
        if self.columns is not None:
            columns = self.columns.to(value.device)
            return Groups(value, self.reduce_dims, self.where_on(value.device), columns)
        if self.tokens_first:
            value = value.transpose(-3, -2)
        for span in self.spans:
            value = value.narrow(*span)
        return Groups(value.view(self.shape), self.reduce_dims, self.where)

    @property
    def qparam_shape(self) -> Shape:
        return tuple(s for d, s in enumerate(self.shape) if d not in self.reduce_dims)

    def where_on(self, device: torch.device) -> Index:
        return tuple(each.to(device) if isinstance(each, Tensor) else each for each in self.where)


@dataclass(frozen=True)
class Grouping:
    """Which values of a tensor share a scale: a recipe that holds none of them.

    It is made of a shape, and splits every tensor of that shape alike: a value, the importance of
    its values, or a mask.

    Args:
        shape: Of the values.
        qparam_shape: Of the scales of the whole value.

    Example:
        Ten columns in groups of four: two groups of four, and one of two.

        >>> import torch
        >>> from compressed_tensors.quantization import QuantizationArgs
        >>> args = QuantizationArgs(num_bits=4, strategy="group", group_size=4)
        >>> grouping = Grouping.of((2, 10), "weight", args)
        >>> grouping.qparam_shape
        (2, 3)
        >>> full, short = grouping.split(torch.arange(20.0).view(2, 10))
        >>> full.shape, short.shape
        ((2, 2, 4), (2, 1, 2))
        >>> parts = [(each.values.amax(each.reduce_dims),) for each in (full, short)]
        >>> grouping.join(parts)
        (tensor([[ 3.,  7.,  9.],
                [13., 17., 19.]]),)
    """

    shape: Shape
    qparam_shape: Shape
    _recipes: tuple[_Recipe, ...]

    @classmethod
    def of(
        cls,
        shape: Sequence[int],
        base_name: str,
        args: QuantizationArgs,
        g_idx: Tensor | None = None,
    ) -> Grouping:
        """The grouping of values of a shape, by base name and quantization strategy.

        | base name | strategy | value | qparams |
        |---|---|---|---|
        | any | tensor | any shape | (1,) |
        | weight | channel | (..., rows, cols) | (..., rows, 1) |
        | weight | group, tensor_group | (..., rows, cols) | (..., rows, ceil(cols / group_size)) |
        | weight | block | (..., rows, cols) | (..., ceil(rows / height), ceil(cols / width)) |
        | input, output | group, tensor_group | (..., hidden) | (ceil(hidden / group_size),) |
        | input, output | token | (..., hidden) | (..., 1) |
        | q, k, v | attn_head | (..., heads, tokens, head_dim) | (heads, 1, 1) |

        Args:
            shape: Of a weight, an activation or an attention state.
            base_name: weight, input, output, q, k or v.
            args: Quantization arguments, of which strategy, group_size and block_structure count.
            g_idx: Group of each column, shape (cols,), for the group strategies of weights; None or
                a tensor that holds -1 means column order.

        Raises:
            ValueError: A strategy that means nothing for this base name, a shape that the strategy
                cannot take, or a `g_idx` that does not fit.
        """
        block = args.block_structure
        found = _consecutive(
            tuple(shape),
            base_name,
            args.strategy,
            args.group_size,
            None if block is None else tuple(block),
        )
        if g_idx is None or base_name != "weight" or args.strategy not in _GROUPS:
            return found
        order = _column_order(g_idx, found.shape[-1], args.group_size or 1)
        return found if order is None else _by_columns(found.shape, *order)

    @classmethod
    @functools.lru_cache(REMEMBERED)
    def whole(cls, shape: Shape, base_name: str) -> Grouping:
        """All values in one group, with one qparam of shape (1,).

        The dimensions keep the order of the canonical layout: one observation for a weight, one for
        each token of an activation or attention state.
        """
        own, tokens_first = shape or (1,), False
        if base_name == "weight":
            at = 0
        elif base_name in ATTENTION_NAMES and len(own) > 2:
            own, at, tokens_first = (*own[:-3], own[-2], own[-3], own[-1]), len(own) - 2, True
        else:
            at = len(own) - 1
        reduce_dims = tuple(d for d in range(len(own) + 1) if d != at)
        recipe = _Recipe((*own[:at], 1, *own[at:]), reduce_dims, tokens_first=tokens_first)
        return cls(shape, (1,), (recipe,))

    @classmethod
    def over(cls, shape: Shape, reduce_dims: tuple[int, ...]) -> Grouping:
        """Values that share a qparam along `reduce_dims`, which are not negative."""
        kept = tuple(s for d, s in enumerate(shape) if d not in reduce_dims)
        return cls(shape, kept, (_Recipe(shape, reduce_dims),))

    def split(self, value: Tensor) -> tuple[Groups, ...]:
        """The groups of a value: one item where all have one size, more where some are shorter.

        Args:
            value: Of the grouping's shape.

        Returns:
            Views that together hold every value once.
        """
        if value.shape != self.shape:
            raise ValueError(f"value: expected shape {tuple(self.shape)}, got {tuple(value.shape)}")
        return tuple([recipe.apply(value) for recipe in self._recipes])

    def join(self, parts: Sequence[tuple[Tensor, ...]], features: Shape = ()) -> tuple[Tensor, ...]:
        """Put together what was found for each of the groups that `split` gives.

        Args:
            parts: For each of them its results, tensors of as many elements as it has qparams.
            features: Dimensions that each result has behind those of the qparams.

        Returns:
            As many tensors as each part has, each of shape `(*qparam_shape, *features)`.
        """
        shape = (*self.qparam_shape, *features)
        if len(parts) == 1:
            return tuple([t if t.shape == shape else t.reshape(shape) for t in parts[0]])
        whole = tuple(t.new_empty(shape) for t in parts[0])
        behind = (slice(None),) * len(features)
        for recipe, part in zip(self._recipes, parts, strict=True):
            for target, source in zip(whole, part, strict=True):
                place = (*recipe.where_on(target.device), *behind)
                target[place] = source.reshape(*recipe.qparam_shape, *features)
        return whole


def group_values(
    value: Tensor, base_name: str, args: QuantizationArgs, g_idx: Tensor | None = None
) -> tuple[Groups, ...]:
    """The groups of a value, as `Grouping.of` tells and `Grouping.split` gives them."""
    return Grouping.of(value.shape, base_name, args, g_idx).split(value)


@functools.lru_cache(REMEMBERED)
def _consecutive(
    shape: Shape,
    base_name: str,
    strategy: QuantizationStrategy | str,
    group_size: int | None,
    block: tuple[int, int] | None,
) -> Grouping:
    """The grouping of columns in their order."""
    strategy = QuantizationStrategy(strategy)
    if base_name not in _ALLOWED:
        raise ValueError(
            f"base_name must be one of {', '.join(BASE_NAMES)}, got {base_name!r} "
            f"(with strategy {strategy.value!r})"
        )
    if strategy not in _ALLOWED[base_name]:
        allowed = ", ".join(s.value for s in _ALLOWED[base_name])
        raise ValueError(
            f"strategy {strategy.value!r} cannot be applied to base_name {base_name!r}: "
            f"expected one of {allowed}"
        )
    if strategy == _TENSOR:
        return Grouping.whole(shape, base_name)
    rank, expected = {
        _HEAD: (3, "(..., heads, tokens, head_dim)"),
        _TOKEN: (1, "(..., hidden)"),
        _CHANNEL: (1, "(rows, ...)"),
        _BLOCK: (2, "(rows, cols)"),
    }.get(strategy, (2, "(rows, cols)") if base_name == "weight" else (1, "(..., hidden)"))
    if len(shape) < rank:
        raise ValueError(
            f"observed: strategy {strategy.value!r} expects a shape {expected}, got {shape}"
        )
    if strategy == _HEAD:
        *batch, heads, tokens, head_dim = shape
        view = (*batch, tokens, heads, 1, 1, head_dim)
        reduce_dims = (*range(len(batch) + 1), len(view) - 1)
        return Grouping(shape, (heads, 1, 1), (_Recipe(view, reduce_dims, tokens_first=True),))
    if strategy in (_TOKEN, _CHANNEL):
        *rows, cols = shape if strategy == _TOKEN or len(shape) > 1 else (*shape, 1)
        return Grouping(shape, (*rows, 1), (_Recipe((*rows, 1, cols), (len(rows) + 1,)),))
    *front, cols = shape
    if strategy == _BLOCK:
        return _blocks(shape, *(block or (1, 1)))
    assert group_size is not None  # QuantizationArgs validates it
    observed = range(len(front)) if base_name in ACTIVATION_NAMES else ()
    recipes = [
        _Recipe(
            (*front, groups, size),
            (*observed, len(shape)),
            (..., slice(first, first + groups)),
            ((-1, first * group_size, groups * size),),
        )
        for first, groups, size in _spans(cols, group_size)
    ]
    kept = () if observed else tuple(front)
    return Grouping(shape, (*kept, ceil(cols / group_size)), tuple(recipes))


def _blocks(shape: Shape, height: int, width: int) -> Grouping:
    """Blocks of rows x cols; short ones at the lower and right edges have a size of their own."""
    *front, rows, cols = shape
    recipes = [
        _Recipe(
            (*front, down, high, across, wide),
            (len(shape) - 1, len(shape) + 1),
            (..., slice(top, top + down), slice(left, left + across)),
            ((-2, top * height, down * high), (-1, left * width, across * wide)),
        )
        for (top, down, high), (left, across, wide) in product(
            _spans(rows, height), _spans(cols, width)
        )
    ]
    return Grouping(shape, (*front, ceil(rows / height), ceil(cols / width)), tuple(recipes))


def _spans(length: int, size: int) -> list[tuple[int, int, int]]:
    """(first group, number of groups, size) of the full groups and of the short last one."""
    full, rest = divmod(length, size)
    return [(0, full, size)] * bool(full) + [(full, 1, rest)] * bool(rest)


def _by_columns(shape: Shape, order: Tensor, sizes: list[int]) -> Grouping:
    """Columns gathered by group: one recipe for each group size."""
    columns = order.split(sizes)
    recipes = []
    for size in sorted(set(sizes), reverse=True):
        groups = [group for group, s in enumerate(sizes) if s == size]
        where = (..., torch.tensor(groups, dtype=torch.int64, device=order.device))
        gathered = torch.stack([columns[group] for group in groups])
        own = (*shape[:-1], *gathered.shape)
        recipes.append(_Recipe(own, (len(shape),), where, columns=gathered))
    return Grouping(shape, (*shape[:-1], len(sizes)), tuple(recipes))


def _column_order(g_idx: Tensor, cols: int, group_size: int) -> tuple[Tensor, list[int]] | None:
    """Stable order of columns by group, and the size of each group; None for column order."""
    g_idx = named_tensor(g_idx, "g_idx")
    if bool((g_idx == -1).any()):
        return None
    if g_idx.dim() != 1 or g_idx.numel() != cols:
        raise ValueError(
            f"g_idx: expected shape ({cols},), one group for each column, got {tuple(g_idx.shape)}"
        )
    groups, counts = torch.unique(g_idx, return_counts=True)
    expected = ceil(cols / group_size)
    if groups.numel() != expected:
        raise ValueError(
            f"g_idx: expected {expected} groups for {cols} columns and group_size {group_size}, "
            f"got {groups.numel()}"
        )
    sizes = counts.tolist()
    regular = all(s == group_size for s in sizes[:-1])
    if regular and bool((g_idx[1:] >= g_idx[:-1]).all()):
        return None
    return torch.argsort(g_idx, stable=True), sizes
