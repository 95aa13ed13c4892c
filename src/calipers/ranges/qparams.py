"""Ranges and qparams: scale and zero point of a range, a range that gives back qparams, and casts.

Every range of this package becomes a scale here, so that two faults of `calculate_qparams` are met
in one place: it computes in the dtype of the range, in which `high - low` may overflow, and it
reads a table of code limits that is built once, in the default dtype of that moment.
"""

from __future__ import annotations

import threading

import torch
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationStrategy,
    QuantizationType,
    fake_quantize,
)
from compressed_tensors.quantization.quant_args import round_to_quantized_type_dtype
from compressed_tensors.quantization.utils import (
    calculate_qparams,
    calculate_range,
    generate_gparam,
    helpers,
)
from torch import Tensor

from calipers.formats import FLOAT_FORMATS, Format, has_mx_scales, is_known_to_library
from calipers.memory import plain_values

__all__ = [
    "cast_range",
    "checked_global_scale",
    "expand_range",
    "fake_quantized",
    "global_scale_of_range",
    "qparams_of_range",
    "range_of_qparams",
    "scale_dtype_problem",
    "widened",
]

#: The largest E8M0 code that is a number.
LARGEST_MX_SCALE = 2.0**127
#: Integers of so many bits are exact in every floating dtype, half of it or all.
EXACT_BITS = 8

_table_lock = threading.Lock()


