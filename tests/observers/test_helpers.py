"""The canonical layout, and token counts of a model."""

from __future__ import annotations

import itertools

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import calculate_qparams
from torch import Tensor, nn

from calipers.observers import Observer, flatten_for_calibration, get_observer_token_count
from observers.samples import BY_NAME, CASES, Case, assert_same

GROUP4 = {"strategy": "group", "group_size": 4}
BLOCK = {"strategy": "block", "block_structure": [2, 4]}


def numbered(*shape: int) -> Tensor:
    return torch.arange(torch.Size(shape).numel()).float().reshape(shape)


def flatten(value: Tensor, base_name: str, options: dict, g_idx: Tensor | None = None) -> Tensor:
    return flatten_for_calibration(value, base_name, QuantizationArgs(**options), g_idx)


def test_weight_by_tensor() -> None:
    value = numbered(4, 8)
    assert torch.equal(flatten(value, "weight", {"strategy": "tensor"}), value.reshape(1, 1, 32))


def test_weight_by_channel() -> None:
    value = numbered(4, 8)
    assert torch.equal(flatten(value, "weight", {"strategy": "channel"}), value[None, :, None, :])


@pytest.mark.parametrize("strategy", ["group", "tensor_group"])
def test_weight_by_group(strategy: str) -> None:
    value = numbered(4, 8)
    options = {**GROUP4, "strategy": strategy}
    assert torch.equal(flatten(value, "weight", options), value.reshape(1, 4, 2, 4))
    unknown = torch.full((8,), -1)
    assert torch.equal(flatten(value, "weight", options, unknown), value.reshape(1, 4, 2, 4))


def test_weight_by_group_with_g_idx() -> None:
    value = numbered(2, 8)
    g_idx = torch.tensor([1, 0, 0, 1, 1, 0, 1, 0])
    ordered = value[:, [1, 2, 5, 7, 0, 3, 4, 6]].reshape(1, 2, 2, 4)
    assert torch.equal(flatten(value, "weight", GROUP4, g_idx), ordered)


def test_weight_by_block() -> None:
    value = numbered(4, 8)
    result = flatten(value, "weight", BLOCK)
    assert result.shape == (1, 2, 2, 8)
    for i, j in itertools.product(range(2), range(2)):
        block = value[2 * i : 2 * i + 2, 4 * j : 4 * j + 4]
        assert torch.equal(result[0, i, j], block.flatten())


@pytest.mark.parametrize("base_name", ["input", "output"])
def test_activations(base_name: str) -> None:
    value = numbered(2, 3, 8)
    result = flatten(value, base_name, {"strategy": "tensor"})
    assert torch.equal(result, value.reshape(6, 1, 8))
    assert torch.equal(flatten(value, base_name, GROUP4), value.reshape(6, 2, 4))
    assert torch.equal(flatten(value[0], base_name, GROUP4), value[0].reshape(3, 2, 4))
    more = numbered(2, 1, 3, 8)
    assert torch.equal(flatten(more, base_name, {"strategy": "tensor"}), more.reshape(6, 1, 8))


@pytest.mark.parametrize("base_name", ["q", "k", "v"])
def test_attention_states(base_name: str) -> None:
    value = numbered(2, 3, 5, 4)  # batch, heads, tokens, head_dim
    by_token = value.transpose(1, 2)
    result = flatten(value, base_name, {"strategy": "tensor"})
    assert torch.equal(result, by_token.reshape(10, 1, 12))
    result = flatten(value, base_name, {"strategy": "attn_head"})
    assert torch.equal(result, by_token.reshape(10, 3, 1, 1, 4))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_min_max_of_first_and_last_dimension_is_that_of_the_scales(case: Case) -> None:
    """Short groups may be filled up: zeros change no scale."""
    value = case.value()
    result = flatten_for_calibration(value, case.base_name, case.args())
    assert tuple(result.shape[1:-1]) == case.qparams
    assert result.numel() >= value.numel()
    if case.strategy == "tensor_group":
        return
    observer = Observer.load_from_registry("memoryless_minmax", case.base_name, case.args())
    expected = calculate_qparams(result.amin((0, -1)), result.amax((0, -1)), case.args())
    assert_same(observer(value), expected)


MEANINGLESS = [
    *itertools.product(["weight"], ["token", "attn_head"]),
    *itertools.product(["input", "output"], ["channel-2d", "block", "attn_head"]),
    *itertools.product(["q", "k", "v"], ["channel-2d", "block", "token"]),
]


@pytest.mark.parametrize(("base_name", "case"), MEANINGLESS)
def test_meaningless_combinations(base_name: str, case: str) -> None:
    args = BY_NAME[case].args()
    with pytest.raises(ValueError, match=f"'{base_name}'") as error:
        flatten_for_calibration(BY_NAME[case].value(), base_name, args)
    assert f"'{BY_NAME[case].strategy}'" in str(error.value)


@pytest.mark.parametrize("case", ["tensor-2d", "group", "token"])
def test_unknown_base_name(case: str) -> None:
    with pytest.raises(ValueError, match="'bias'") as error:
        flatten_for_calibration(BY_NAME[case].value(), "bias", BY_NAME[case].args())
    assert BY_NAME[case].strategy in str(error.value)


def test_token_counts_of_a_model() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.ReLU()))
    args = QuantizationArgs()
    for linear, inputs in ((model[0], torch.ones(5, 8)), (model[1][0], torch.ones(1, 5, 8))):
        linear.input_observer = Observer.load_from_registry("minmax", "input", args, linear)
        linear.weight_observer = Observer.load_from_registry("minmax", "weight", args, linear)
        linear.weight_observer(linear.weight)
        for _ in range(2):
            linear.input_observer(inputs)
    assert get_observer_token_count(model) == {"0": 10, "1.0": None}
    assert get_observer_token_count(nn.Linear(2, 2)) == {}
