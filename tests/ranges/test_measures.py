"""Measures of a sample against what the whole of a tensor tells."""

from __future__ import annotations

import math

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize, quantize
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

from calipers.grouping import group_values
from calipers.ranges.measures import (
    SAMPLE,
    measure_sample,
    plot_sample,
    sample_groups,
    scales_at_ends,
    sqnr_db,
)

INT4 = QuantizationArgs(num_bits=4, strategy="group", group_size=16)
ARGS = {
    "group": INT4,
    "channel": QuantizationArgs(num_bits=8, strategy="channel"),
    "tensor": QuantizationArgs(num_bits=8, type="float", strategy="tensor"),
    "block": QuantizationArgs(num_bits=8, type="float", strategy="block", block_structure=[16, 16]),
    "asymmetric": QuantizationArgs(num_bits=4, symmetric=False, strategy="group", group_size=16),
}


def qparams_of(weight, args, factor=1.0):
    """Scale and zero point of the range of each group, times a factor."""
    (view,) = group_values(weight, "weight", args)
    low, high = view.values.amin(view.reduce_dims), view.values.amax(view.reduce_dims)
    return calculate_qparams(low * factor, high * factor, args)


def sample_of(weight, args, factor=1.0, **options):
    scale, zero = qparams_of(weight, args, factor)
    views = group_values(weight, "weight", args)
    return sample_groups(views, scale, None if args.symmetric else zero, **options)


@pytest.mark.parametrize("name", ARGS)
def test_a_sample_of_all_values_tells_what_the_codes_are(name):
    torch.manual_seed(0)
    weight, args = torch.randn(64, 48), ARGS[name]
    scale, zero = qparams_of(weight, args, 0.7)
    codes = quantize(weight, scale, zero, args).float()
    back = fake_quantize(weight, scale, zero, args)
    found = measure_sample(sample_of(weight, args, 0.7), args)
    assert found.zeros == pytest.approx(float((back == 0).float().mean()), abs=1e-3)
    _, counts = codes.unique(return_counts=True)
    shares = counts / counts.sum()
    assert found.entropy == pytest.approx(float(-(shares * shares.log2()).sum()), abs=1e-2)
    # half of a step is the largest error of what is not clipped
    assert 0.001 < found.clipped < 0.25
    assert measure_sample(sample_of(weight, args), args).clipped == 0


@pytest.mark.parametrize("name", ARGS)
def test_a_large_tensor_is_sampled(name):
    torch.manual_seed(0)
    weight, args = torch.randn(1024, 512), ARGS[name]
    sample = sample_of(weight, args, 0.7)
    assert SAMPLE / 4 < len(sample.values) <= SAMPLE
    whole = measure_sample(sample_of(weight, args, 0.7, limit=weight.numel()), args)
    found = measure_sample(sample, args)
    assert found.zeros == pytest.approx(whole.zeros, abs=0.01)
    assert found.entropy == pytest.approx(whole.entropy, abs=0.02)
    assert found.clipped == pytest.approx(whole.clipped, abs=0.01)


def test_the_scale_of_each_value_is_that_of_its_group():
    weight = torch.arange(1.0, 5.0).repeat_interleave(16).view(2, 32).contiguous()
    sample = sample_of(weight, INT4)
    assert torch.equal(sample.scale, sample.values / 7.5)
    assert torch.equal(sample.high, sample.values)


def test_nothing_finite_is_no_sample():
    views = group_values(torch.full((2, 16), math.nan), "weight", INT4)
    assert sample_groups(views, torch.ones(2, 1), None) is None
    empty = group_values(torch.zeros(0, 16), "weight", INT4)
    assert sample_groups(empty, torch.ones(0, 1), None) is None


def test_a_weight_of_zeros_has_a_picture():
    views = group_values(torch.zeros(2, 16), "weight", INT4)
    plot = plot_sample(sample_groups(views, torch.ones(2, 1), None), INT4)
    assert sum(plot.histogram.counts) == 32
    assert (plot.curve, plot.chosen_factor) == (None, None)


def test_the_curve_is_least_where_a_search_would_go():
    torch.manual_seed(0)
    weight = torch.randn(256, 128) ** 3  # heavy tails: clipping pays
    args = QuantizationArgs(num_bits=4, strategy="channel")
    plot = plot_sample(sample_of(weight, args, 0.5), args)
    assert plot.chosen_factor == pytest.approx(0.5)
    curve = dict(zip(plot.curve.factor, plot.curve.error, strict=True))
    for factor in (0.5, 1.0):
        scale, zero = qparams_of(weight, args, factor)
        error = (weight - fake_quantize(weight, scale, zero, args)).norm() / weight.norm()
        assert curve[factor] == pytest.approx(float(error), rel=0.05)
    assert min(curve, key=curve.get) < 1.0
    assert sum(plot.histogram.counts) == weight.numel()
    assert -plot.range[0] == pytest.approx(plot.range[1] * 8 / 7)


def test_scales_at_the_ends_of_e4m3():
    args = QuantizationArgs(
        num_bits=4,
        type="float",
        strategy="tensor_group",
        group_size=16,
        scale_dtype=torch.float8_e4m3fn,
    )
    scales = torch.tensor([448.0, 448.0, 1.0, 2**-9])
    assert scales_at_ends(scales, args) == (0.5, 0.25)
    assert scales_at_ends(scales, INT4) is None


def test_nvfp4_divides_by_the_global_scale():
    torch.manual_seed(0)
    args = QuantizationArgs(
        num_bits=4,
        type="float",
        strategy="tensor_group",
        group_size=16,
        scale_dtype=torch.float8_e4m3fn,
        zp_dtype=torch.float8_e4m3fn,
    )
    weight = torch.randn(32, 64)
    shared = generate_gparam(weight.min(), weight.max())
    (view,) = group_values(weight, "weight", args)
    scale, zero = calculate_qparams(
        view.values.amin(2), view.values.amax(2), args, global_scale=shared
    )
    sample = sample_groups((view,), scale, None, shared)
    back = fake_quantize(weight, scale, zero, args, shared)
    found = measure_sample(sample, args)
    assert found.zeros == pytest.approx(float((back == 0).float().mean()), abs=2e-3)
    plot = plot_sample(sample, args)
    error = float((weight - back).norm() / weight.norm())
    curve = dict(zip(plot.curve.factor, plot.curve.error, strict=True))
    assert curve[1.0] == pytest.approx(error, rel=0.02)


def test_decibels():
    assert sqnr_db(0.01) == pytest.approx(20)
    assert sqnr_db(0.0) is None
    assert sqnr_db(math.nan) is None
    assert sqnr_db(math.inf) is None