def qparams_of_range(
    low: Tensor, high: Tensor, args: QuantizationArgs, global_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of a range, computed in its dtype.

    Args:
        low: Minimum of each group, in the dtype in which the scale is stored.
        high: Maximum of each group, of the same shape and dtype.
        args: Quantization arguments.
        global_scale: TENSOR_GROUP only, shape (1,).

    Returns:
        Bit for bit what `calculate_qparams` gives, except where that overflows (`high - low` in
        float16, say). There it is what float64 gives, or the largest scale that the dtype holds.
    """
    _mend_table(args, low.device)
    scale, zero_point = _calculated(low, high, args, global_scale)
    lost = _overflowed(low, high, scale, args)
    if lost is None or not bool(lost.any()):
        return scale, zero_point
    wide_scale, wide_zero_point = _in_float64(low, high, args, global_scale)
    wide_scale = wide_scale.clamp(max=torch.finfo(scale.dtype).max).to(scale.dtype)
    lost = lost.reshape(scale.shape)
    return torch.where(lost, wide_scale, scale), torch.where(lost, wide_zero_point, zero_point)


def fake_quantized(
    values: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    args: QuantizationArgs,
    global_scale: Tensor | None = None,
) -> Tensor:
    """Values quantized and dequantized by scales that are broadcast to them.

    Args:
        values: Float32.
        scale: Float32, as stored.
        zero_point: Of the shape of `scale`.
        args: Quantization arguments; the strategy does not count.
        global_scale: TENSOR_GROUP only, shape (1,).
    """
    if is_known_to_library(args):
        # The strategy under which a scale of any shape is taken as it is.
        args = args.model_copy(update={"strategy": QuantizationStrategy.TOKEN})
        found: Tensor = fake_quantize(values, scale, zero_point, args, global_scale)
        return found
    if global_scale is not None:
        scale = scale / global_scale
    return Format.of(args).round(values / scale).mul_(scale)


def global_scale_of_range(low: Tensor, high: Tensor) -> Tensor:
    """Global scale for NVFP4, 448 * 6 / amax, float32, shape (1,).

    compressed-tensors divides in the dtype of the range and takes 1.0 where that overflows, as in
    float16 below an amax of 0.041: there float32 stands in. A float64 range may be so large that
    float32 does not hold its global scale, which is then the smallest normal number.
    """
    if low.dtype == torch.float64:
        return _in_float32(generate_gparam(low, high, dtype=torch.float64))
    scale: Tensor = generate_gparam(low, high)
    if low.dtype != torch.float16:
        return scale
    return torch.where(scale == 1, generate_gparam(low.float(), high.float()), scale)


def _in_float32(scale: Tensor) -> Tensor:
    """A float64 global scale; 1.0 for values so small that float32 does not hold theirs."""
    limits = torch.finfo(torch.float32)
    return torch.where(scale > limits.max, 1.0, scale.clamp(min=limits.tiny)).float()


def scale_dtype_problem(args: QuantizationArgs, dtype: torch.dtype) -> str | None:
    """Why scales of values of a dtype cannot have `args.scale_dtype`; None where they can.

    compressed-tensors clamps a scale of the values' dtype to the range of the other one.
    """
    wanted = args.scale_dtype
    if wanted is None or not wanted.is_floating_point:
        return None
    if torch.finfo(wanted).max <= torch.finfo(dtype).max:
        return None
    return (
        f"scale_dtype {wanted} has a wider range than {dtype}, in which compressed-tensors cannot "
        "compute it"
    )


def _overflowed(low: Tensor, high: Tensor, scale: Tensor, args: QuantizationArgs) -> Tensor | None:
    """Marks the ranges that are too wide for their dtype; None where none can be."""
    limit = torch.finfo(low.dtype).max
    if args.type == QuantizationType.INT and 2.0**args.num_bits - 1 > limit:
        return torch.ones_like(low, dtype=torch.bool)
    if not args.symmetric:
        return (high.clamp(min=0) - low.clamp(max=0)).isinf() & (low <= high)
    # Rounding up to a power of two may pass the largest number.
    return scale.isinf() if has_mx_scales(args) else None


def _in_float64(
    low: Tensor, high: Tensor, args: QuantizationArgs, global_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    low, high = low.double(), high.double()
    if has_mx_scales(args):
        scale, zero_point = _calculated(low, high, args, global_scale)
        return scale.clamp(max=LARGEST_MX_SCALE), zero_point
    # A quarter of the range, whose width is a number in float64 too; powers of two are exact.
    plain = args.model_copy(update={"scale_dtype": None})
    scale, zero_point = _calculated(low / 4, high / 4, plain, None)
    scale = scale * 4
    if args.scale_dtype is not None:
        scale = round_to_quantized_type_dtype(scale, args.scale_dtype)
    return scale, zero_point


def _calculated(
    low: Tensor, high: Tensor, args: QuantizationArgs, global_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Scale and zero point, of formats that the installed compressed-tensors lacks, too."""
    if is_known_to_library(args):
        scale, zero_point = calculate_qparams(low, high, args, global_scale=global_scale)
        return scale, zero_point
    if not args.symmetric:
        raise NotImplementedError(f"float formats of {args.num_bits} bits are always symmetric")
    size = torch.maximum(low.clamp(max=0).abs(), high.clamp(min=0))
    if has_mx_scales(args):
        scale = FLOAT_FORMATS[args.num_bits].mx_scale(size)
    else:
        scale = size / Format.of(args).high
    if global_scale is not None:
        scale = global_scale * scale
    if args.scale_dtype is not None and not has_mx_scales(args):
        scale = round_to_quantized_type_dtype(scale, args.scale_dtype)
    eps = 1.0 if has_mx_scales(args) else torch.finfo(args.scale_dtype or scale.dtype).eps
    scale = torch.where(scale == 0, eps, scale)
    return scale, torch.zeros_like(scale, dtype=args.zp_dtype)


def _mend_table(args: QuantizationArgs, device: torch.device) -> None:
    """Build compressed-tensors' limits anew where a default dtype of 16 bits rounded them."""
    if args.type != QuantizationType.INT or args.num_bits <= EXACT_BITS:
        return
    if calculate_range(args, device)[1].dtype not in (torch.bfloat16, torch.float16):
        return
    with _table_lock:
        default = torch.get_default_dtype()
        helpers._calculate_range.cache_clear()
        torch.set_default_dtype(torch.float32)
        try:
            calculate_range(args, device)
        finally:
            torch.set_default_dtype(default)


def cast_range(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast, with what the dtype cannot hold taken to its limits (an expanded float16 range)."""
    if values.dtype == dtype:
        return values
    limits = torch.finfo(dtype)
    if limits.max < torch.finfo(values.dtype).max:
        values = values.clamp(limits.min, limits.max)
    return values.to(dtype)


def expand_range(values: Tensor, factor: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values in a dtype times a factor; what the dtype cannot hold is taken to its limits.

    Args:
        values: Ends of ranges, of any floating dtype. Inf, the end of a range of nothing, stays.
        factor: At least 1.
        dtype: Of the result, float32 or float64.
    """
    if factor == 1 and values.dtype == dtype:
        return values
    limits, own = torch.finfo(dtype), values.to(dtype)
    return torch.where(values.isinf(), own, (own * factor).clamp(limits.min, limits.max))


def widened(ends: tuple[Tensor, Tensor], factor: float) -> tuple[Tensor, Tensor]:
    """Minimum and maximum times a factor, finite: float64 for float64 values, else float32.

    Args:
        ends: Of any floating dtype; Inf and -Inf of a range of nothing stay.
        factor: At least 1.
    """
    dtype = torch.float64 if ends[0].dtype == torch.float64 else torch.float32
    low, high = (expand_range(end, factor, dtype) for end in ends)
    return low, high


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

    Example:
        >>> args = QuantizationArgs(num_bits=4)
        >>> low, high = range_of_qparams(torch.tensor([0.5]), None, args)
        >>> low, high
        (tensor([-3.7500], dtype=torch.float64), tensor([3.7500], dtype=torch.float64))
        >>> qparams_of_range(low, high, args)[0]
        tensor([0.5000], dtype=torch.float64)

    Source: `calculate_qparams` of compressed-tensors, solved for its arguments.
    """
    if not bool((scale > 0).all()):
        raise ValueError(
            f"scale: expected positive values, got a minimum of {float(scale.min())}; "
            "`calculate_qparams` never gives such a scale, so no range does"
        )
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


def checked_global_scale(scale: object, device: torch.device | None = None) -> Tensor:
    """A global scale as one positive finite number in float32, shape (1,).

    Args:
        scale: One element, of any shape and real dtype.
        device: Where it is needed; None leaves it where it is.

    Raises:
        ValueError: What came instead, without the name of what it is for.
    """
    expected = "global_scale: expected one positive finite number, shape (1,)"
    if not isinstance(scale, Tensor):
        raise ValueError(f"{expected}, got {type(scale).__name__}")
    try:
        value = plain_values(scale)
    except ValueError as error:
        raise ValueError(f"global_scale: {error}") from error
    if value.numel() != 1:
        raise ValueError(f"{expected}, got shape {tuple(value.shape)}")
    value = value.to(device=device, dtype=torch.float32).reshape(1)
    number = float(value)
    if not 0 < number < torch.inf:  # NaN is neither
        raise ValueError(f"{expected}, got {number}")
    return value
