"""Helpers around observers: values in the canonical order, and token counts of a model."""

from __future__ import annotations

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor

from calipers.grouping import Grouping
from calipers.observers.base import Observer

__all__ = ["flatten_for_calibration", "get_observer_token_count"]


def flatten_for_calibration(
    value: Tensor, base_name: str, args: QuantizationArgs, g_idx: Tensor | None = None
) -> Tensor:
    """A value as `(num_observations, *qparam_shape, group_size)`.

    Minimum and maximum over the first and last dimension give one range for each scale.

    | base name | strategy | result |
    |---|---|---|
    | weight | tensor | (1, 1, numel) |
    | weight | channel | (1, rows, 1, cols) |
    | weight | group, tensor_group | (1, rows, groups, group_size) |
    | weight | block | (1, block_rows, block_cols, height * width) |
    | input, output | tensor | (tokens, 1, hidden) |
    | input, output | group, tensor_group | (tokens, groups, group_size) |
    | input, output | token | (1, ..., 1, hidden) |
    | q, k, v | tensor | (batch * tokens, 1, heads * head_dim) |
    | q, k, v | attn_head | (batch * tokens, heads, 1, 1, head_dim) |

    Args:
        value: A weight (leading dimensions stay in front of the qparams), an activation of any
            number of leading dimensions, or an attention state `(batch, heads, tokens, head_dim)`.
        base_name: weight, input, output, q, k or v.
        args: Quantization arguments.
        g_idx: Group of each column; None, or a tensor that holds -1, for column order.

    Returns:
        A view of `value` where its layout allows, else a copy. Groups and blocks shorter than
        others are filled up with zeros, which changes neither their scale nor their error.

    Example:
        Blocks of 2 x 2, one row of values for each:

        >>> import torch
        >>> args = QuantizationArgs(num_bits=8, strategy="block", block_structure=[2, 2])
        >>> flatten_for_calibration(torch.arange(8.0).view(2, 4), "weight", args)
        tensor([[[[0., 1., 4., 5.],
                  [2., 3., 6., 7.]]]])

    Raises:
        ValueError: A strategy that means nothing for this base name, a shape that it cannot take,
            or a `g_idx` that does not fit.
    """
    grouping = Grouping.of(value.shape, base_name, args, g_idx)
    sizes = grouping.split(value)
    parts = [groups.canonical() for groups in sizes]
    if len(parts) == 1:
        return parts[0]
    longest = max(part.shape[-1] for part in parts)
    whole = value.new_zeros(parts[0].shape[0], *grouping.qparam_shape, longest)
    for groups, part in zip(sizes, parts, strict=True):
        where = (slice(None), *groups.where, slice(None))
        whole[..., : part.shape[-1]][where] = part
    return whole


def get_observer_token_count(model: torch.nn.Module) -> dict[str, int | None]:
    """Tokens that the input observers of a model counted.

    Returns:
        For the name of each module with an `input_observer` its count, None where none was counted.
    """
    return {
        name.rpartition(".")[0]: module._num_observed_tokens
        for name, module in model.named_modules()
        if isinstance(module, Observer) and name.rpartition(".")[2] == "input_observer"
    }
