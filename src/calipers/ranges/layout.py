"""Layout: which values of a tensor share a scale, by base name and quantization strategy."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy
from torch import Tensor

from calipers.memory import plain_tensor
from calipers.ranges.views import Arrangement, GroupedView

__all__ = ["ACTIVATION_NAMES", "ATTENTION_NAMES", "BASE_NAMES", "arrange", "arrange_whole"]

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


def arrange(
    value: Tensor, base_name: str, args: QuantizationArgs, g_idx: Tensor | None = None
) -> Arrangement:
    """Bring the values that share a scale together, as views of `value`.

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
        value: A weight, an activation or an attention state.
        base_name: weight, input, output, q, k or v.
        args: Quantization arguments, of which strategy, group_size and block_structure count.
        g_idx: Group of each column, shape (cols,), for the group strategies of weights; None or a
            tensor that holds -1 means column order.

    Returns:
        The arrangement: one view, or more where some groups are shorter.

    Raises:
        ValueError: A strategy that means nothing for this base name, a shape that the strategy
            cannot take, or a `g_idx` that does not fit.
    """
    strategy = QuantizationStrategy(args.strategy)
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
        return arrange_whole(value, base_name)
    if strategy == _HEAD:
        _need_rank(value, 3, strategy, "(..., heads, tokens, head_dim)")
        by_token = value.transpose(-3, -2).unsqueeze(-2).unsqueeze(-2)
        return _single(by_token, (*range(value.dim() - 2), by_token.dim() - 1))
    if strategy == _TOKEN:
        _need_rank(value, 1, strategy, "(..., hidden)")
        return _single(value.unsqueeze(-2), (value.dim(),))
    if strategy == _CHANNEL:
        _need_rank(value, 1, strategy, "(rows, ...)")
        rows = value if value.dim() > 1 else value.unsqueeze(-1)
        return _single(rows.unsqueeze(-2), (rows.dim(),))
    if strategy == _BLOCK:
        return _arrange_blocks(value, args)
    if base_name in ACTIVATION_NAMES:
        _need_rank(value, 1, strategy, "(..., hidden)")
        return _arrange_groups(value, args, tuple(range(value.dim() - 1)))
    _need_rank(value, 2, strategy, "(rows, cols)")
    order = _column_order(g_idx, value.shape[-1], _group_size(args))
    if order is None:
        return _arrange_groups(value, args, ())
    return _arrange_columns(value, *order)


def arrange_whole(value: Tensor, base_name: str) -> Arrangement:
    """All values in one group, with one qparam of shape (1,).

    The dimensions keep the order of the canonical layout: one observation for a weight, one for
    each token of an activation or attention state.
    """
    if value.dim() == 0:
        value = value.reshape(1)
    if base_name == "weight":
        return _single(value.unsqueeze(0), tuple(range(1, value.dim() + 1)))
    behind = 1
    if base_name in ATTENTION_NAMES and value.dim() > 2:
        value, behind = value.transpose(-3, -2), 2
    whole = value.unsqueeze(-1 - behind)
    kept = whole.dim() - 1 - behind
    return _single(whole, tuple(d for d in range(whole.dim()) if d != kept))


def _single(values: Tensor, reduce_dims: tuple[int, ...]) -> Arrangement:
    view = GroupedView(values, reduce_dims)
    return Arrangement(view.qparam_shape, (view,))


def _need_rank(value: Tensor, rank: int, strategy: QuantizationStrategy, expected: str) -> None:
    if value.dim() < rank:
        raise ValueError(
            f"observed: strategy {strategy.value!r} expects a shape {expected}, "
            f"got {tuple(value.shape)}"
        )


def _group_size(args: QuantizationArgs) -> int:
    size: int | None = args.group_size
    assert size is not None  # QuantizationArgs validates it
    return size


def _arrange_groups(
    value: Tensor, args: QuantizationArgs, observed: tuple[int, ...]
) -> Arrangement:
    """Consecutive columns in groups, the last perhaps short; `observed` dims are reduced too."""
    size, cols = _group_size(args), value.shape[-1]
    full = cols // size
    reduce_dims = (*observed, value.dim())
    views = []
    if full:
        head = value.narrow(-1, 0, full * size).unflatten(-1, (full, size))
        views.append(GroupedView(head, reduce_dims, (..., slice(0, full))))
    if cols % size:
        tail = value.narrow(-1, full * size, cols % size).unsqueeze(-2)
        views.append(GroupedView(tail, reduce_dims, (..., slice(full, full + 1))))
    kept = tuple(s for d, s in enumerate(value.shape[:-1]) if d not in observed)
    return Arrangement((*kept, ceil(cols / size)), tuple(views))


def _arrange_columns(value: Tensor, order: Tensor, sizes: list[int]) -> Arrangement:
    """Columns gathered by group: one view for each group size."""
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + size)
    views = []
    for size in sorted(set(sizes), reverse=True):
        groups = [group for group, s in enumerate(sizes) if s == size]
        columns = torch.stack([order[starts[g] : starts[g] + size] for g in groups])
        where = (..., torch.tensor(groups, dtype=torch.int64, device=value.device))
        views.append(GroupedView(value, (value.dim(),), where, columns.to(value.device)))
    return Arrangement((*value.shape[:-1], len(sizes)), tuple(views))


def _column_order(
    g_idx: Tensor | None, cols: int, group_size: int
) -> tuple[Tensor, list[int]] | None:
    """Stable order of columns by group, and the size of each group; None for column order."""
    if g_idx is None:
        return None
    if not isinstance(g_idx, Tensor):
        raise ValueError(f"g_idx: expected a tensor, got {type(g_idx).__name__}")
    try:
        g_idx = plain_tensor(g_idx)
    except ValueError as error:
        raise ValueError(f"g_idx: {error}") from error
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


def _arrange_blocks(value: Tensor, args: QuantizationArgs) -> Arrangement:
    """Blocks of rows x cols; short ones at the lower and right edges get views of their own."""
    _need_rank(value, 2, _BLOCK, "(rows, cols)")
    height, width = args.block_structure or (1, 1)
    views = []
    for row, rows, high in _spans(value.shape[-2], height):
        for col, cols, wide in _spans(value.shape[-1], width):
            part = value.narrow(-2, row * height, rows * high).narrow(-1, col * width, cols * wide)
            blocks = part.unflatten(-1, (cols, wide)).unflatten(-3, (rows, high))
            where = (..., slice(row, row + rows), slice(col, col + cols))
            views.append(GroupedView(blocks, (blocks.dim() - 3, blocks.dim() - 1), where))
    shape = (*value.shape[:-2], ceil(value.shape[-2] / height), ceil(value.shape[-1] / width))
    return Arrangement(shape, tuple(views))


def _spans(length: int, size: int) -> Sequence[tuple[int, int, int]]:
    """(first block, number of blocks, length) of the full blocks and of the short last one."""
    full, rest = divmod(length, size)
    return [(0, full, size)] * bool(full) + [(full, 1, rest)] * bool(rest)
