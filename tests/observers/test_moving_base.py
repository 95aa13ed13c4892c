"""Moving averages: the formula, its dtype, and observers of one's own on the base."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from torch import Tensor, nn

from calipers.observers import MovingAverageObserverBase, Observer
from observers.samples import BY_NAME, GLOBAL_SCALE, assert_same, sample

Range = tuple[Tensor, Tensor]
TENSOR = QuantizationArgs(num_bits=8, strategy="tensor", symmetric=False)
NVFP4 = BY_NAME["tensor_group"].args()


class Own(MovingAverageObserverBase):
    """Overrides get_current_* only; writes the shapes down."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.shapes: list[tuple[int, ...]] = []

    def get_current_min_max(self, observed: Tensor) -> Range:
        self.shapes.append(tuple(observed.shape))
        return observed.amin((0, -1)), observed.amax((0, -1))

    def get_current_global_min_max(self, observed: Tensor) -> Range:
        self.shapes.append(tuple(observed.shape))
        return observed.amin((0, -1)), observed.amax((0, -1))


def test_state_is_none_at_the_start() -> None:
    observer = Own("input", TENSOR)
    assert isinstance(observer, Observer)
    assert observer.avg_constant == 0.01
    for name in ("past_min_vals", "past_max_vals", "past_global_min_vals", "past_global_max_vals"):
        assert getattr(observer, name) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("constant", [0.01, 0.37, 1.0])
@pytest.mark.parametrize("name", ["own", "minmax"])
def test_average_of_batches(name: str, constant: float, dtype: torch.dtype) -> None:
    cls = Own if name == "own" else Observer.get_value_from_registry(name)
    observer = cls("input", TENSOR, averaging_constant=constant)
    assert observer.avg_constant == constant
    state = torch.float64 if dtype == torch.float64 else torch.float32
    low = high = None
    for seed in range(5):
        batch = sample((7, 12), seed, dtype=dtype) * (seed + 1)
        current = batch.amin().reshape(1).to(state), batch.amax().reshape(1).to(state)
        if low is None:
            low, high = current
        else:
            low = low * (1 - constant) + current[0] * constant
            high = high * (1 - constant) + current[1] * constant
        result = observer(batch)
        assert torch.equal(observer.past_min_vals, low)
        assert torch.equal(observer.past_max_vals, high)
        assert observer.past_min_vals.dtype == state
        expected = calculate_qparams(low.to(dtype), high.to(dtype), TENSOR)
        assert_same(result, expected)
    if constant == 1.0:
        assert torch.equal(high, current[1]), "with c = 1 each batch stands alone"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_average_does_not_stall(dtype: torch.dtype) -> None:
    """Steps of 1% of a small difference are under half a unit in the last place of bfloat16."""
    observer = Observer.load_from_registry("minmax", "input", TENSOR)
    observer(torch.tensor([[-1.0, 1.0]], dtype=dtype))
    for _ in range(1000):
        observer.observe(torch.tensor([[-1.0, 1.25]], dtype=dtype))
    # 0.99**1000 of the difference is left: under 5e-5 of it.
    assert observer.past_max_vals.item() == pytest.approx(1.25, abs=1e-4)
    scale, _ = observer.get_qparams()
    expected = calculate_qparams(
        torch.tensor([-1.0], dtype=dtype), torch.tensor([1.25], dtype=dtype), TENSOR
    )[0]
    assert scale.dtype == dtype
    assert torch.equal(scale, expected)


@pytest.mark.parametrize("name", ["minmax", "mse"])
def test_local_and_global_states_never_mix(name: str) -> None:
    module = nn.Module()
    module.weight_global_scale = torch.tensor([GLOBAL_SCALE])

    def run(with_local: bool, with_global: bool) -> Any:
        observer = Observer.load_from_registry(
            name, "weight", NVFP4, module, averaging_constant=0.5
        )
        for seed in range(3):
            value = sample((4, 48), seed) * (seed + 1)
            if with_global:
                observer.get_global_scale(value)
            if with_local:
                observer(value)
        return observer

    both, local, whole = run(True, True), run(True, False), run(False, True)
    assert_same(both.get_qparams(), local.get_qparams())
    assert torch.equal(both.past_min_vals, local.past_min_vals)
    assert torch.equal(both.past_global_min_vals, whole.past_global_min_vals)
    assert torch.equal(both.past_global_max_vals, whole.past_global_max_vals)
    assert local.past_global_min_vals is None
    assert whole.past_min_vals is None
    assert whole.past_global_min_vals.shape == (1,)


