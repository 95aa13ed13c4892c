"""An update is whole or nothing, by whatever threads, under whatever autocast."""

from __future__ import annotations

import copy
import pickle
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor, nn

from calipers.observers import Observer, histogram, statistics
from calipers.observers.input_moments import InputMoments
from observers.samples import assert_same, assert_same_state, logged, sample

TENSOR = QuantizationArgs(num_bits=8, strategy="tensor")
GROUP = QuantizationArgs(num_bits=4, strategy="group", group_size=8)
WEIGHTS: list[tuple[str, dict[str, Any]]] = [
    ("imatrix_mse", {}),
    ("optimal", {}),
    ("optimal", {"objective": "hessian"}),
]
IDS = ["imatrix_mse", "optimal", "hessian"]


def weights(name: str, options: dict[str, Any], cols: int = 16) -> Observer:
    return Observer.load_from_registry(name, "weight", GROUP, nn.Linear(cols, 4), **options)


def in_threads(work: Callable[[int], None], count: int = 4) -> None:
    """Run in threads that take turns as often as they can: within an update, without a lock."""
    start = threading.Barrier(count)
    interval = sys.getswitchinterval()

    def run(index: int) -> None:
        start.wait()
        work(index)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)


# -- threads ---------------------------------------------------------------------------------


