"""imatrix observers: collecting E[x^2], weighing by it, doing without."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import pytest
import safetensors.torch
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import calculate_qparams
from torch import Tensor, nn

from calipers.observers import IMatrixMSEObserver, Observer
from observers.samples import BY_NAME, assert_same, assert_same_state, differs, logged, sample

ARGS = QuantizationArgs(num_bits=4, strategy="group", group_size=8)
NAMES = ["imatrix_mse", "nvfp4_expanded_imatrix"]


def linear(cols: int = 24, rows: int = 6) -> nn.Linear:
    module = nn.Linear(cols, rows, bias=False)
    with torch.no_grad():
        module.weight.copy_(sample((rows, cols)))
    return module


def build(module: nn.Module, name: str = "imatrix_mse", **options: Any) -> IMatrixMSEObserver:
    observer = Observer.load_from_registry(name, "weight", ARGS, module, **options)
    assert isinstance(observer, IMatrixMSEObserver)
    return observer


def inputs(*shape: int, seed: int = 0) -> Tensor:
    """Whole numbers: every order of summation gives the same sum of squares."""
    energy = torch.arange(shape[-1]) % 5 * 4 + 1
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, shape, generator=generator).float() * energy


def energy(observer: IMatrixMSEObserver) -> Tensor:
    """E[x^2] that an observer has collected."""
    return observer.input_square_sum / observer.num_input_tokens


# -- collecting ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_attach_collects_the_energy_of_inputs(name: str) -> None:
    module = linear()
    observer = build(module, name)
    assert observer.needs_data
    assert not observer.has_data
    observer.attach(module)
    batches = [inputs(2, 5, 24), inputs(7, 24, seed=1), inputs(24, seed=2)]
    outputs = [module(batch) for batch in batches]
    assert observer.has_data
    assert observer.num_input_tokens == 10 + 7 + 1
    seen = torch.cat([batch.reshape(-1, 24) for batch in batches])
    torch.testing.assert_close(energy(observer).float(), seen.square().mean(0), rtol=0, atol=0)
    observer.detach(module)
    for batch, output in zip(batches, outputs, strict=True):
        assert torch.equal(module(batch), output)
    assert observer.num_input_tokens == 18


def test_second_attach_counts_nothing_twice() -> None:
    module = linear()
    observer = build(module)
    observer.attach(module)
    observer.attach(module)
    module(inputs(3, 24))
    assert observer.num_input_tokens == 3
    observer.detach(module)
    module(inputs(3, 24))
    assert observer.num_input_tokens == 3
    observer.detach(module)
    observer.attach(module)
    module(inputs(3, 24))
    assert observer.num_input_tokens == 6


def test_detach_leaves_no_trace_and_the_hooks_of_others() -> None:
    module = linear()
    calls = []
    module.register_forward_pre_hook(lambda *_: calls.append("pre"))
    module.register_forward_hook(lambda *_: calls.append("post"))

    def hooks() -> dict[str, Any]:
        return {k: dict(v or {}) for k, v in vars(module).items() if "hook" in k}

    before = hooks()
    observers = [build(module), build(module)]
    for observer in observers:
        observer.attach(module)
    observers[0].detach(module)
    module(inputs(3, 24))
    assert [o.num_input_tokens for o in observers] == [0, 3]
    observers[1].detach(module)
    assert hooks() == before
    module(inputs(3, 24))
    assert calls == ["pre", "post"] * 2


def test_inputs_by_keyword_are_seen() -> None:
    module = linear()
    observer = build(module)
    observer.attach(module)
    module(input=inputs(3, 24))
    assert observer.num_input_tokens == 3


def test_inputs_of_other_dtypes_and_unchanged() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        module = linear().to(dtype)
        observer = build(module)
        observer.attach(module)
        x = inputs(3, 24).to(dtype)
        before = x.clone()
        module(x.requires_grad_())
        assert torch.equal(x, before)
        torch.testing.assert_close(
            energy(observer).float(), before.float().square().mean(0), rtol=1e-6, atol=0
        )
        assert not observer.input_square_sum.requires_grad


def test_large_half_precision_inputs_do_not_overflow() -> None:
    module = linear().half()
    observer = build(module)
    observer.attach(module)
    module(torch.full((2, 24), 60000.0, dtype=torch.float16))
    assert energy(observer).float().tolist() == pytest.approx([60000.0**2] * 24)


def test_large_finite_inputs_are_no_nan() -> None:
    """Squares beyond float32 are not NaN or Inf among the values: nothing to warn about."""
    module = linear()
    observer = build(module)
    observer.attach(module)
    with logged("WARNING") as lines:
        module(torch.full((2, 24), 1e25))
    assert energy(observer).tolist() == pytest.approx([1e50] * 24)
    assert observer.num_nonfinite == 0
    assert not lines


def test_nonfinite_inputs_are_left_out_and_counted() -> None:
    module = linear()
    observer, clean = build(module), build(module)
    good = inputs(4, 24)
    bad = good.clone()
    bad[1, 3], bad[2, 5], good[1, 3], good[2, 5] = torch.nan, torch.inf, 0, 0
    with logged("WARNING") as lines:
        observer.observe_input(bad)
        observer.observe_input(bad)
    clean.observe_input(good)
    clean.observe_input(good)
    assert len(lines) == 1
    assert "Linear" in lines[0]
    assert observer.num_nonfinite == 4
    assert torch.equal(observer.input_square_sum, clean.input_square_sum)


def test_empty_inputs_and_other_columns() -> None:
    module = linear()
    observer = build(module)
    observer.attach(module)
    module(inputs(3, 24))
    state = observer.state()
    module(torch.empty(0, 24))
    assert_same_state(observer.state(), state)
    with pytest.raises(ValueError, match=r"24.*\(3, 16\)"):
        observer.observe_input(inputs(3, 16))
    assert_same_state(observer.state(), state)


def test_copies_of_a_model_collect_apart() -> None:
    for duplicate in (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))):
        module = linear()
        module.weight_observer = build(module)
        module.weight_observer.attach(module)
        module(inputs(3, 24))
        copied = duplicate(module)
        copied(inputs(2, 24))
        assert module.weight_observer.num_input_tokens == 3
        assert copied.weight_observer.num_input_tokens == 5
        copied.weight_observer.detach(copied)
        copied(inputs(2, 24))
        assert copied.weight_observer.num_input_tokens == 5
        assert not copied._forward_pre_hooks
        module(inputs(2, 24))
        assert module.weight_observer.num_input_tokens == 5


def test_observing_a_weight_keeps_the_energy() -> None:
    module = linear()
    observer = build(module)
    observer.attach(module)
    module(inputs(5, 24))
    square_sum = observer.input_square_sum.clone()
    first = observer(module.weight)
    assert torch.equal(observer.input_square_sum, square_sum)
    assert_same(observer(module.weight), first)


# -- statistics ------------------------------------------------------------------------------


def test_merge_is_exact() -> None:
    module = linear()
    batches = [torch.randn(4, 24, generator=torch.Generator().manual_seed(i)) for i in range(6)]
    one, left, right = build(module), build(module), build(module)
    for batch in batches:
        one.observe_input(batch)
    for half, part in ((left, batches[:3]), (right, batches[3:])):
        for batch in part:
            half.observe_input(batch)
    other = right.state()
    left.merge(right)
    assert_same_state(right.state(), other)
    assert_same_state(left.state(), one.state())
    assert_same(left(module.weight), one(module.weight))


def test_order_and_split_of_batches_do_not_matter() -> None:
    module = linear()
    whole = inputs(12, 24)
    one = build(module)
    one.observe_input(whole)
    for parts in (whole.split(5), whole.split(1), whole.flip(0).split(3)):
        several = build(module)
        for part in parts:
            several.observe_input(part)
        assert_same_state(several.state(), one.state())


def test_reset_and_state() -> None:
    module = linear()
    observer = build(module)
    observer.observe_input(inputs(5, 24))
    result = observer(module.weight)
    state = safetensors.torch.load(safetensors.torch.save(observer.state()))
    loaded = build(module)
    loaded.load_state(state)
    assert loaded.num_input_tokens == 5
    assert_same(loaded(module.weight), result)
    observer.reset()
    assert observer.num_input_tokens == 0
    assert observer.input_square_sum is None
    assert not observer.has_data


# -- weighing --------------------------------------------------------------------------------


def best_by_hand(weight: Tensor, importance: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """The contract's grid for symmetric int4, by hand: scale = 2 max|x| p / 15."""
    scales = torch.zeros(weight.shape[0], weight.shape[1] // group_size)
    groups = weight.unflatten(1, (-1, group_size))
    weights = importance.unflatten(0, (-1, group_size))
    amax = groups.abs().amax(-1)
    best = torch.full_like(scales, torch.inf)
    for i in range(20):  # 0 .. max(1, int(.95 * 20))
        scale = amax * (1 - i / 20) / 7.5
        codes = (groups / scale[..., None]).round().clamp(-8, 7)
        error = (weights * (codes * scale[..., None] - groups).abs() ** 3).sum(-1)
        scales = torch.where(error < best, scale, scales)
        best = torch.minimum(error, best)
    return scales, best


@pytest.mark.parametrize("factor", [1e-3, 1.0, 1e3])
def test_importance_formula(factor: float) -> None:
    """|error|^norm times E[x^2] / mean(E[x^2]): the size of the inputs does not matter."""
    module = linear()
    observer = build(module, patience=1000)
    batch = inputs(64, 24)
    observer.observe_input(batch * factor)
    mean_square = batch.square().mean(0)
    expected, _ = best_by_hand(module.weight.detach(), mean_square / mean_square.mean(), 8)
    torch.testing.assert_close(observer(module.weight)[0], expected, rtol=1e-6, atol=0)
    unweighted, _ = best_by_hand(module.weight.detach(), torch.ones(24), 8)
    assert not torch.allclose(unweighted, expected), "this example cannot tell"


def test_alike_columns_weigh_alike() -> None:
    module = linear()
    observer = build(module)
    observer.observe_input(torch.ones(3, 24) * 5)
    plain = build(module)
    assert_same(observer(module.weight), plain(module.weight))


def test_importance_follows_g_idx() -> None:
    module = linear()
    g_idx = torch.arange(24) % 3
    order = torch.argsort(g_idx, stable=True)
    observer = build(module)
    batch = inputs(16, 24)
    observer.observe_input(batch)
    ordered = build(module)
    ordered.observe_input(batch[:, order])
    result = observer(module.weight, g_idx)
    assert_same(result, ordered(module.weight[:, order]))
    unordered = build(module)
    unordered.observe_input(batch)
    assert differs(unordered(module.weight[:, order]), result), "this example cannot tell"


@pytest.mark.parametrize("case", ["tensor-2d", "channel-2d", "group", "group-ragged", "block"])
def test_importance_reaches_every_strategy(case: str) -> None:
    """A column of energy zero does not count; one of nearly all energy is met all but exactly."""
    chosen = BY_NAME[case]
    module = linear(chosen.shape[1], chosen.shape[0])
    args = chosen.args(num_bits=3)

    def result(column: int) -> tuple[Tensor, Tensor]:
        observer = Observer.load_from_registry("imatrix_mse", "weight", args, module, patience=0)
        x = torch.full((1, chosen.shape[1]), 1e-3)
        x[0, column] = 1
        observer.observe_input(x)
        return observer(module.weight)

    # The energy is in another column: another scale.
    assert differs(result(1), result(4))


def test_experts_are_weighed_by_column() -> None:
    module = nn.Module()
    value = sample((3, 6, 24))
    observer = build(module, patience=1000)
    batch = inputs(16, 24)
    observer.observe_input(batch)
    scale, _ = observer(value)
    for i, expert in enumerate(value):
        alone = build(module, patience=1000)
        alone.observe_input(batch)
        assert torch.equal(scale[i], alone(expert)[0])


# -- without data ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_without_data_errors_are_weighed_alike(name: str) -> None:
    module = linear()
    observer = build(module, name)
    with logged("WARNING") as lines:
        result = observer(module.weight)
    assert len(lines) == 1
    assert "Linear" in lines[0]
    same = build(module, name)
    same.observe_input(torch.ones(3, 24))
    assert_same(result, same(module.weight))


@pytest.mark.parametrize("name", NAMES)
def test_strict_without_data_is_an_error(name: str) -> None:
    module = linear()
    observer = build(module, name, strict=True)
    with pytest.raises(ValueError, match=r"Linear.*input"):
        observer(module.weight)
    assert observer.get_qparams() == (None, None)
    observer.observe_input(inputs(3, 24))
    assert observer(module.weight)[0].shape == (6, 3)


def test_energy_of_another_layer_is_told() -> None:
    module = linear()
    for strict in (False, True):
        observer = build(module, strict=strict)
        observer.observe_input(inputs(3, 16))
        if strict:
            with pytest.raises(ValueError, match=re.escape("(6, 24)")):
                observer(module.weight)
            continue
        with logged("WARNING") as lines:
            result = observer(module.weight)
        assert len(lines) == 1
        assert "16" in lines[0]
        assert_same(result, build(module)(module.weight))


def test_inputs_of_nothing_but_zeros() -> None:
    module = linear()
    observer = build(module)
    observer.observe_input(torch.zeros(3, 24))
    scale, _ = observer(module.weight)
    assert scale.isfinite().all()
    assert_same((scale, _), build(module)(module.weight))


def test_columns_that_never_get_input_keep_a_usable_scale() -> None:
    module = linear()
    observer = build(module)
    x = inputs(3, 24)
    x[:, :8] = 0
    observer.observe_input(x)
    scale, _ = observer(module.weight)
    assert (scale > 0).all()
    # No step is better than the first for a group that does not count.
    whole = module.weight[:, :8]
    expected = calculate_qparams(whole.amin(1), whole.amax(1), ARGS)[0]
    assert torch.equal(scale[:, 0], expected.detach())
