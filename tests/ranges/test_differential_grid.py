"""The grid family against a plain float32 evaluation of the grid: the same step in every group."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from hypothesis import assume, currently_in_test_context, given
from hypothesis import strategies as st
from torch import Tensor, nn

from calipers import grouping
from calipers.observers import Observer
from observers.samples import assert_same
from ranges import brute_force
from ranges.strategies import MX, NVFP4, arguments, group_indices, modest, weights

MSE: dict[str, Any] = {"maxshrink": 0.20, "patience": 5, "grid": 100, "norm": 2.4}
IMATRIX: dict[str, Any] = {"maxshrink": 0.95, "patience": 5, "grid": 20, "norm": 3.0}
EXPANDED = {"expand": 1.8, "maxshrink": 1 - 0.8 / 1.8, "grid": 200, "patience": 1000}


def check(
    name: str,
    value: Tensor,
    args: QuantizationArgs,
    options: dict[str, Any],
    *,
    g_idx: Tensor | None = None,
    energy: Tensor | None = None,
    include_end: bool = False,
    given_options: dict[str, Any] | None = None,
) -> brute_force.Found:
    """The observer's scales are those of the brute force.

    Where an error is tied with the best up to the rounding of its sum, a float32 evaluation may
    decide either way, and the example is dropped.
    """
    masks = brute_force.groups_of(value, args, g_idx)
    importance = None
    if energy is not None:
        spread = (energy / energy.mean()).expand(value.shape)
        importance = [spread[mask] for mask in masks]
    module = nn.Linear(value.shape[1], value.shape[0], bias=False)
    global_scale = None
    if args.strategy == "tensor_group":
        expand = options.get("expand", 1.0)
        global_scale = generate_gparam(value.amin().float() * expand, value.amax().float() * expand)
        module.register_buffer("weight_global_scale", global_scale)
    found = brute_force.search(
        [value[mask] for mask in masks],
        args,
        **options,
        include_end=include_end,
        importance=importance,
        global_scale=global_scale,
    )
    if currently_in_test_context():
        assume(not found.close)
    assert not found.close, "this example cannot tell: choose another"
    shape = brute_force.qparam_shape(value, args)
    low, high = (brute_force.cast(t, value.dtype).reshape(shape) for t in (found.low, found.high))
    expected = calculate_qparams(low, high, args, global_scale=global_scale)
    given_options = options if given_options is None else given_options
    observer = Observer.load_from_registry(name, "weight", args, module, **given_options)
    if energy is not None:
        observer.attach(module)
        module(energy.sqrt() * torch.ones(3, 1))
        observer.detach(module)
    assert_same(observer(value, g_idx), expected)
    return found


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouping, "CPU_CHUNK", 16)


@modest(100)
@given(st.data(), arguments(), weights(rows=3, cols=40))
def test_memoryless_mse(data: st.DataObject, args: QuantizationArgs, value: Tensor) -> None:
    options = {
        "maxshrink": data.draw(st.sampled_from([0.2, 0.5, 0.8])),
        "grid": data.draw(st.sampled_from([8, 20, 33.0])),
        "patience": data.draw(st.sampled_from([1, 2, 5, 1000])),
        "norm": data.draw(st.sampled_from([1.0, 2.0, 2.4, 3.5])),
        "expand": data.draw(st.sampled_from([1.0, 1.3])),
    }
    g_idx = None
    if args.group_size:
        g_idx = data.draw(group_indices(value.shape[1], args.group_size))
    check("memoryless_mse", value, args, options, g_idx=g_idx)


@modest(60)
@given(st.data(), arguments(), weights(rows=3, cols=40))
def test_imatrix_mse(data: st.DataObject, args: QuantizationArgs, value: Tensor) -> None:
    """imatrix_mse weighs by E[x^2] / mean(E[x^2]); its grid holds the end point."""
    options = {
        "maxshrink": data.draw(st.sampled_from([0.02, 0.5, 0.95])),
        "grid": data.draw(st.sampled_from([8, 20])),
        "patience": data.draw(st.sampled_from([1, 5])),
        "norm": data.draw(st.sampled_from([2.0, 3.0])),
    }
    g_idx = None
    if args.group_size:
        g_idx = data.draw(group_indices(value.shape[1], args.group_size))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    # Whole numbers squared: every order of summation gives the same E[x^2].
    energy = torch.randint(1, 12, (value.shape[1],), generator=generator).float().square()
    check("imatrix_mse", value, args, options, g_idx=g_idx, energy=energy, include_end=True)


SMALL_CASES = [
    QuantizationArgs(num_bits=4, strategy="tensor"),
    QuantizationArgs(num_bits=3, strategy="channel", symmetric=False),
    QuantizationArgs(num_bits=4, strategy="group", group_size=24),
    QuantizationArgs(num_bits=4, strategy="block", block_structure=[4, 24]),
    QuantizationArgs(num_bits=8, type="float", strategy="channel"),
    QuantizationArgs(**NVFP4),
    QuantizationArgs(**MX, num_bits=4),
]


def fixed(rows: int = 6, cols: int = 70, seed: int = 0) -> Tensor:
    value = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))
    return torch.where(value.abs() > 1.7, value * 2, value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("args", SMALL_CASES, ids=lambda a: f"{a.strategy}-{a.num_bits}")
@pytest.mark.usefixtures("small_pieces")
def test_several_pieces(args: QuantizationArgs, dtype: torch.dtype) -> None:
    found = check("memoryless_mse", fixed().to(dtype), args, {**MSE, "grid": 50})
    assert max(found.steps) > 0, "this example cannot tell"
    energy = torch.arange(1, 71).square().flip(0).float()
    check("imatrix_mse", fixed().to(dtype), args, IMATRIX, energy=energy, include_end=True)


@pytest.mark.parametrize(
    ("name", "options", "include_end"),
    [
        ("memoryless_mse", MSE, False),
        ("nvfp4_expanded_mse", {**EXPANDED, "norm": 2.4}, False),
        ("imatrix_mse", IMATRIX, True),
        ("nvfp4_expanded_imatrix", {**EXPANDED, "norm": 2.4}, True),
    ],
)
@pytest.mark.parametrize(
    "args",
    [QuantizationArgs(**NVFP4), QuantizationArgs(num_bits=4, strategy="channel")],
    ids=["nvfp4", "int4"],
)
def test_default_options(
    name: str, options: dict[str, Any], include_end: bool, args: QuantizationArgs
) -> None:
    energy = torch.arange(1, 33).square().float() if "imatrix" in name else None
    found = check(
        name,
        fixed(4, 32),
        args,
        options,
        energy=energy,
        include_end=include_end,
        given_options={},
    )
    assert max(found.steps) > 0, "this example cannot tell"


def test_patience_counts_over_all_groups_and_views(small_pieces: None) -> None:
    """A group that gains late keeps the search of all others alive, in every view and piece."""
    args = QuantizationArgs(num_bits=4, strategy="group", group_size=16)
    options = {"maxshrink": 0.9, "grid": 50, "norm": 2.4, "patience": 3}
    value = fixed(4, 40, seed=2)
    together = check("memoryless_mse", value, args, options)
    alone = [
        check("memoryless_mse", group.reshape(1, -1), args, options).steps[0]
        for row in value
        for group in row.split(16)
    ]
    assert together.steps != alone, "this example cannot tell"


def test_half_precision_neither_overflows_nor_rounds_errors() -> None:
    """Squares of large float16 values, and sums of many small ones, in float32."""
    args = QuantizationArgs(num_bits=4, strategy="channel")
    for dtype, factor in ((torch.float16, 4000.0), (torch.bfloat16, 1e-3)):
        value = (fixed(3, 600) * factor).clamp(-60000, 60000).to(dtype)
        found = check("memoryless_mse", value, args, MSE)
        assert max(found.steps) > 0


def test_expanded_float16_range_stays_finite() -> None:
    """1.8 times the largest float16 is no float16: the range ends at the largest."""
    args = QuantizationArgs(num_bits=4, strategy="channel")
    value = (fixed(3, 64) * 1e4).to(torch.float16).clamp(-65504, 65504)
    value[:, 0] = 65504
    scale = Observer.load_from_registry("nvfp4_expanded_mse", args)(value)[0]
    assert scale.isfinite().all()


def test_moving_average_mse_averages_the_searched_ranges() -> None:
    args = QuantizationArgs(num_bits=4, strategy="group", group_size=16)
    batches = [fixed(3, 32, seed) * (seed + 1) for seed in range(4)]
    observer = Observer.load_from_registry("mse", args, averaging_constant=0.3)
    low = high = None
    for batch in batches:
        found = brute_force.search(
            [batch[m] for m in brute_force.groups_of(batch, args)], args, **MSE
        )
        if low is None:
            low, high = found.low, found.high
        else:
            low = low * (1 - 0.3) + found.low * 0.3
            high = high * (1 - 0.3) + found.high * 0.3
        result = observer(batch)
    assert_same(result, calculate_qparams(low.reshape(3, 2), high.reshape(3, 2), args))


def test_candidates_of_nvfp4_are_rounded_as_stored() -> None:
    """Local scales are rounded to float8: under another global scale other steps win."""
    args = QuantizationArgs(**NVFP4)
    value = fixed(4, 64)
    steps = []
    for factor in (1.0, 1.06):
        module = nn.Module()
        module.weight_global_scale = generate_gparam(value.amin(), value.amax()) / factor
        found = brute_force.search(
            [value[m] for m in brute_force.groups_of(value, args)],
            args,
            **MSE,
            global_scale=module.weight_global_scale,
        )
        observer = Observer.load_from_registry("memoryless_mse", "weight", args, module)
        expected = calculate_qparams(
            found.low.reshape(4, 4), found.high.reshape(4, 4), args, module.weight_global_scale
        )
        assert_same(observer(value), expected)
        steps.append(found.steps)
    assert steps[0] != steps[1], "this example cannot tell"


@pytest.mark.slow
@modest(800)
@given(st.data(), arguments(), weights(rows=5, cols=100))
def test_memoryless_mse_at_length(
    data: st.DataObject, args: QuantizationArgs, value: Tensor
) -> None:
    g_idx = None
    if args.group_size:
        g_idx = data.draw(group_indices(value.shape[1], args.group_size))
    norm, expand = data.draw(st.sampled_from([(2.4, 1.0), (2.0, 1.8), (3.0, 1.0)]))
    check(
        "memoryless_mse",
        value,
        args,
        {**MSE, "maxshrink": 0.5, "norm": norm, "expand": expand},
        g_idx=g_idx,
    )
