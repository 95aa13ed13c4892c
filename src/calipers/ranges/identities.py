"""`range_of_scale`: a scale and zero point stated as the range that gives them back."""

from __future__ import annotations

import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import calculate_range
from torch import Tensor

__all__ = ["range_of_scale"]


def range_of_scale(
    scale: Tensor, zero_point: Tensor, args: QuantizationArgs, global_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Minimum and maximum that compressed-tensors' `calculate_qparams` turns into this scale.

    Symmetric formats: `max = scale * (high - low) / 2 = -min`; asymmetric ones: `min = (low - z) *
    scale`, `max = (high - z) * scale`.

    Args:
        scale: Multiplier of codes, positive, any shape, in units of the value per code; under
            TENSOR_GROUP as it is stored, multiplied by the global scale.
        zero_point: Integer code of 0.0, of the same shape.
        args: The number format.
        global_scale: TENSOR_GROUP only, shape (1,); divided out.

    Returns:
        Minimum and maximum, of the shape of the scale, float32 (float64 for float64).
    """
    wide = scale if scale.dtype == torch.float64 else scale.float()
    if global_scale is not None:
        wide = wide / global_scale
    low, high = calculate_range(args, scale.device)
    if args.symmetric:
        half = wide * ((high - low) / 2)
        return -half, half
    zero = zero_point.to(wide.dtype)
    return (low - zero) * wide, (high - zero) * wide
