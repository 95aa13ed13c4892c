"""Masked tokens enter no statistic and no count, in any observer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor, nn

from calipers.observers import Observer
from calipers.observers.masks import TokenMask, token_mask
from observers.samples import NVFP4, assert_same, assert_same_state, sample

OBSERVERS = ("memoryless_minmax", "static_minmax", "minmax", "memoryless_mse", "mse", "histogram")
MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [0, 1, 1, 1, 1]])
TENSOR = QuantizationArgs(num_bits=8, strategy="tensor")
GROUP = QuantizationArgs(num_bits=8, strategy="group", group_size=8)
HEADS = QuantizationArgs(num_bits=8, strategy="attn_head")


def build(name: str, base_name: str, args: QuantizationArgs, **options: Any) -> Observer:
    return Observer.load_from_registry(name, base_name, args, **options)


def padded(shape: tuple[int, ...], mask: Tensor, tokens_last: bool = False) -> Tensor:
    """Values that are a thousand times as large, or NaN, where they must not count."""
    value = sample(shape)
    rows = value.transpose(-3, -2) if tokens_last else value
    rows[mask == 0] *= 1000
    rows[mask == 0, ..., 0] = torch.nan
    return value


@pytest.mark.parametrize("args", [TENSOR, GROUP], ids=["tensor", "group"])
@pytest.mark.parametrize("name", OBSERVERS)
def test_activations(name: str, args: QuantizationArgs) -> None:
    value = padded((3, 5, 16), MASK)
    expected = build(name, "input", args)
    result = expected(value[MASK == 1])
    assert expected._num_observed_tokens == 11
    for form, mask in (
        (value, MASK),
        (value, MASK.bool()),
        (value, MASK.float()),
        (value, MASK.flatten()),
        (value.flatten(0, 1), MASK),
        (value.flatten(0, 1), MASK.flatten()),
    ):
        masked = build(name, "input", args)
        assert_same(masked(form, mask=mask), result)
        assert masked._num_observed_tokens == (11 if form.dim() == 2 else None)
        state = masked.state()
        state["num_observed_tokens"] = torch.tensor(11)
        assert_same_state(state, expected.state())
        asked = build(name, "input", args)
        assert_same(asked.get_qparams(form, mask=mask), result)


@pytest.mark.parametrize("name", OBSERVERS)
def test_a_mask_of_tokens_holds_for_every_sequence(name: str) -> None:
    row = torch.tensor([0, 1, 1, 1, 0])
    value = padded((3, 5, 16), row.expand(3, 5))
    expected = build(name, "output", TENSOR)
    expected.observe(value[:, 1:4])
    masked = build(name, "output", TENSOR)
    masked.observe(value, mask=row)
    assert_same(masked.get_qparams(), expected.get_qparams())


@pytest.mark.parametrize("args", [TENSOR, HEADS], ids=["tensor", "attn_head"])
@pytest.mark.parametrize("name", OBSERVERS)
def test_attention_states(name: str, args: QuantizationArgs) -> None:
    value = padded((3, 4, 5, 8), MASK, tokens_last=True)
    expected = build(name, "k", args)
    expected.observe(value.transpose(1, 2)[MASK == 1].transpose(0, 1))
    masked = build(name, "k", args)
    masked.observe(value, mask=MASK)
    assert_same(masked.get_qparams(), expected.get_qparams())
    one = build(name, "k", args)
    one.observe(value[1], mask=MASK[1])
    alone = build(name, "k", args)
    alone.observe(value[1][:, :4])
    assert_same(one.get_qparams(), alone.get_qparams())


def test_as_many_heads_as_tokens() -> None:
    mask = torch.tensor([1, 1, 0])
    value = sample((2, 3, 3, 4))
    value[:, :, 2] = 1000
    observer = build("static_minmax", "q", HEADS)
    observer.observe(value, mask=mask)
    assert torch.equal(observer.max_vals, value[:, :, :2].amax((0, 2, 3)).view(3, 1, 1))
    observer.reset()
    observer.observe(value[0], mask=mask)
    assert torch.equal(observer.max_vals, value[0, :, :2].amax((1, 2)).view(3, 1, 1))


def test_each_token_keeps_its_scale_and_pads_get_that_of_zeros() -> None:
    args = QuantizationArgs(num_bits=8, strategy="token", dynamic=True)
    value = padded((3, 5, 16), MASK)
    scale, _ = build("memoryless_minmax", "input", args)(value, mask=MASK)
    expected, _ = build("memoryless_minmax", "input", args)(value.nan_to_num())
    zeros, _ = build("memoryless_minmax", "input", args)(torch.zeros(3, 5, 16))
    assert torch.equal(scale, torch.where(MASK.unsqueeze(-1) == 1, expected, zeros))


def test_the_first_form() -> None:
    class Absmax(Observer):
        def calculate_qparams(self, observed, reduce_dims=None, tensor_id=None):
            scale = observed.abs().amax().reshape(1) / 127
            return scale, torch.zeros_like(scale)

    value = padded((3, 5, 16), MASK)
    scale, _ = Absmax(TENSOR)(value, mask=MASK)
    assert torch.equal(scale, value[MASK == 1].abs().amax().reshape(1) / 127)
    assert Absmax(TENSOR).get_qparams(value, mask=MASK)[0] == scale


@pytest.mark.parametrize("name", ["static_minmax", "minmax", "memoryless_mse", "optimal"])
def test_global_scales(name: str) -> None:
    options = {"objective": "mse"} if name == "optimal" else {}
    value = padded((3, 5, 16), MASK)
    args = QuantizationArgs(**NVFP4, dynamic="local")
    masked, chosen = (build(name, "input", args, **options) for _ in range(2))
    expected = chosen.get_global_scale(value[MASK == 1])
    assert torch.equal(masked.get_global_scale(value, mask=MASK), expected)
    masked.reset()
    masked.observe_global(value, MASK)
    assert torch.equal(masked.get_global_scale(), expected)


@pytest.mark.parametrize(
    ("name", "options"),
    [("imatrix_mse", {}), ("optimal", {}), ("optimal", {"objective": "hessian"})],
    ids=["imatrix_mse", "optimal", "hessian"],
)
def test_inputs_of_a_weight(name: str, options: dict[str, Any]) -> None:
    args = QuantizationArgs(num_bits=4, strategy="group", group_size=8)
    value = padded((3, 5, 16), MASK)
    module = nn.Linear(16, 4, bias=False)
    chosen, given, hooked = (
        Observer.load_from_registry(name, "weight", args, module, **options) for _ in range(3)
    )
    chosen.observe_input(value[MASK == 1])
    given.observe_input(value, MASK)
    hooked.attach(module)
    with token_mask(TokenMask(MASK)):
        module(value)
        module(value.flatten(0, 1))
        module(value.unsqueeze(2))
    assert chosen.num_input_tokens == given.num_input_tokens == 11
    assert hooked.num_input_tokens == 33
    assert given.num_nonfinite == hooked.num_nonfinite == 0
    assert_same_state(given.state(), chosen.state())
    hooked.reset()
    with token_mask(TokenMask(MASK)):
        module(value)
    hooked.detach(module)
    assert_same_state(hooked.state(), chosen.state())


@pytest.mark.parametrize("name", ["static_minmax", "minmax", "histogram"])
def test_nothing_that_counts_changes_nothing(name: str) -> None:
    observer = build(name, "input", TENSOR)
    observer.observe(torch.ones(2, 3, 4))
    state = observer.state()
    observer.observe(torch.full((2, 3, 4), 9.0), mask=torch.zeros(2, 3))
    assert_same_state(observer.state(), state)


def test_nothing_that_counts_among_the_inputs() -> None:
    observer = build("imatrix_mse", "weight", GROUP)
    state = observer.state()
    observer.observe_input(torch.ones(2, 3, 8), torch.zeros(2, 3))
    assert_same_state(observer.state(), state)
    assert not observer.has_data


def test_where_all_count_the_value_is_not_copied() -> None:
    value = torch.ones(2, 3, 4)
    observer = build("static_minmax", "input", TENSOR)
    assert observer._masked(value, torch.ones(2, 3)) is value
    assert observer._masked(value, None) is value


@pytest.mark.parametrize(
    ("mask", "told"),
    [
        (torch.ones(3, 2), r"expected shape .* of a value of shape \(2, 3, 4\), got \(3, 2\)"),
        (torch.ones(4), r"got \(4,\)"),
        (torch.ones(1, 1, 2, 3), r"got \(1, 1, 2, 3\)"),
        (torch.full((2, 3), -torch.inf), "negative or NaN"),
        (torch.full((2, 3), torch.nan), "negative or NaN"),
        ([[1, 1, 1], [1, 1, 0]], "expected a tensor, got list"),
    ],
)
def test_masks_that_do_not_fit_are_refused(mask: Any, told: str) -> None:
    observer = build("static_minmax", "input", TENSOR)
    observer.observe(torch.ones(2, 3, 4))
    state = observer.state()
    with pytest.raises(ValueError, match=rf"value\.input: mask: .*{told}"):
        observer.observe(torch.ones(2, 3, 4), mask=mask)
    with pytest.raises(ValueError, match="mask"):
        observer(torch.ones(2, 3, 4), mask=mask)
    assert_same_state(observer.state(), state)
    inputs = build("imatrix_mse", "weight", GROUP)
    with pytest.raises(ValueError, match=rf"inputs of value: mask: .*{told}"):
        inputs.observe_input(torch.ones(2, 3, 4), mask)


def test_a_weight_has_no_tokens() -> None:
    observer = build("static_minmax", "weight", TENSOR)
    with pytest.raises(ValueError, match=r"value\.weight: mask: .* a weight has none"):
        observer.observe(torch.ones(3, 4), mask=torch.ones(3))


def test_some_of_the_tokens_keep_their_mask() -> None:
    chosen = torch.tensor([14, 0, 3, 3, 10])
    mask = TokenMask(MASK).among(chosen)
    value = torch.arange(15.0)[chosen].unsqueeze(-1)
    assert mask.fits(value.shape)
    assert mask.select(value).flatten().tolist() == [14, 0]
    assert mask.count == 2
