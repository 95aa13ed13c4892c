"""`measure_weight_error`: how far a fake-quantized weight is from the weight itself."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy
from compressed_tensors.quantization.lifecycle.forward import fake_quantize

from calipers.ranges.views import piece_size

__all__ = ["measure_weight_error"]


@torch.no_grad()
def measure_weight_error(
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    args: QuantizationArgs,
    global_scale: torch.Tensor | None = None,
) -> float:
    """Relative error ||W - fakequant(W)||_F / ||W||_F of a weight.

    The weight is fake-quantized in its own dtype, as the model's forward does; differences and
    squares are float32, a few rows at a time, so no copy of the whole weight is made.

    Args:
        weight: Shape (rows, columns).
        scale: As registered for the strategy, in units of the weight per code.
        zero_point: Same shape as the scale, in codes; None stands for zeros.
        args: The weight's arguments.
        global_scale: Shape (1,), for TENSOR_GROUP.

    Returns:
        The error, >= 0; 0.0 for an empty weight or one of zeros that stays zero; inf for zeros
        that do not.
    """
    error = total = 0.0
    for rows, groups in _pieces(weight, args):
        piece = weight[rows]
        zero = None if zero_point is None else zero_point[groups]
        quantized = fake_quantize(piece, scale[groups], zero, args, global_scale)
        error += _sum_of_squares(piece.float() - quantized.float())
        total += _sum_of_squares(piece.float())
    if total == 0.0:
        return math.inf if error else 0.0
    return math.sqrt(error / total)


def _pieces(weight: torch.Tensor, args: QuantizationArgs) -> Iterator[tuple[slice, slice]]:
    """Slices of the weight's rows, and of the rows of scales that belong to them."""
    rows, columns = weight.shape
    height = 1
    if args.strategy == QuantizationStrategy.BLOCK and args.block_structure is not None:
        height = args.block_structure[0]
    step = max(1, piece_size(weight) // (max(1, columns) * height))  # in units of scale rows
    for start in range(0, math.ceil(rows / height), step):
        groups = slice(start, start + step)
        if args.strategy == QuantizationStrategy.TENSOR:
            groups = slice(None)
        yield slice(start * height, (start + step) * height), groups


def _sum_of_squares(values: torch.Tensor) -> float:
    return float(values.square().sum(dtype=torch.float64))
