"""Histograms over bit patterns: what is counted, and which range is found in them."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams
from torch import Tensor

from calipers.ranges import (
    Groups,
    Histogram,
    count_patterns,
    percentile_range,
    search_histogram_range,
)

HALVES = [torch.bfloat16, torch.float16]
FORMATS = {
    "int8": {"num_bits": 8},
    "int4": {"num_bits": 4},
    "int8-asymmetric": {"num_bits": 8, "symmetric": False},
    "int4-asymmetric": {"num_bits": 4, "symmetric": False},
    "fp8": {"num_bits": 8, "type": "float"},
    "fp4": {"num_bits": 4, "type": "float"},
}


def view_of(values: Tensor) -> Groups:
    """Each row has a scale of its own."""
    return Groups(values, (1,))


def sample(rows: int = 1, count: int = 20000, seed: int = 0, dtype: torch.dtype = torch.float32):
    """Values of several widths with a few outliers, skewed to the positive side."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, count, generator=generator, dtype=torch.float64)
    values *= torch.linspace(0.3, 2, count, dtype=torch.float64)
    values = torch.where(torch.rand(rows, count, generator=generator) < 1e-3, values * 15, values)
    return torch.where(values < 0, values * 0.4, values).to(dtype)


def squared_error(values: Tensor, scale: Tensor, zero_point: Tensor, args: QuantizationArgs):
    """For each of several scales the error of one row of values, float64."""
    token_args = args.model_copy(update={"strategy": "token"})
    errors = []
    for s, z in zip(scale.float().split(16), zero_point.split(16), strict=True):
        rounded = fake_quantize(values.float()[None], s[:, None], z[:, None], token_args)
        errors.append((rounded.double() - values.double()).square().sum(-1))
    return torch.cat(errors)


def smallest_error(values: Tensor, args: QuantizationArgs, dtype: torch.dtype) -> Tensor:
    """By trying scales all over, rounded to `dtype`, with every zero point near the likely one."""
    low, high = values.min().float(), values.max().float()
    bits = args.num_bits
    if args.symmetric:
        shrink = torch.cat([torch.logspace(-2, 0.1, 600), torch.linspace(0.5, 1.05, 200)])
        scales, zeros = calculate_qparams(low * shrink, high * shrink, args)
        scales = scales.to(dtype)
    else:
        shrink = torch.logspace(-1.2, 0.05, 48)
        scales = ((high - low) / (2**bits - 1) * shrink).to(dtype).float()
        likely = (-(2 ** (bits - 1)) - low * shrink / scales).round()
        near = torch.arange(-24, 25, 1 if bits == 4 else 4)
        zeros = (likely[:, None] + near).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        scales = scales[:, None].expand_as(zeros).flatten()
        zeros = zeros.flatten().to(torch.int8)
    errors = squared_error(values, scales, zeros, args)
    best = errors.argsort()[:3]
    for i in best.tolist():
        finer = (scales[i].float() * torch.linspace(0.99, 1.01, 81)).to(dtype)
        near = [0.0] if args.symmetric else [-1.0, 0.0, 1.0]
        for each in (zeros[i].float() + torch.tensor(near)).to(zeros.dtype):
            more = squared_error(values, finer, each.expand(len(finer)), args)
            errors = torch.cat([errors, more])
    return errors.min()


# -- counting --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_pattern_is_counted_as_itself(dtype: torch.dtype) -> None:
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = patterns.view(dtype)
    finite = values[values.isfinite()]
    histogram = count_patterns(view_of(torch.cat([values, finite])[None]))
    assert histogram.counts.sum() == 2 * len(finite)
    points, weights = histogram.points()
    assert torch.equal(weights, torch.full_like(weights, 2))
    assert torch.equal(points.flatten().sort().values, finite.float().sort().values)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64], ids=str)
def test_counts_add_up_over_any_split(dtype: torch.dtype) -> None:
    values = sample(3, 400, dtype=dtype)
    values[0, 5], values[2, 7] = torch.nan, -torch.inf
    whole = count_patterns(view_of(values))
    first, second = (count_patterns(view_of(part)) for part in values.split(150, dim=1)[:2])
    third = count_patterns(view_of(values[:, 300:]))
    assert torch.equal(whole.counts, first.counts + second.counts + third.counts)
    assert whole.counts.sum(-1).tolist() == [399, 400, 399]
    if whole.offsets is not None:
        assert torch.equal(whole.offsets, first.offsets + second.offsets + third.offsets)


def test_pieces_do_not_show() -> None:
    """More values than one piece of a pass holds, in rows that are not in memory order."""
    values = sample(40, 20000, dtype=torch.bfloat16)
    histogram = count_patterns(view_of(values.t().contiguous().t()))
    for row in (0, 17, 39):
        alone = count_patterns(view_of(values[row : row + 1]))
        assert torch.equal(histogram.counts[row], alone.counts[0])


