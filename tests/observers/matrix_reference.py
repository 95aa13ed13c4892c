"""The float64 recomputation that the bad-input matrix is held against.

Written from the contract alone: nothing of `calipers.ranges` is used, and loops over groups are one
gather into a matrix of (groups, values), NaN where a group has no value.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy
from compressed_tensors.quantization import fake_quantize as ct_fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
F32 = torch.finfo(torch.float32)


def is_mx(args: QuantizationArgs) -> bool:
    return args.scale_dtype == torch.uint8


def code_limits(args: QuantizationArgs) -> tuple[float, float]:
    if args.type == "int":
        return -(2.0 ** (args.num_bits - 1)), 2.0 ** (args.num_bits - 1) - 1
    return (-448.0, 448.0) if args.num_bits == 8 else (-6.0, 6.0)


# -- groups -------------------------------------------------------------------------------------


def groups_of(
    shape: tuple[int, ...], base_name: str, args: QuantizationArgs, g_idx: Tensor | None
) -> tuple[Tensor, tuple[int, ...]]:
    """Number of the group of each value, by the contract's table, and the shape of the qparams."""
    strategy = str(getattr(args.strategy, "value", args.strategy))
    if strategy == "tensor":
        return torch.zeros(shape, dtype=torch.int64), (1,)
    if strategy == "attn_head":
        heads = torch.arange(shape[-3])[:, None, None]
        return heads.expand(shape), (shape[-3], 1, 1)
    lead = shape[:-1]
    rows = torch.arange(int(torch.tensor(lead).prod()) if lead else 1).view(*lead, 1)
    if strategy == "channel" and len(shape) == 1:
        return torch.arange(shape[0]), (shape[0], 1)
    if strategy in ("channel", "token"):
        return rows.expand(shape), (*lead, 1)
    cols = shape[-1]
    if strategy == "block":
        height, width = args.block_structure
        down, across = ceil(shape[-2] / height), ceil(cols / width)
        place = rows % shape[-2] // height + rows // shape[-2] * down
        return place * across + torch.arange(cols) // width, (*shape[:-2], down, across)
    count = ceil(cols / args.group_size)
    column = torch.arange(cols) // args.group_size
    if g_idx is not None and not bool((g_idx == -1).any()):
        column = g_idx.long()
    if base_name != "weight":
        return column.expand(shape), (count,)
    return rows * count + column, (*lead, count)


def gather(value: Tensor, group: Tensor, count: int, fill: float) -> Tensor:
    """Values as (groups, most values of a group), float64, `fill` behind the end of a group."""
    flat, group = value.double().reshape(-1), group.reshape(-1)
    order = group.argsort(stable=True)
    sizes = torch.bincount(group, minlength=count)
    start = sizes.cumsum(0) - sizes
    found = torch.full((count, max(1, int(sizes.max()))), fill, dtype=torch.float64)
    place = torch.arange(len(flat)) - start[group[order]]
    found[group[order], place] = flat[order]
    return found


# -- formats ------------------------------------------------------------------------------------


def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, args: QuantizationArgs, *, single: bool = False
) -> Tensor:
    """Float64, by arithmetic alone; the scale with the global scale divided out.

    Args:
        single: Divide in float32 as compressed-tensors does, which makes ties of what is near one,
            where float32 reaches.
    """
    low, high = code_limits(args)
    scaled = x / scale
    if single:
        quotient = (x.float() / scale.float()).double()
        scaled = torch.where(quotient.isfinite(), quotient, scaled)
    if args.type == "int":
        return ((scaled + zero_point).round().clamp(low, high) - zero_point) * scale
    mantissa, lowest = (3, -6) if args.num_bits == 8 else (1, 0)
    scaled = scaled.clamp(low, high)
    exponent = (torch.frexp(scaled).exponent.double() - 1).clamp(min=lowest)
    step = (exponent - mantissa).exp2()
    return (scaled / step).round() * step * scale


