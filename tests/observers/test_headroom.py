"""The global scale of nvfp4_headroom: percentiles of block maxima, deaf to one freak."""

from __future__ import annotations

import math

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs

from calipers.observers import Observer
from calipers.ranges.block_maxima import NUM_BINS, count_block_maxima, largest_with_headroom

ARGS = QuantizationArgs(
    num_bits=4,
    type="float",
    strategy="tensor_group",
    group_size=16,
    scale_dtype=torch.float8_e4m3fn,
    dynamic="local",
)
#: The largest scale in E4M3 times the largest code: what a global scale is divided from.
TOP = 448 * 6


def build(**options: float) -> Observer:
    return Observer.load_from_registry("nvfp4_headroom", "input", ARGS, **options)


def block_maxima(value: torch.Tensor) -> torch.Tensor:
    return value.float().abs().unflatten(-1, (-1, 16)).amax(-1).flatten().sort().values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("low", "high", "headroom"),
    [(1, 99.99, 16384.0), (1, 99.99, 2.0), (50, 75, 1.0), (0, 100, 1.0), (100, 0, 3.0)],
)
def test_the_percentiles_are_those_of_the_sorted_maxima(
    dtype: torch.dtype, low: float, high: float, headroom: float
) -> None:
    torch.manual_seed(0)
    value = (torch.randn(64, 512) * torch.randn(64, 1).exp()).to(dtype)
    observer = build(low=low, high=high, headroom=headroom)
    for batch in value.split(16):
        observer.observe_global(batch)
    ordered = block_maxima(value)
    at_low, at_high = (
        float(ordered[max(1, math.ceil(ordered.numel() * percentile / 100)) - 1])
        for percentile in (low, high)
    )
    found = TOP / float(observer.get_global_scale())
    # A bin is a sixteenth of an octave wide: `low` is rounded down in it, `high` up.
    assert (
        max(at_low * headroom, at_high) / 1.063 <= found <= max(at_low * headroom, at_high) * 1.07
    )


def test_one_freak_among_many_blocks_changes_little() -> None:
    torch.manual_seed(0)
    value = torch.randn(1024, 512)
    observer, extremes = build(), Observer.load_from_registry("static_minmax", "input", ARGS)
    observer.observe_global(value)
    before = float(observer.get_global_scale())
    value[3, 5] = 1e9
    observer.reset()
    for each in (observer, extremes):
        each.observe_global(value)
    assert float(observer.get_global_scale()) == before
    # By the extremes the scales of ordinary blocks round to zero in E4M3.
    local = value[0].abs().unflatten(-1, (-1, 16)).amax(-1) / 6
    assert not (local * extremes.get_global_scale()).to(torch.float8_e4m3fn).float().any()
    assert (local * before).to(torch.float8_e4m3fn).float().all()


def test_there_is_room_for_larger_values_than_any_seen() -> None:
    torch.manual_seed(0)
    value = torch.rand(64, 512) + 0.5
    observer = build()
    observer.observe_global(value)
    # The smallest block maximum, times what E4M3 spans above its normal numbers.
    assert TOP / float(observer.get_global_scale()) > 1000 * float(value.max())


def test_zeros_nan_and_short_blocks() -> None:
    value = torch.zeros(4, 40)
    value[0, 0], value[1, 39], value[2, 3] = 1.0, -3.0, torch.nan
    counts = count_block_maxima(value, 16)
    assert counts.shape == (NUM_BINS,)
    assert int(counts.sum()) == 2
    observer = build(headroom=1.0)
    observer.observe_global(value)
    assert TOP / float(observer.get_global_scale()) == pytest.approx(3.0)
    assert observer.num_nonfinite == 1
    observer.reset()
    observer.observe_global(torch.zeros(4, 40))
    assert math.isfinite(float(observer.get_global_scale()))


@pytest.mark.parametrize("size", [1e-44, 1e-38, 1.0, 65504.0, 3e38])
def test_every_size_of_float32_has_a_bin(size: float) -> None:
    value = torch.full((2, 16), size)
    largest = value.max().reshape(1)
    counts = count_block_maxima(value, 16)
    found = largest_with_headroom(counts, largest, low=0, high=100, headroom=1.0)
    assert int(counts.sum()) == 2
    assert float(found) == pytest.approx(float(largest))


def test_merged_and_saved_counts_are_those_of_all_batches() -> None:
    torch.manual_seed(0)
    batches = [torch.randn(8, 64) * scale for scale in (1.0, 5.0, 0.1)]
    whole, first, second = build(), build(), build()
    for batch in batches:
        whole.observe_global(batch)
    first.observe_global(batches[0])
    for batch in batches[1:]:
        second.observe_global(batch)
    first.merge(second)
    loaded = build()
    loaded.load_state(first.state())
    assert torch.equal(loaded.get_global_scale(), whole.get_global_scale())
    state = first.state()
    del state["block_maxima"]
    with pytest.raises(ValueError, match="block_maxima is missing"):
        build().load_state(state)
