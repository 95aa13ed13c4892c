"""The shrink grid as the contract states it, in float32, without any shortcut.

"for i in 0 .. int(maxshrink*grid)-1, p = 1 - i/grid; min and max (times expand) both shrink by p;
scale and zero point by compressed-tensors' `calculate_qparams`; error = sum |fake_quantize(x) - x|^norm
over each group; the smallest error wins, the first of equals; the search ends once `patience` steps
in a row improved no group at all."
"""  # noqa: E501

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch
from compressed_tensors.quantization import QuantizationArgs, fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams
from torch import Tensor

#: Two errors this close (relative) may be told apart either way by the order of a float32 sum:
#: twice the rounding of a sum of some hundred terms.
TIE = 4e-6


@dataclass(frozen=True)
class Found:
    """Results by group."""

    low: Tensor
    high: Tensor
    steps: list[int]
    #: Whether a decision hung on the rounding of a sum: another order may decide otherwise.
    close: bool


def groups_of(value: Tensor, args: QuantizationArgs, g_idx: Tensor | None = None) -> list[Tensor]:
    """Masks of the values of each scale, row by row, by loops over the contract's table."""
    masks = []

    def add(*index: object) -> None:
        mask = torch.zeros(value.shape, dtype=torch.bool)
        mask[index] = True
        masks.append(mask)

    if args.strategy == "tensor":
        add(...)
        return masks
    rows, cols = value.shape
    if args.strategy == "channel":
        for row in range(rows):
            add(row)
    elif args.strategy == "block":
        high, wide = args.block_structure
        for top in range(0, rows, high):
            for left in range(0, cols, wide):
                add(slice(top, top + high), slice(left, left + wide))
    else:
        columns = torch.arange(cols) // args.group_size if g_idx is None else g_idx
        for row in range(rows):
            for group in columns.unique():
                add(row, (columns == group).nonzero().squeeze(-1))
    return masks


def qparam_shape(value: Tensor, args: QuantizationArgs) -> tuple[int, ...]:
    if args.strategy == "tensor":
        return (1,)
    rows, cols = value.shape
    if args.strategy == "channel":
        return (rows, 1)
    if args.strategy == "block":
        high, wide = args.block_structure
        return (ceil(rows / high), ceil(cols / wide))
    return (rows, ceil(cols / args.group_size))


def search(
    groups: list[Tensor],
    args: QuantizationArgs,
    *,
    maxshrink: float,
    patience: int,
    grid: float,
    norm: float,
    expand: float = 1.0,
    include_end: bool = False,
    importance: list[Tensor] | None = None,
    global_scale: Tensor | None = None,
) -> Found:
    """Search the range of each group (1-D tensors of any dtype).

    Groups are rows of one matrix; short ones are filled up with values of weight zero.
    """
    token_args = args.model_copy(update={"strategy": "token"})
    longest = max(len(group) for group in groups)
    x = torch.zeros(len(groups), longest)
    weight = torch.zeros(len(groups), longest)
    for g, group in enumerate(groups):
        x[g, : len(group)] = group.float()
        weight[g, : len(group)] = 1 if importance is None else importance[g]
    low = torch.stack([group.min() for group in groups]).float() * expand
    high = torch.stack([group.max() for group in groups]).float() * expand
    best = torch.full_like(low, torch.inf)
    best_qparams = torch.zeros(2, len(groups))
    steps = torch.zeros(len(groups), dtype=torch.int64)
    close, without_gain = False, 0
    last = max(1, int(maxshrink * grid)) if include_end else int(maxshrink * grid) - 1
    for i in range(last + 1):
        p = 1 - i / grid
        shrunk = low * p, high * p
        if args.scale_dtype is not None:  # judged as it will be stored
            shrunk = tuple(cast(end, groups[0].dtype) for end in shrunk)
        scale, zero_point = calculate_qparams(*shrunk, args, global_scale)
        scale = scale.float()
        rounded = fake_quantize(x, scale[:, None], zero_point[:, None], token_args, global_scale)
        error = (weight * (rounded - x).abs() ** norm).sum(1)
        qparams = torch.stack([scale.float(), zero_point.float()])
        near = ((error - best).abs() <= TIE * error) & (error > 0)
        close |= bool((near & (qparams != best_qparams).any(0)).any())
        better = error < best
        best = torch.where(better, error, best)
        best_qparams = torch.where(better, qparams, best_qparams)
        steps = torch.where(better, i, steps)
        without_gain = 0 if better.any() else without_gain + 1
        if without_gain >= patience:
            break
    p = torch.tensor([1 - i / grid for i in steps.tolist()])
    return Found(low * p, high * p, steps.tolist(), close)


def cast(values: Tensor, dtype: torch.dtype) -> Tensor:
    """A float32 range in the observed dtype; what it cannot hold becomes its largest value."""
    if torch.finfo(dtype).max >= torch.finfo(values.dtype).max:
        return values.to(dtype)
    return values.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max).to(dtype)