def test_mean_of_a_float32_bin_is_exact_and_spread_stays_within_it() -> None:
    values = 1 + torch.rand(1, 5000, generator=torch.Generator().manual_seed(1)) / 128
    histogram = count_patterns(view_of(values))
    points, weights = histogram.points()
    assert points.shape == weights.shape == (1, 2)
    assert points.min() >= 1
    assert points.max() < 1 + 1 / 128
    torch.testing.assert_close((points.double() * weights).sum() / 5000, values.double().mean())
    # The variance is that of an even spread, which these values have.
    variance = (points[0, 1] - points[0, 0]) ** 2 / 4
    torch.testing.assert_close(variance, values.var(), rtol=0.05, atol=0)


def test_integers_are_exact_in_float32() -> None:
    values = torch.arange(-256.0, 257)
    points, weights = count_patterns(view_of(values[None])).points()
    assert torch.equal(points.unique(), values)
    assert weights.sum() == 513


# -- ranges ----------------------------------------------------------------------------------


@pytest.mark.parametrize("percentile", [50, 99, 99.9, 100])
def test_percentile_is_a_size_that_so_many_values_do_not_exceed(percentile: float) -> None:
    values = sample(2, 3000, dtype=torch.bfloat16)
    low, high = values.amin(-1), values.amax(-1)
    found_low, found_high = percentile_range(count_patterns(view_of(values)), low, high, percentile)
    needed = round(3000 * percentile / 100)
    limit = values.abs().sort(-1).values[:, needed - 1]
    assert torch.equal(found_high, torch.minimum(high, limit))
    assert torch.equal(found_low, torch.maximum(low, -limit))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", FORMATS)
def test_range_against_dense_search(kind: str, dtype: torch.dtype) -> None:
    args = QuantizationArgs(strategy="tensor", **FORMATS[kind])
    values = sample(dtype=dtype)
    low, high = values.amin(-1), values.amax(-1)
    found = search_histogram_range(count_patterns(view_of(values)), low, high, args, dtype)
    error = squared_error(values[0], *calculate_qparams(*found, args), args)
    # Float32 is judged on the values themselves: the error of its bins is within this bound.
    assert error <= smallest_error(values[0], args, dtype) * 1.003
    assert error < squared_error(values[0], *calculate_qparams(low, high, args), args) * 0.97


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", FORMATS)
def test_never_worse_than_the_extremes(kind: str, dtype: torch.dtype) -> None:
    args = QuantizationArgs(strategy="tensor", **FORMATS[kind])
    for seed in range(6):
        values = sample(4, 5 + 10 * seed, seed, dtype)
        low, high = values.amin(-1), values.amax(-1)
        found = search_histogram_range(count_patterns(view_of(values)), low, high, args, dtype)
        pairs = zip(*calculate_qparams(*found, args), strict=True)
        plain = zip(*calculate_qparams(low, high, args), strict=True)
        for row, ours, theirs in zip(values, pairs, plain, strict=True):
            error = squared_error(row, *(t[None] for t in ours), args)
            # Results of the search may differ in the last bits of a sum.
            assert error <= squared_error(row, *(t[None] for t in theirs), args) * (1 + 1e-6)


def test_each_qparam_is_searched_by_itself() -> None:
    args = QuantizationArgs(num_bits=4, strategy="channel")
    values = sample(70, 300, dtype=torch.float32)
    low, high = values.amin(-1), values.amax(-1)
    found = search_histogram_range(count_patterns(view_of(values)), low, high, args, low.dtype)
    for row in (0, 31, 32, 69):
        some = slice(row, row + 1)
        alone = search_histogram_range(
            count_patterns(view_of(values[some])), low[some], high[some], args, low.dtype
        )
        assert torch.equal(found[0][some], alone[0])
        assert torch.equal(found[1][some], alone[1])


def test_a_rare_huge_outlier_is_given_up() -> None:
    """The best range may lie many octaves below the largest value."""
    values = torch.randn(1, 200, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    histogram = count_patterns(view_of(values))
    counts = histogram.counts * 10**8
    low, high = values.amin(-1), torch.tensor([1000.0], dtype=torch.bfloat16)
    counts[0, int(high.view(torch.int16))] = 1
    args = QuantizationArgs(num_bits=4, strategy="tensor")
    pooled = Histogram(counts, None, torch.bfloat16)
    found_low, found_high = search_histogram_range(pooled, low, high, args, torch.bfloat16)
    scale, _ = calculate_qparams(found_low, found_high, args)
    plain = search_histogram_range(histogram, low, values.amax(-1), args, torch.bfloat16)
    torch.testing.assert_close(scale, calculate_qparams(*plain, args)[0], rtol=0.01, atol=0)


def test_nothing_and_zeros_keep_their_extremes() -> None:
    args = QuantizationArgs(num_bits=8, strategy="channel")
    values = torch.stack([torch.zeros(4), torch.full((4,), torch.nan), torch.ones(4)])
    low = torch.tensor([0.0, torch.inf, 1.0])
    high = torch.tensor([0.0, -torch.inf, 1.0])
    histogram = count_patterns(view_of(values))
    found_low, found_high = search_histogram_range(histogram, low, high, args, torch.float32)
    assert torch.equal(found_low[:2], low[:2])
    assert torch.equal(found_high[:2], high[:2])
    scale, zero_point = calculate_qparams(found_low[2:], found_high[2:], args)
    assert squared_error(values[2], scale, zero_point, args) < 1e-6
