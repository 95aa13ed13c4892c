"""Identities between ranges and qparams: any scale and zero point as a minimum and maximum."""

from __future__ import annotations

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor

from calipers.formats import Format, has_mx_scales
from calipers.ranges.global_scale import checked_global_scale

__all__ = ["range_of_qparams"]


def range_of_qparams(
    scale: Tensor,
    zero_point: Tensor | None,
    args: QuantizationArgs,
    global_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The range that `calculate_qparams` turns back into this scale and zero point.

    So an observer that finds scales can answer where a minimum and maximum are asked for. With
    lo and hi the smallest and largest code:

    | format | minimum | maximum |
    |---|---|---|
    | symmetric (int, fp8, fp6, fp4) | -maximum | scale * (hi - lo) / 2 |
    | asymmetric | (lo - zero_point) * scale | (hi - zero_point) * scale |
    | NVFP4 | -maximum | 6 * scale / global_scale |
    | MXFP4, MXFP6, MXFP8 | -maximum | 4, 4, 256 times scale |

    A float32 number has no room for every such product: `m / 7.5` skips some float32 scales for
    every float32 `m`. The range is therefore float64, and so is the scale that
    `calculate_qparams` makes of it; cast to the dtype of `scale` it is equal, bit for bit. (Of a
    float64 scale the last bit may differ.)

    Args:
        scale: Multipliers, > 0, any shape and floating dtype; under NVFP4 as stored, that is
            multiplied by the global scale and rounded to float8.
        zero_point: Codes of 0.0, of the same shape; read where `args` are asymmetric, None there
            stands for zeros.
        args: Quantization arguments; the strategy does not count.
        global_scale: What the scale was multiplied by, if anything, shape (1,).

    Returns:
        Minimum, <= 0, and maximum, >= 0, float64, of the shape of `scale`.

    Raises:
        ValueError: A scale that is not positive: `calculate_qparams` never makes one, so that no
            range gives it back. A global scale that is not one positive finite number.

    Source: `calculate_qparams` of compressed-tensors, solved for its arguments.
    """
    if not bool((scale > 0).all()):
        raise ValueError("scale: expected positive values; no range stands for others")
    step = scale.double()
    if global_scale is not None:
        step = step / checked_global_scale(global_scale, step.device).double()
    codes = Format.of(args)
    if args.symmetric:
        half = codes.width / 2
        if has_mx_scales(args):
            half = 2.0**codes.mx_offset
        return -half * step, half * step
    zero = torch.zeros_like(step) if zero_point is None else zero_point.double()
    return (codes.low - zero) * step, (codes.high - zero) * step