@pytest.fixture
def _slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other threads get their turn between the reading of a statistic and its writing."""

    def slow(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any) -> Any:
            time.sleep(1e-4)
            return function(*args)

        return wrapped

    for owner, name in (
        (statistics, "_where_both"),
        (histogram, "count_patterns"),
        (InputMoments, "_add_products"),
    ):
        monkeypatch.setattr(owner, name, slow(getattr(owner, name)))


@pytest.mark.usefixtures("_slow")
def test_threads_on_a_histogram_lose_nothing() -> None:
    values = [sample((8, 16), seed).half() for seed in range(24)]
    alone, shared = (Observer.load_from_registry("histogram", "input", TENSOR) for _ in range(2))
    for value in values:
        alone.observe(value)
    in_threads(lambda index: [shared.observe(value) for value in values[index::4]] and None)
    assert shared.num_batches == 24
    assert_same_state(shared.state(), alone.state())
    assert_same(shared.get_qparams(), alone.get_qparams())


@pytest.mark.usefixtures("_slow")
def test_threads_on_a_moving_average_count_every_batch() -> None:
    shared = Observer.load_from_registry("minmax", "input", TENSOR, averaging_constant=0.5)
    in_threads(lambda _: [shared.observe(torch.ones(4, 4)) for _ in range(50)] and None)
    assert shared.num_batches == 200
    assert float(shared.past_max_vals) == 1


@pytest.mark.usefixtures("_slow")
@pytest.mark.parametrize(("name", "options"), WEIGHTS, ids=IDS)
def test_threads_on_sums_of_inputs(name: str, options: dict[str, Any]) -> None:
    batches = [torch.randint(-8, 9, (4, 16)).float() for _ in range(80)]  # exact in any order
    alone, shared = weights(name, options), weights(name, options)
    for batch in batches:
        alone.observe_input(batch)
    in_threads(lambda index: [shared.observe_input(b) for b in batches[index::4]] and None)
    assert shared.num_input_tokens == 320
    assert_same_state(shared.state(), alone.state())


def test_observers_merged_into_each_other_at_once_come_to_an_end() -> None:
    pair = [Observer.load_from_registry("static_minmax", "input", TENSOR) for _ in range(2)]
    for each in pair:
        each.observe(torch.ones(2, 2))

    def merge(index: int) -> None:
        for _ in range(200):
            pair[index].merge(pair[1 - index])
            pair[index].num_batches = 1  # it would grow without bound

    threads = [threading.Thread(target=merge, args=(i,), daemon=True) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))]
)
def test_a_copy_has_a_lock_of_its_own(copied: Callable[[Observer], Observer]) -> None:
    observer = Observer.load_from_registry("static_minmax", "input", TENSOR)
    result = observer(torch.ones(2, 2))
    with observer._update.lock:
        other = copied(observer)
        assert_same(other.get_qparams(), result)
        done = threading.Thread(target=other.observe, args=(torch.full((2, 2), 3.0),), daemon=True)
        if copied is not copy.copy:
            done.start()
            done.join(timeout=60)
            assert not done.is_alive()
            assert float(other.max_vals) == 3
    assert float(observer.max_vals) == 1


# -- refused values --------------------------------------------------------------------------


def spoilt(shape: tuple[int, ...]) -> Tensor:
    value = torch.ones(shape)
    value.view(-1)[0] = torch.nan
    return value


@pytest.mark.parametrize("name", ["static_minmax", "minmax", "mse", "histogram"])
def test_a_refused_value_changes_nothing(name: str) -> None:
    args = QuantizationArgs(num_bits=8, strategy="group", group_size=8)
    observer = Observer.load_from_registry(name, "input", args)
    observer(torch.ones(3, 16))
    state, qparams = observer.state(), observer.get_qparams()
    with logged("WARNING") as messages:
        for refused in (
            spoilt((2, 24)),
            torch.full((2, 16), torch.inf),
            torch.empty(2, device="meta"),
        ):
            for act in (observer, observer.observe, observer.get_qparams):
                with pytest.raises(ValueError, match=r"value\.input"):
                    act(refused)
    assert not messages, "a warning of what was refused"
    assert_same_state(observer.state(), state)
    assert_same(observer.get_qparams(), qparams)
    with logged("WARNING") as messages:
        observer(spoilt((2, 16)))
    assert observer.num_nonfinite == 1
    assert len(messages) == 1


def test_a_refused_global_value_changes_nothing() -> None:
    args = QuantizationArgs(num_bits=8, strategy="tensor")
    observer = Observer.load_from_registry("minmax", "input", args)
    observer.get_global_scale(torch.ones(3, 16))
    state = observer.state()
    with pytest.raises(ValueError, match="NaN or Inf"):
        observer.get_global_scale(torch.full((3, 16), torch.nan))
    assert_same_state(observer.state(), state)


@pytest.mark.parametrize(("name", "options"), WEIGHTS, ids=IDS)
def test_refused_inputs_change_nothing(name: str, options: dict[str, Any]) -> None:
    observer = weights(name, options)
    observer.observe_input(torch.ones(3, 16))
    state = observer.state()
    for refused in (spoilt((3, 24)), torch.full((3, 16), torch.nan)):
        with pytest.raises(ValueError, match="inputs of Linear"):
            observer.observe_input(refused)
        assert_same_state(observer.state(), state)


def test_what_a_subclass_has_changed_before_it_raised_is_taken_back() -> None:
    class Broken(Observer):
        def measure(self, observation):
            self.min_vals = torch.tensor([-9.0])
            raise RuntimeError("broken")

    observer = Broken("input", TENSOR)
    with pytest.raises(RuntimeError, match="broken"):
        observer(torch.ones(2, 2))
    assert observer.min_vals is None
    assert observer._num_observed_tokens is None
    assert observer.get_qparams() == (None, None)


# -- batches of a model ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["static_minmax", "minmax", "mse", "histogram"])
def test_a_batch_taken_back_leaves_nothing(name: str) -> None:
    observer = Observer.load_from_registry(name, "input", TENSOR)
    observer(torch.ones(2, 3))
    state, qparams = observer.state(), observer.get_qparams()
    kept = {key: value.clone() for key, value in state.items()}
    observer.begin_batch()
    observer(torch.full((2, 3), 50.0))
    observer.observe(spoilt((2, 3)))
    observer.undo_batch()
    assert_same_state(observer.state(), kept)
    assert_same_state(state, kept)
    assert_same(observer.get_qparams(), qparams)
    observer.begin_batch()
    observer(torch.full((2, 3), 50.0))
    observer.end_batch()
    assert observer.num_batches == 2
    observer.undo_batch()
    assert observer.num_batches == 2


@pytest.mark.parametrize(("name", "options"), WEIGHTS, ids=IDS)
def test_inputs_of_a_batch_count_when_it_is_done(name: str, options: dict[str, Any]) -> None:
    batches = [torch.randint(-8, 9, (4, 16)).float() for _ in range(4)]
    alone, whole = weights(name, options), weights(name, options)
    for first, second in (batches[:2], batches[2:]):
        alone.observe_input(first)
        alone.observe_input(second)
        whole.begin_batch()
        whole.observe_input(torch.ones(9, 16))
        whole.undo_batch()
        whole.begin_batch()
        whole.observe_input(first)
        with pytest.raises(ValueError, match="columns"):
            whole.observe_input(torch.ones(2, 3))
        whole.observe_input(second)
        whole.end_batch()
        assert_same_state(whole.state(), alone.state())
        for each in whole.state().values():
            assert each.dtype in (torch.float64, torch.int64)


def test_products_of_a_batch_wait_in_half_the_memory() -> None:
    observer = weights("optimal", {"objective": "hessian"})
    observer.observe_input(sample((4, 16)))
    held = observer.input_products, observer.input_sketch
    observer.begin_batch()
    observer.observe_input(sample((4, 16)))
    assert observer.input_products is held[0]
    assert observer.input_sketch is held[1]
    waiting = observer.moments._waiting
    assert waiting is not None
    assert {each.dtype for each in waiting.sums.values()} == {torch.float32}
    observer.undo_batch()
    assert observer.moments._waiting is None


# -- merging ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["minmax", "mse"])
def test_averages_near_the_end_of_their_dtype_merge(name: str, dtype: torch.dtype) -> None:
    size = torch.finfo(dtype).max / 9
    args = QuantizationArgs(num_bits=8, strategy="tensor", symmetric=False)
    halves = [Observer.load_from_registry("minmax", "input", args) for _ in range(2)]
    for half, factor in zip(halves, (1, 3), strict=True):
        for _ in range(10):
            half.observe(torch.tensor([[-size * factor, size * factor]], dtype=dtype))
    halves[0].merge(halves[1])
    expected = torch.tensor([2 * size], dtype=dtype)
    torch.testing.assert_close(halves[0].past_max_vals, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(halves[0].past_min_vals, -expected, rtol=1e-6, atol=0)


# -- autocast --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("name", "options"), WEIGHTS, ids=IDS)
def test_autocast_has_no_influence(name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    x, weight = sample((64, 16), 3), sample((4, 16), 4)
    plain, cast = weights(name, options), weights(name, options)
    plain.observe_input(x)
    result = plain(weight)
    with torch.autocast("cpu", dtype=dtype):
        cast.observe_input(x)
        assert_same(cast(weight), result)
        assert torch.is_autocast_enabled("cpu")
    assert_same_state(cast.state(), plain.state())


@pytest.mark.parametrize("name", ["memoryless_mse", "histogram", "minmax"])
def test_autocast_has_no_influence_on_activations(name: str) -> None:
    x = sample((64, 16), 3)
    result = Observer.load_from_registry(name, "input", TENSOR)(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(Observer.load_from_registry(name, "input", TENSOR)(x), result)