def test_global_scale_is_that_of_the_average() -> None:
    observer = Observer.load_from_registry("minmax", "weight", NVFP4, averaging_constant=0.25)
    low = high = None
    for seed in range(3):
        value = sample((4, 48), seed) * (seed + 1)
        current = value.amin().reshape(1), value.amax().reshape(1)
        low, high = (
            current
            if low is None
            else (low * 0.75 + current[0] * 0.25, high * 0.75 + current[1] * 0.25)
        )
        assert torch.equal(observer.get_global_scale(value), generate_gparam(low, high))


def test_subclass_sees_the_canonical_layout() -> None:
    case = BY_NAME["tensor_group"]
    module = nn.Module()
    module.weight_global_scale = torch.tensor([GLOBAL_SCALE])
    observer = Own("weight", case.args(), module)
    observer.get_global_scale(case.value())
    observer(case.value())
    assert observer.shapes == [(1, 1, 192), (1, 4, 3, 16)]
    plain = Observer.load_from_registry("minmax", "weight", case.args(), module)
    assert_same(observer.get_qparams(), plain(case.value()))


def test_hooks_of_the_base_average_by_themselves() -> None:
    """get_min_max and get_global_min_max take the batch in and return the average."""
    observer = Own("weight", BY_NAME["group"].args(), averaging_constant=0.5)
    one, two = sample((1, 6, 3, 8), 0), sample((1, 6, 3, 8), 1)
    for hook in (observer.get_min_max, observer.get_global_min_max):
        if hook == observer.get_global_min_max:
            one, two = one.reshape(1, 1, -1), two.reshape(1, 1, -1)
        low, high = hook(one)
        assert torch.equal(low, one.amin((0, -1)))
        low, high = hook(two)
        assert torch.equal(low, one.amin((0, -1)) * 0.5 + two.amin((0, -1)) * 0.5)
        assert torch.equal(high, one.amax((0, -1)) * 0.5 + two.amax((0, -1)) * 0.5)
    assert low.shape == (1,)


def test_current_range_is_that_of_this_batch_alone() -> None:
    for name in ("minmax", "mse"):
        observer = Observer.load_from_registry(name, "weight", BY_NAME["group"].args())
        one, two = sample((1, 6, 3, 8), 0), sample((1, 6, 3, 8), 1)
        observer.get_min_max(one)
        state = observer.past_min_vals.clone()
        low, high = observer.get_current_min_max(two)
        fresh = Observer.load_from_registry(name, "weight", BY_NAME["group"].args())
        expected = fresh.get_min_max(two)
        assert torch.equal(low, expected[0])
        assert torch.equal(high, expected[1])
        assert torch.equal(observer.past_min_vals, state)
        assert observer.get_current_global_min_max(two.reshape(1, 1, -1))[0].shape == (1,)


def test_abstract_hooks_name_the_subclass() -> None:
    class Bare(MovingAverageObserverBase):
        pass

    with pytest.raises((NotImplementedError, TypeError), match="Bare"):
        Bare("input", TENSOR)(torch.ones(2, 4))


def test_merge_weighs_by_batches() -> None:
    def of(values: list[float]) -> Observer:
        observer = Observer.load_from_registry("minmax", "input", TENSOR)
        for value in values:
            observer.observe(torch.tensor([[-value, value]]))
        return observer

    merged = of([2.0, 2.0, 2.0])
    merged.merge(of([6.0]))
    assert merged.past_max_vals.item() == pytest.approx((2 * 3 + 6) / 4)
    assert merged.past_min_vals.item() == pytest.approx(-3)
    merged.merge(of([7.0, 7.0, 7.0, 7.0]))
    assert merged.past_max_vals.item() == pytest.approx((3 * 4 + 7 * 4) / 8)
