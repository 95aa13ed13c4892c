"""A state is checked as a whole before any of it is taken over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor, nn

from calipers.observers import Observer
from observers.samples import assert_same, assert_same_state, sample

TENSOR = QuantizationArgs(num_bits=8, strategy="tensor")
GROUP = QuantizationArgs(num_bits=4, strategy="group", group_size=8)
State = dict[str, Tensor]


class FirstForm(Observer):
    def calculate_qparams(self, observed, reduce_dims=None, tensor_id=None):
        scale = observed.abs().amax().reshape(1) / 127
        return scale, torch.zeros_like(scale)


class Own(Observer):
    """Adds a check of its own, as an observer of one's own may."""

    def measure(self, observation):
        return observation.extremes

    def check_state(self, state):
        yield from super().check_state(state)
        if float(state["max_vals"].amax()) == 7:
            yield "max_vals", "is 7"


def observed(name: str, kind: str = "input", **options: Any) -> Observer:
    if kind == "input":
        observer = Observer.load_from_registry(name, "input", TENSOR, **options)
        observer(sample((6, 16)))
        observer.get_global_scale(sample((6, 16)))
        return observer
    module = nn.Linear(16, 4, bias=False)
    observer = Observer.load_from_registry(name, "weight", GROUP, module, **options)
    observer.module_kept = module
    if observer.needs_data:
        observer.observe_input(sample((6, 16)))
    observer(sample((4, 16)))
    return observer


def first_form() -> Observer:
    observer = FirstForm(TENSOR)
    observer(sample((6, 16)))
    return observer


def own() -> Observer:
    observer = Own("input", TENSOR)
    observer(sample((6, 16)))
    return observer


def put(entry: str, value: Any) -> Callable[[State], None]:
    return lambda state: state.update({entry: value})


def drop(entry: str) -> Callable[[State], None]:
    return lambda state: state.__delitem__(entry)


def spoil(entry: str, value: float, index: int = 0) -> Callable[[State], None]:
    def change(state: State) -> None:
        state[entry] = state[entry].clone()
        state[entry].view(-1)[index] = value

    return change


STATIC = ("static_minmax", "input", {})
AVERAGE = ("minmax", "input", {})
HISTOGRAM = ("histogram", "input", {})
WEIGHT = ("memoryless_minmax", "weight", {})
IMATRIX = ("imatrix_mse", "weight", {})
OPTIMAL = ("optimal", "weight", {})
HESSIAN = ("optimal", "weight", {"objective": "hessian"})
SIGNED = ("optimal", "weight", {"negative_scales": True})

CASES: list[tuple[tuple[str, str, dict[str, Any]], Callable[[State], None], str]] = [
    (STATIC, drop("num_batches"), "num_batches is missing"),
    (STATIC, drop("num_nonfinite"), "num_nonfinite is missing"),
    (STATIC, drop("max_vals"), "max_vals is missing"),
    (STATIC, drop("min_vals"), "min_vals is missing"),
    (STATIC, drop("global_min_vals"), "global_min_vals is missing"),
    (STATIC, drop("observed_dtype"), "observed_dtype is missing"),
    (STATIC, dict.clear, "num_batches is missing"),
    (STATIC, put("min_vals", torch.zeros(2)), r"min_vals has shape \(2,\), where \(1,\) is held"),
    (STATIC, put("min_vals", [0.0]), "min_vals must be a tensor, got list"),
    (STATIC, put("min_vals", torch.zeros(1, device="meta")), "min_vals is a meta tensor"),
    (STATIC, put("min_vals", torch.zeros(1).cfloat()), "min_vals must be real"),
    (STATIC, put("min_vals", torch.tensor([torch.nan])), "min_vals has 1 NaN"),
    (STATIC, put("max_vals", torch.tensor([torch.inf])), "min_vals and its maximum must be finite"),
    (STATIC, put("max_vals", torch.tensor([-99.0])), "min_vals is above max_vals"),
    (STATIC, put("num_batches", torch.tensor(-1)), "num_batches must not be negative, got -1"),
    (STATIC, put("num_observed_tokens", torch.tensor(-6)), "num_observed_tokens must not be neg"),
    (STATIC, put("num_batches", torch.tensor(1.5)), "num_batches must be one integer"),
    (STATIC, put("num_batches", torch.tensor([1, 2])), "num_batches must be one integer"),
    (STATIC, put("observed_dtype", torch.zeros(3)), "observed_dtype must be an empty tensor"),
    (AVERAGE, put("past_max_vals", torch.tensor([torch.nan])), "past_max_vals has 1 NaN"),
    (AVERAGE, drop("past_global_max_vals"), "past_global_max_vals is missing"),
    (HISTOGRAM, drop("counts"), "counts is missing"),
    (HISTOGRAM, drop("offsets"), "offsets is missing"),
    (HISTOGRAM, spoil("counts", -1), "counts must not be negative"),
    (HISTOGRAM, put("counts", torch.zeros(1, 256).long()), "counts has shape"),
    (HISTOGRAM, put("counts", torch.zeros(1, 65536)), "counts must be int64"),
    (WEIGHT, put("min_vals", torch.zeros(4, 3)), r"max_vals has shape \(4, 2\), and min_vals has"),
    (
        WEIGHT,
        lambda s: s.update(min_vals=torch.zeros(4, 3), max_vals=torch.ones(4, 3)),
        r"min_vals must have shape \(4, 2\), got \(4, 3\)",
    ),
    (IMATRIX, drop("input_square_sum"), "input_square_sum is missing"),
    (IMATRIX, spoil("input_square_sum", -1.0), "input_square_sum must not be negative"),
    (IMATRIX, spoil("input_square_sum", torch.inf), "input_square_sum must be finite"),
    (IMATRIX, put("input_square_sum", torch.ones(8)), "input_square_sum has shape"),
    (IMATRIX, put("num_input_tokens", torch.tensor(-2)), "num_input_tokens must not be negative"),
    (OPTIMAL, spoil("found_scale", 0.0), "found_scale must be positive"),
    (OPTIMAL, spoil("found_scale", -0.5), "found_scale must be positive"),
    (OPTIMAL, spoil("found_scale", torch.inf), "found_scale must be finite"),
    (OPTIMAL, drop("found_zero_point"), "found_zero_point is missing"),
    (SIGNED, spoil("found_scale", 0.0), "found_scale must not be zero"),
    (HESSIAN, drop("input_sketch"), "input_sketch is missing"),
    (HESSIAN, put("input_products", torch.ones(2, 1, 3)), "input_products has shape"),
    (HESSIAN, spoil("input_sketch", torch.inf), "input_sketch must be finite"),
]


