"""The min/max family against compressed-tensors' `calculate_qparams`, bit for bit."""

from __future__ import annotations

import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from calipers.observers import Observer
from observers.samples import assert_same
from ranges.brute_force import groups_of, qparam_shape
from ranges.strategies import arguments, group_indices, modest, weights

Range = tuple[Tensor, Tensor]


def extremes(value: Tensor, args: QuantizationArgs, g_idx: Tensor | None = None) -> Range:
    """Minimum and maximum by loops over the groups, in the dtype of the values."""
    groups = [value[mask] for mask in groups_of(value, args, g_idx)]
    shape = qparam_shape(value, args)
    low = torch.stack([group.amin() for group in groups]).reshape(shape)
    high = torch.stack([group.amax() for group in groups]).reshape(shape)
    return low, high


def holder(args: QuantizationArgs, value: Tensor) -> tuple[nn.Module, Tensor | None]:
    module = nn.Module()
    if args.strategy != "tensor_group":
        return module, None
    scale = generate_gparam(value.amin(), value.amax())
    module.weight_global_scale = scale
    return module, scale


@modest(250)
@given(st.data(), arguments(), weights())
def test_memoryless(data: st.DataObject, args: QuantizationArgs, value: Tensor) -> None:
    g_idx = None
    if args.group_size:
        g_idx = data.draw(group_indices(value.shape[1], args.group_size))
    module, global_scale = holder(args, value)
    expected = calculate_qparams(*extremes(value, args, g_idx), args, global_scale=global_scale)
    for name in ("memoryless_minmax", "static_minmax", "minmax"):
        observer = Observer.load_from_registry(name, "weight", args, module)
        assert_same(observer(value, g_idx), expected)
        calculated = observer.get_global_scale(value)
        assert torch.equal(calculated, generate_gparam(value.amin(), value.amax()))


@modest(60)
@given(arguments(), st.lists(st.integers(0, 2**31), min_size=1, max_size=6), st.data())
def test_static(args: QuantizationArgs, seeds: list[int], data: st.DataObject) -> None:
    first = data.draw(weights())
    batches = [first]
    for seed in seeds:
        noise = torch.randn(first.shape, generator=torch.Generator().manual_seed(seed))
        batches.append((first.float() * noise).to(first.dtype))
    module, global_scale = holder(args, first)
    ranges = [extremes(batch, args) for batch in batches]
    low = torch.stack([r[0] for r in ranges]).amin(0)
    high = torch.stack([r[1] for r in ranges]).amax(0)
    observer = Observer.load_from_registry("static_minmax", "weight", args, module)
    for batch in batches:
        result = observer(batch)
    assert_same(result, calculate_qparams(low, high, args, global_scale=global_scale))


@modest(100)
@given(
    arguments(),
    st.lists(st.integers(0, 2**31), min_size=1, max_size=6),
    st.sampled_from([0.01, 0.3, 1.0]),
    st.data(),
)
def test_moving_average(
    args: QuantizationArgs, seeds: list[int], constant: float, data: st.DataObject
) -> None:
    """Past * (1 - c) + current * c in float32 (float64 for float64), cast to the observed dtype."""
    first = data.draw(weights())
    module, global_scale = holder(args, first)
    observer = Observer.load_from_registry(
        "minmax", "weight", args, module, averaging_constant=constant
    )
    state = torch.float64 if first.dtype == torch.float64 else torch.float32
    low, high = (t.to(state) for t in extremes(first, args))
    result = observer(first)
    for seed in seeds:
        noise = torch.randn(first.shape, generator=torch.Generator().manual_seed(seed))
        batch = (first.float() * noise).to(first.dtype)
        current_low, current_high = (t.to(state) for t in extremes(batch, args))
        low = low * (1 - constant) + current_low * constant
        high = high * (1 - constant) + current_high * constant
        result = observer(batch)
    expected = calculate_qparams(
        low.to(first.dtype), high.to(first.dtype), args, global_scale=global_scale
    )
    assert_same(result, expected)
    assert torch.equal(observer.past_min_vals, low)
    assert torch.equal(observer.past_max_vals, high)


@modest(80)
@given(
    st.sampled_from(["tensor", "group", "token", "attn_head"]),
    st.lists(st.integers(1, 5), min_size=1, max_size=3),
    st.integers(1, 20),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_activations(
    strategy: str, leading: list[int], hidden: int, dtype: torch.dtype, symmetric: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (*leading, hidden)
    if strategy == "attn_head":
        shape = (leading[0], *(leading[1:] or [2]), 3, hidden)[-4:]
    value = (torch.randn(shape, generator=generator) + 0.5).to(dtype)
    options = {"group_size": 6} if strategy == "group" else {}
    if strategy == "token":
        options = {"dynamic": True}
    args = QuantizationArgs(num_bits=8, strategy=strategy, symmetric=symmetric, **options)
    if strategy == "tensor":
        low, high = value.amin().reshape(1), value.amax().reshape(1)
    elif strategy == "token":
        low, high = value.amin(-1, keepdim=True), value.amax(-1, keepdim=True)
    elif strategy == "attn_head":
        others = (*range(len(shape) - 3), len(shape) - 2, len(shape) - 1)
        low = value.amin(others).reshape(-1, 1, 1)
        high = value.amax(others).reshape(-1, 1, 1)
    else:
        groups = value.reshape(-1, hidden).split(6, dim=1)
        low = torch.stack([g.amin() for g in groups])
        high = torch.stack([g.amax() for g in groups])
    base_name = "k" if strategy == "attn_head" else "input"
    observer = Observer.load_from_registry("memoryless_minmax", base_name, args)
    assert_same(observer(value), calculate_qparams(low, high, args))