def free_scale(low: Tensor, high: Tensor, args: QuantizationArgs) -> tuple[Tensor, Tensor]:
    """Scale and zero point of a float64 range, the scale of any value (MX: a power of two)."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    lowest, highest = code_limits(args)
    if args.symmetric:
        amax = torch.maximum(-low, high)
        if is_mx(args):
            # From 1.75 on a mantissa is rounded up; 2 is the exponent of the largest power, 4.
            mantissa, exponent = torch.frexp(amax)
            exponent = exponent - 1 + (mantissa * 2 >= 1.75).int()
            scale = torch.where(amax > 0, (exponent.double() - 2).exp2(), 0)
            return scale.clamp(2.0**-127, 2.0**127), torch.zeros_like(low)
        return amax / ((highest - lowest) / 2), torch.zeros_like(low)
    scale = high / (highest - lowest) - low / (highest - lowest)
    zero = (lowest - low / scale).nan_to_num(0).clamp(lowest, highest)
    return scale, zero


def rounded_to(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Float64 in a dtype, at most its largest value."""
    limit = torch.finfo(dtype).max
    return scale.clamp(max=limit).to(dtype)


def stored(
    low: Tensor,
    high: Tensor,
    dtype: torch.dtype,
    args: QuantizationArgs,
    global_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What is stored for a range: `calculate_qparams` in a dtype; float64 where that overflows.

    Args:
        low: Float64, <= high; both 0 for a range of nothing.
        high: The same.
        dtype: Of the observed values.
        args: Quantization arguments.
        global_scale: NVFP4 only.

    Returns:
        Scale as it is stored, and zero point.
    """
    limit = torch.finfo(dtype).max
    low, high = (
        end.clamp(-limit, limit).to(dtype) for end in (low.clamp(max=0), high.clamp(min=0))
    )
    scale, zero = calculate_qparams(low, high, args, global_scale)
    wide, wide_zero = free_scale(low.double(), high.double(), args)
    if global_scale is None:
        lost = ~(high - low).isfinite() if not args.symmetric else scale.isinf()
        tiny = torch.finfo(scale.dtype).tiny * 16
        close = (scale.double() - wide).abs() <= 2 * torch.finfo(scale.dtype).eps * wide
        assert bool((close | lost | (wide < tiny)).all()), "calculate_qparams itself is wrong"
        scale = torch.where(lost, rounded_to(wide, scale.dtype), scale)
        zero = torch.where(lost, wide_zero.round().to(zero.dtype), zero)
    return scale, zero


# -- the grid -----------------------------------------------------------------------------------


def r24(x: Tensor) -> Tensor:
    """Float64 rounded to the 24 bits of a float32, of any exponent."""
    mantissa, exponent = torch.frexp(x)
    limit = torch.finfo(torch.float64).max
    return torch.ldexp(mantissa.float().double(), exponent).clamp(-limit, limit)


def r32(x: Tensor) -> Tensor:
    """Float64 rounded to a float32 number, the largest at most."""
    return x.clamp(-F32.max, F32.max).float().double()


@dataclass(frozen=True)
class Problem:
    """Groups of a value and how they are quantized.

    Args:
        x: Values as (groups, n), float64, NaN where there is none that counts.
        weight: Importance of each, of the same shape.
        args: Quantization arguments.
        dtype: Of the observed values.
        global_scale: NVFP4 only.
    """

    x: Tensor
    weight: Tensor
    args: QuantizationArgs
    dtype: torch.dtype
    global_scale: Tensor | None

    @property
    def low(self) -> Tensor:
        return torch.where(self.x.isfinite(), self.x, torch.inf).amin(-1)

    @property
    def high(self) -> Tensor:
        return torch.where(self.x.isfinite(), self.x, -torch.inf).amax(-1)

    @property
    def range(self) -> tuple[Tensor, Tensor]:
        """Minimum and maximum, zeros for a group of nothing."""
        low, high = self.low, self.high
        nothing = low > high
        return torch.where(nothing, 0, low), torch.where(nothing, 0, high)

    @property
    def unit(self) -> Tensor:
        """A power of two near the largest value of each group, so that no error overflows."""
        amax = torch.maximum(-self.range[0], self.range[1])
        exponent = torch.frexp(amax).exponent.double().clamp(-1000, 1023)
        return torch.where(amax > 0, exponent.exp2(), 1.0)

    def error(self, scale: Tensor, zero_point: Tensor, norm: float) -> Tensor:
        """Sum of weight * |error / unit|**norm for scales (..., groups) as they are stored."""
        step, zero_point = scale.double(), zero_point.double()
        if self.global_scale is not None:
            step = step / self.global_scale.double()
        unit = self.unit.unsqueeze(-1)
        x = torch.where(self.x.isfinite(), self.x, 0) / unit
        rounded = fake_quantize(
            x, (step / self.unit).unsqueeze(-1), zero_point.unsqueeze(-1), self.args
        )
        return (self.weight * (rounded - x).abs() ** norm).sum(-1)

    def noise(self, norm: float) -> Tensor:
        """What float32 arithmetic may add to an error, in units of the group."""
        part = torch.full_like(self.unit, 2.0**-21)
        if self.dtype != torch.float64:
            part = torch.maximum(part, 2.0**-148 / self.unit)
        count = torch.where(self.x.isfinite(), self.weight, 0).sum(-1)
        return count * part**norm

    @property
    def tiny(self) -> float:
        """The smallest positive number that a scale may be."""
        limits = torch.finfo(self.dtype)
        return limits.tiny * limits.eps

    def stored(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        return stored(low, high, self.dtype, self.args, self.global_scale)


def shrink_factors(options: dict[str, float], include_end: bool) -> list[float]:
    steps = int(options["maxshrink"] * options["grid"])
    steps = max(1, steps) + 1 if include_end else max(1, steps)
    return [1 - i / options["grid"] for i in range(steps)]


def grid_bound(
    problem: Problem, factors: list[float], norm: float, expand: float
) -> tuple[Tensor, Tensor]:
    """The error that the range found may have at most, and by how much more for rounding.

    The candidates are judged in float64; what float32 cannot tell from the best may be chosen too.
    The bound is the worst of these with its range cast and its scale stored.
    """
    args, dtype = problem.args, problem.dtype
    # Where float32 cannot hold them, values are searched as if they were smaller.
    unlimited = dtype == torch.float64 or (args.scale_dtype is None and not args.symmetric)
    single = r24 if unlimited else r32
    # Float64 has no room for an expanded range of its largest values.
    room = torch.where(problem.unit > 2.0**990, 4.0, 1.0)
    ends = [single(single(end / room) * float(torch.tensor(expand))) for end in problem.range]
    p = torch.tensor(factors).double().view(-1, 1)
    limit = torch.finfo(torch.float64).max
    less = [single(end * p) for end in ends]
    lows, highs = ((end * room).clamp(-limit, limit) for end in less)
    if args.scale_dtype is None:
        scale, zero = free_scale(*less, args)
        scale = scale * room
        scale = scale if unlimited else scale.float()
        scale = torch.where(scale == 0, F32.eps, scale)
    else:
        scale, zero = stored(lows, highs, dtype, args, problem.global_scale)
        zero = zero.double()
    # A zero point of x.5 may be rounded either way.
    variants = [zero.round(), (zero + 1e-3).round(), (zero - 1e-3).round()]
    errors = torch.stack([problem.error(scale, each, norm) for each in variants])
    least = errors.amax(0).amin(0)
    noise = problem.noise(norm)
    tied = (errors <= least * (1 + 2e-5) + 4 * noise).any(0)
    final = problem.error(*problem.stored(lows, highs), norm)
    bound = torch.where(tied, final, -torch.inf).amax(0)
    return bound, noise


# -- other searches -----------------------------------------------------------------------------

#: Smallest and largest candidate in units of the scale of the range, and their number.
WINDOWS = {
    ("int", 3): (0.08, 1.52, 28),
    ("int", 4): (0.13, 1.50, 28),
    ("int", 8): (0.70, 1.45, 168),
    ("float", 8): (0.6, 1.96, 84),
}


def optimal_bound(problem: Problem) -> Tensor:
    """The squared error of the best candidate, and what rounding its scale may add.

    A scale that is off by a part u of itself moves each dequantized value by that part of it, and
    rounding values to codes anew makes no error larger.
    """
    first, last, count = WINDOWS[
        str(getattr(problem.args.type, "value", problem.args.type)), problem.args.num_bits
    ]
    ratios = torch.logspace(*(float(torch.tensor(end).log10()) for end in (first, last)), count)
    base, zero = free_scale(*problem.range, problem.args)
    scales = ratios.double().unsqueeze(-1) * torch.where(base > 0, base, 1.0)
    least, which = problem.error(scales, zero.round().expand_as(scales), 2).min(0)
    best = scales.gather(0, which.unsqueeze(0))[0]
    # Denormal numbers are far apart.
    part = (torch.full_like(best, problem.tiny) / best / 2).clamp(
        min=torch.finfo(problem.dtype).eps / 2
    )
    return (least.sqrt() + 1.1 * part * energy(problem).sqrt()).square()


def energy(problem: Problem) -> Tensor:
    """Sum of weight * (x / unit)^2 of each group."""
    x = torch.where(problem.x.isfinite(), problem.x, 0) / problem.unit.unsqueeze(-1)
    return (problem.weight * x.square()).sum(-1)


def code_bound(problem: Problem, plain: Tensor) -> Tensor:
    """The squared error of the best of all scale codes (NVFP4, MX)."""
    if is_mx(problem.args):
        scales = 2.0 ** torch.arange(-127, 128).double()
        scales = scales[scales.to(problem.dtype) == scales]  # others are no powers of two in it
    else:
        scales = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    scales = scales.unsqueeze(-1).expand(-1, len(plain))
    scales = torch.where(scales == 0, plain, scales)
    return problem.error(scales, torch.zeros_like(scales), 2).nan_to_num(torch.inf).amin(0)


def histogram_bound(problem: Problem) -> Tensor:
    """The squared error of the best of the extremes, times powers of two down to 2^-12."""
    ladder = 2.0 ** -torch.arange(0, 12.5, 0.5, dtype=torch.float64)
    pairs = torch.stack([ladder, ladder])
    if not problem.args.symmetric:
        pairs = torch.cartesian_prod(ladder, ladder).T
    ends = zip(problem.range, pairs, strict=True)
    lows, highs = (end * factor.unsqueeze(-1) for end, factor in ends)
    scale, zero = problem.stored(lows, highs)
    return torch.where(overflows(problem, scale), torch.inf, problem.error(scale, zero, 2)).amin(0)


def overflows(problem: Problem, scale: Tensor) -> Tensor:
    """Whether compressed-tensors dequantizes the largest value to Inf (NVFP4)."""
    if problem.global_scale is None:
        return torch.zeros_like(scale, dtype=torch.bool)
    largest = torch.maximum(-problem.range[0], problem.range[1]).float().expand_as(scale)
    args = problem.args.model_copy(update={"strategy": QuantizationStrategy.TOKEN})
    found = ct_fake_quantize(
        largest.unsqueeze(-1),
        scale.float().unsqueeze(-1),
        torch.zeros_like(largest).unsqueeze(-1),
        args,
        problem.global_scale,
    )
    return found.squeeze(-1).isinf()


def output_error(
    problem: Problem,
    scale: Tensor,
    zero_point: Tensor,
    rows: Tensor,
    cols: Tensor,
    seen: Tensor,
    *,
    single: bool = False,
) -> Tensor:
    """Of each group, sum over its rows of |inputs @ error|^2, in units of the group.

    Args:
        problem: The groups.
        scale: As stored, (groups,).
        zero_point: The same.
        rows: Row of each value, of the shape of `problem.x`; NaN behind the end of a group.
        cols: Its column.
        seen: Inputs, (tokens, columns).
        single: Round as `fake_quantize` does with it.
    """
    step = scale.double() if problem.global_scale is None else scale / problem.global_scale.double()
    unit = problem.unit
    x = torch.where(problem.x.isfinite(), problem.x, 0) / unit.unsqueeze(-1)
    behind = (step / unit).unsqueeze(-1), zero_point.double().unsqueeze(-1)
    errors = fake_quantize(x, *behind, problem.args, single=single) - x
    found = []
    for error, row, col in zip(errors, rows, cols, strict=True):
        there = row.isfinite()
        matrix = torch.zeros(int(row[there].max()) + 1, seen.shape[-1], dtype=torch.float64)
        matrix[row[there].long(), col[there].long()] = error[there]
        found.append((seen.double() @ matrix.T).square().sum())
    return torch.stack(found)
