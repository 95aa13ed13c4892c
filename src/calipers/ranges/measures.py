"""What quantization does to the values of a tensor, from a sample of its groups."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor

from calipers.formats import E4M3, Format, has_mx_scales
from calipers.grouping import Groups

__all__ = [
    "Bins",
    "Curve",
    "GroupSample",
    "Plot",
    "ValueMeasures",
    "measure_sample",
    "plot_sample",
    "sample_groups",
    "scales_at_ends",
    "sqnr_db",
]

#: Values of a sample, at most, but for a group that is larger.
SAMPLE = 2**16
#: Of these, values that the candidates of a curve are tried on.
CURVE_SAMPLE = 2**14
#: Of these, values whose scales are looked at for the middle one.
MIDDLE_SAMPLE = 2**12
#: Factors of the full range that a curve has.
FACTORS = tuple(round(0.25 + 0.05 * step, 2) for step in range(18))
FACTORS_AT_ONCE = 3
BINS = 64
#: What bfloat16 rounds off a scale: a value that lies so much above the last code is not clipped.
_SLACK = 2.0**-8
#: The smallest E4M3 above zero.
_LEAST_E4M3 = float(E4M3.positive_codes()[0])


@dataclass(frozen=True)
class GroupSample:
    """Some values of a tensor with what their groups have in common; all float32, shape (n,).

    Args:
        values: The values, finite.
        scale: Units of a code, the global scale divided out; not 0.
        zero_point: Code of 0.0; None where there is none.
        low: Smallest value of the group, at most 0.
        high: Largest value of the group, at least 0.
        global_scale: Of the tensor; None where there is none.
    """

    values: Tensor
    scale: Tensor
    zero_point: Tensor | None
    low: Tensor
    high: Tensor
    global_scale: float | None = None


@dataclass(frozen=True)
class ValueMeasures:
    """How the values of a tensor fare.

    Attributes:
        clipped: Share of values beyond the last code by more than half of its step.
        zeros: Share of values whose code stands for 0.
        entropy: Bits of the distribution of codes, at most the bits of a code.
    """

    clipped: float
    zeros: float
    entropy: float


@dataclass(frozen=True)
class Bins:
    """Counts of values in bins of one width.

    Attributes:
        low: Lower end of the first bin.
        high: Upper end of the last bin.
        counts: Values of each bin.
    """

    low: float
    high: float
    counts: list[int]


@dataclass(frozen=True)
class Curve:
    """The error of candidates of a range.

    Attributes:
        factor: By what the full range of each group is multiplied.
        error: Relative error ||x - fakequant(x)|| / ||x|| of each factor.
    """

    factor: list[float]
    error: list[float]


@dataclass(frozen=True)
class Plot:
    """What a picture of a tensor and its range needs.

    Attributes:
        histogram: Of the values.
        range: Minimum and maximum that the codes reach, of the group of the middle scale.
        curve: None where scales are powers of two (MX), which no factor moves by a little.
        chosen_factor: Chosen scale over that of the full range, of the middle group.
    """

    histogram: Bins
    range: tuple[float, float]
    curve: Curve | None
    chosen_factor: float | None


def sample_groups(
    views: Sequence[Groups],
    scale: Tensor,
    zero_point: Tensor | None,
    global_scale: Tensor | None = None,
    *,
    limit: int = SAMPLE,
) -> GroupSample | None:
    """Values of groups that are evenly spread over a tensor.

    Args:
        views: The groups of the tensor.
        scale: As stored, of the tensor's qparam shape.
        zero_point: Of the same shape; None where there is none.
        global_scale: What the scale was multiplied by, shape (1,); None for nothing.
        limit: Most values, but for one group of each view that is larger.

    Returns:
        The sample; None where no value of it is finite, or no scale usable.
    """
    total = sum(math.prod(view.shape) for view in views)
    scale = scale.float()
    if global_scale is not None:
        scale = scale / global_scale.to(scale.device).float()
    parts: list[tuple[Tensor, ...]] = []
    for view in views:
        size = math.prod(view.shape)
        if size == 0:
            continue
        own = max(1, limit * size // total)
        zeros = torch.zeros_like(scale) if zero_point is None else zero_point.float()
        parts.append(_part_of(view, (scale, zeros), own))
    if not parts:
        return None
    values, steps, zeros, low, high = (torch.cat(each) for each in zip(*parts, strict=True))
    usable = values.isfinite() & steps.isfinite() & (steps != 0) & low.isfinite() & high.isfinite()
    if not bool(usable.any()):
        return None
    if not bool(usable.all()):
        values, steps, zeros, low, high = (x[usable] for x in (values, steps, zeros, low, high))
    return GroupSample(
        values,
        steps,
        None if zero_point is None else zeros,
        low,
        high,
        None if global_scale is None else float(global_scale),
    )


def _part_of(view: Groups, qparams: tuple[Tensor, Tensor], limit: int) -> tuple[Tensor, ...]:
    """Values, scales, zero points, minimum and maximum, each of shape (n,), of one view."""
    size = view.group_size
    first, *rest = view.kept_dims
    wanted = max(1, limit // max(1, size))
    inner = math.prod(view.shape[dim] for dim in rest)
    step = max(1, view.shape[first] // max(1, math.ceil(wanted / max(1, inner))))
    # columns are gathered behind the first kept dimension, which exists before in any case
    taken = Groups(
        view.values[(slice(None),) * first + (slice(None, None, step),)],
        view.reduce_dims,
        columns=view.columns,
    ).gathered()
    groups = taken.permute(*view.kept_dims, *view.reduce_dims).reshape(-1, size)
    own = [each[view.where].reshape(view.qparam_shape)[::step].reshape(-1) for each in qparams]
    again = max(1, len(groups) // wanted)
    groups, own = groups[::again], [each[::again] for each in own]
    low, high = groups.amin(1), groups.amax(1)
    if not bool((low.isfinite() & high.isfinite()).all()):
        finite = groups.nan_to_num(0.0, 0.0, 0.0)
        low, high = finite.amin(1), finite.amax(1)
    low, high = low.clamp(max=0).float(), high.clamp(min=0).float()
    stride = max(1, size * len(groups) // limit)
    if stride > 1:
        groups = groups[:, ::stride]
    count = groups.shape[1]
    columns = (each.unsqueeze(1).expand(-1, count).reshape(-1) for each in (*own, low, high))
    return (groups.float().reshape(-1), *columns)


def measure_sample(sample: GroupSample, args: QuantizationArgs) -> ValueMeasures:
    """Shares of clipped values and of zeros, and the entropy of codes.

    Example:
        Codes of -8 to 7, of which four occur; 2 is beyond the last one:

        >>> from calipers.grouping import group_values
        >>> args = QuantizationArgs(num_bits=4, strategy="tensor")
        >>> x = torch.tensor([0.0, 0.01, -0.8, 2.0])
        >>> sample = sample_groups(group_values(x, "input", args), torch.tensor([0.1]), None)
        >>> measure_sample(sample, args)
        ValueMeasures(clipped=0.25, zeros=0.5, entropy=1.5)
    """
    codes = Format.of(args)
    scaled = sample.values / sample.scale
    zero = sample.zero_point
    half_step = codes.largest_error * (codes.width / 2 if codes.integer else codes.high)
    shifted = scaled if zero is None else scaled + zero
    reach = half_step + _SLACK * codes.high
    beyond = (shifted > codes.high + reach) | (shifted < codes.low - reach)
    rounded = codes.round(scaled, zero)
    counts = _count_codes(rounded if zero is None else rounded + zero)
    shares = counts.double() / counts.sum()
    return ValueMeasures(
        clipped=float(beyond.float().mean()),
        zeros=float((rounded == 0).float().mean()),
        entropy=max(0.0, float(-(shares * shares.log2()).sum())),
    )


def _count_codes(codes: Tensor) -> Tensor:
    """How often each code occurs, of those that do."""
    # Every code of every format is a bfloat16, zeros of both signs one and the same.
    bits = (codes + 0.0).to(torch.bfloat16).view(torch.int16).long() + 2**15
    counts = torch.bincount(bits, minlength=2**16)
    return counts[counts > 0]


def scales_at_ends(scale: Tensor, args: QuantizationArgs) -> tuple[float, float] | None:
    """Shares of stored scales at the top of E4M3, and of those at or below its smallest code.

    None where scales are not stored as E4M3, or there are none.
    """
    if args.scale_dtype != torch.float8_e4m3fn or not scale.numel():
        return None
    sizes = scale.float().abs()
    top, bottom = (sizes >= E4M3.high).float().mean(), (sizes <= _LEAST_E4M3).float().mean()
    return float(top), float(bottom)


def sqnr_db(error: float) -> float | None:
    """Signal over noise in dB of a relative squared error; None where that is 0 or no number."""
    return -10 * math.log10(error) if 0 < error < math.inf else None


def plot_sample(sample: GroupSample, args: QuantizationArgs) -> Plot:
    """The histogram of a sample, its middle range, and the error over the factor of the range."""
    codes = Format.of(args)
    few = slice(None, None, max(1, len(sample.scale) // MIDDLE_SAMPLE))
    scales = sample.scale[few]
    middle = int(scales.abs().kthvalue(len(scales) // 2 + 1).indices)
    step = float(scales[middle])
    zero = 0.0 if sample.zero_point is None else float(sample.zero_point[few][middle])
    ends = sorted(((codes.low - zero) * step, (codes.high - zero) * step))
    full = _full_scale(sample, codes)[few]
    factors = (scales.abs() / full)[full > 0]
    return Plot(
        histogram=_histogram(sample.values),
        range=(ends[0], ends[1]),
        curve=None if has_mx_scales(args) else _curve(sample, codes),
        chosen_factor=float(factors.median()) if len(factors) else None,
    )


def _histogram(values: Tensor) -> Bins:
    low, high = float(values.min()), float(values.max())
    if low == high:  # one bin, of some width
        low, high = low - abs(low) / 2, high + abs(high) / 2
    counts = torch.histc(values, BINS, low, high) if low < high else values.new_zeros(BINS)
    if low == high:
        counts[BINS // 2] = len(values)
    return Bins(low, high, counts.int().tolist())


def _full_scale(sample: GroupSample, codes: Format) -> Tensor:
    """The scale by which the codes reach the ends of each group."""
    if sample.zero_point is not None and bool((sample.zero_point != 0).any()):
        return (sample.high - sample.low) / codes.width
    largest = torch.maximum(sample.high, -sample.low)
    return largest / (codes.width / 2)


def _curve(sample: GroupSample, codes: Format) -> Curve | None:
    stride = max(1, len(sample.values) // CURVE_SAMPLE)
    values, low = sample.values[::stride], sample.low[::stride]
    full = _full_scale(sample, codes)[::stride]
    total = float(values.double().square().sum())
    if total == 0:
        return None
    asymmetric = sample.zero_point is not None and bool((sample.zero_point != 0).any())
    squared: list[float] = []
    # a few at a time: more of them would be larger than a small tensor
    for first in range(0, len(FACTORS), FACTORS_AT_ONCE):
        some = FACTORS[first : first + FACTORS_AT_ONCE]
        factors = torch.tensor(some, dtype=torch.float32, device=full.device).unsqueeze(1)
        scale = full * factors
        if sample.global_scale is not None:
            stored = (scale * sample.global_scale).clamp(max=E4M3.high)
            scale = stored.to(torch.float8_e4m3fn).float() / sample.global_scale
        scale.clamp_(min=torch.finfo(torch.float32).tiny)
        zero = None
        if asymmetric:
            zero = (codes.low - low * factors / scale).round().clamp(codes.low, codes.high)
        error = values - codes.round(values / scale, zero) * scale
        squared += error.square_().sum(1, dtype=torch.float64).tolist()
    return Curve(list(FACTORS), [round(math.sqrt(each / total), 6) for each in squared])