@pytest.mark.parametrize(
    ("kind", "change", "told"), CASES, ids=[f"{c[0][0]}-{c[2][:24]}" for c in CASES]
)
def test_a_wrong_entry_is_named_and_what_was_held_is_kept(
    kind: tuple[str, str, dict[str, Any]], change: Callable[[State], None], told: str
) -> None:
    name, base_name, options = kind
    observer = observed(name, base_name, **options)
    state, qparams = observer.state(), observer.get_qparams()
    wrong = dict(state)
    change(wrong)
    with pytest.raises(ValueError, match=rf"{observer.name}: state cannot be loaded: .*{told}"):
        observer.load_state(wrong)
    assert_same_state(observer.state(), state)
    assert_same(observer.get_qparams(), qparams)
    observer.load_state(state)
    assert_same(observer.get_qparams(), qparams)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (spoil("scale", 0.0), "scale must be positive"),
        (spoil("scale", -1.0), "scale must be positive"),
        (drop("zero_point"), "zero_point is missing"),
        (lambda s: s.update(scale=torch.ones(2), zero_point=torch.ones(2)), "must have shape"),
    ],
)
def test_the_scales_of_the_first_form(change: Callable[[State], None], told: str) -> None:
    observer = first_form()
    state, qparams = observer.state(), observer.get_qparams()
    wrong = dict(state)
    change(wrong)
    with pytest.raises(ValueError, match=told):
        observer.load_state(wrong)
    assert_same(observer.get_qparams(), qparams)


def test_all_wrong_entries_are_listed() -> None:
    observer = observed("static_minmax")
    state = {**observer.state(), "min_vals": torch.tensor([torch.nan])}
    del state["num_batches"]
    with pytest.raises(ValueError, match=r"(?s)min_vals has 1 NaN.*num_batches is missing"):
        observer.load_state(state)


def test_an_observer_without_statistics_keeps_none_of_a_wrong_state() -> None:
    state = observed("optimal", "weight").state()
    state["found_scale"] = -state["found_scale"]
    fresh = Observer.load_from_registry("optimal", "weight", GROUP)
    with pytest.raises(ValueError, match="found_scale"):
        fresh.load_state(state)
    assert not fresh.has_data
    assert fresh.get_qparams() == (None, None)


@pytest.mark.parametrize("shape", [(3,), (4, 3), (2, 2, 2)], ids=str)
def test_shapes_that_the_strategy_never_gives(shape: tuple[int, ...]) -> None:
    state = observed("static_minmax").state()
    state.update(min_vals=torch.zeros(shape), max_vals=torch.ones(shape))
    fresh = Observer.load_from_registry("static_minmax", "input", TENSOR)
    with pytest.raises(ValueError, match=r"min_vals must have shape \(1,\)"):
        fresh.load_state(state)


def test_negative_scales_are_loaded_where_they_were_asked_for() -> None:
    observer = observed("optimal", "weight", negative_scales=True)
    state = observer.state()
    state["found_scale"] = -state["found_scale"].abs()
    observer.load_state(state)
    assert bool((observer.get_qparams()[0] < 0).all())


def test_the_range_of_nothing_is_a_range() -> None:
    observer = Observer.load_from_registry("static_minmax", "input", GROUP)
    value = sample((6, 16))
    value[:, :8] = torch.nan
    result = observer(value)
    loaded = Observer.load_from_registry("static_minmax", "input", GROUP)
    loaded.load_state(observer.state())
    assert_same(loaded.get_qparams(), result)


def test_a_check_of_ones_own() -> None:
    observer = own()
    state = observer.state()
    observer.load_state(state)
    with pytest.raises(ValueError, match="max_vals is 7"):
        observer.load_state({**state, "max_vals": torch.tensor([7.0])})
    assert_same_state(observer.state(), state)
