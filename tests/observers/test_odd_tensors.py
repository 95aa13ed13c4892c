"""Lazy views are resolved and odd tensors refused by name, by every observer; engines stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from calipers.engines import dispatch
from calipers.observers import Observer
from calipers.ranges import range_of_qparams
from observers.samples import NVFP4, assert_same, assert_same_state, logged
from odd_tensors import REFUSED, SAME

pytestmark = pytest.mark.filterwarnings(
    "ignore:The PyTorch API of nested tensors", "ignore:.*quantize", "ignore:.*deprecat"
)

OBSERVERS: dict[str, dict[str, Any]] = {
    "memoryless_minmax": {},
    "static_minmax": {},
    "minmax": {},
    "memoryless_mse": {},
    "mse": {},
    "imatrix_mse": {},
    "nvfp4_expanded_mse": {},
    "optimal": {"objective": "mse"},
    "histogram": {},
}
NAMES = ["memoryless_minmax", "memoryless_mse", "optimal", "histogram"]
DATA = {"imatrix_mse": {}, "optimal": {"objective": "hessian"}}
#: Odd in a place that takes one global scale.
GLOBAL_SCALES: dict[str, Any] = {
    "two": torch.ones(2),
    "none": torch.ones(0),
    "NaN": torch.tensor([torch.nan]),
    "zero": torch.zeros(1),
    "negative": -torch.ones(1),
    "infinite": torch.tensor([torch.inf]),
    "complex": torch.ones(1, dtype=torch.complex64),
    "sparse": torch.ones(1).to_sparse(),
    "meta": torch.ones(1, device="meta"),
    "number": 1.0,
}


@pytest.fixture(autouse=True)
def _engine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The engine that reads memory by itself, which must not be given up."""
    monkeypatch.setenv("CALIPERS_ENGINE", "native")
    monkeypatch.setattr(dispatch, "_failures", {})
    yield
    assert dispatch._failures == {}


def value() -> Tensor:
    """Skewed, so that a lost sign shows, and large enough for every kernel."""
    return torch.randn(34, 512, generator=torch.Generator().manual_seed(0)).exp() - 0.5


def build(name: str, **fields: Any) -> Observer:
    args = QuantizationArgs(num_bits=8, strategy="tensor", symmetric=False, **fields)
    return Observer.load_from_registry(name, "weight", args, nn.Linear(4, 4), **OBSERVERS[name])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", SAME)
@pytest.mark.parametrize("name", OBSERVERS)
def test_a_lazy_value_is_read_as_what_it_stands_for(name: str, kind: str) -> None:
    make, meant = SAME[kind]
    plain, lazy = build(name), build(name)
    assert_same(lazy(make(value())), plain(meant(value())))
    assert_same_state(lazy.state(), plain.state())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", SAME)
@pytest.mark.parametrize("name", DATA)
def test_lazy_inputs_are_read_as_what_they_stand_for(name: str, kind: str) -> None:
    make, meant = SAME[kind]
    states = []
    for inputs in (make(value()), meant(value())):
        module = nn.Linear(512, 1, bias=False)
        args = QuantizationArgs(num_bits=4, strategy="group", group_size=128)
        observer = Observer.load_from_registry(name, "weight", args, module, **DATA[name])
        with torch.no_grad():
            observer.attach(module)
            for hook in module._forward_pre_hooks.values():
                hook(module, (inputs,), {})
        states.append(observer.state())
    assert_same_state(*states)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("name", ["memoryless_minmax", "memoryless_mse"])
def test_an_odd_value_is_refused_by_name(name: str, kind: str) -> None:
    make, told = REFUSED[kind]
    observer = build(name)
    observer(value())
    before = observer.state()
    for method in (observer, observer.observe, observer.get_qparams, observer.get_global_scale):
        with pytest.raises(ValueError, match=rf"^Linear\.weight: .*{told}"):
            method(make(value()))
    assert_same_state(observer.state(), before)
    observer(value())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", REFUSED)
def test_odd_inputs_are_refused_by_name(kind: str) -> None:
    make, told = REFUSED[kind]
    args = QuantizationArgs(num_bits=4, strategy="group", group_size=128)
    observer = Observer.load_from_registry("optimal", "weight", args, nn.Linear(512, 1))
    with pytest.raises(ValueError, match=rf"^inputs of Linear: .*{told}"):
        observer.observe_input(make(value()))
    assert not observer.has_data


@pytest.mark.parametrize("name", ["memoryless_mse", "optimal"])
def test_inside_of_transforms_and_fake_mode(name: str) -> None:
    observer = build(name)
    x = value()
    for run, told in (
        (lambda: torch.func.functionalize(lambda v: observer(v)[0])(x), "or another transform"),
        (lambda: torch.func.vmap(lambda v: observer(v)[0])(x.view(2, 17, -1)), "torch.func.vmap"),
    ):
        with pytest.raises(ValueError, match=rf"^Linear\.weight: .*{told}"):
            run()
    for allowed in (False, True):
        with (
            pytest.raises(ValueError, match=r"^Linear\.weight: .*got a FakeTensorMode"),
            FakeTensorMode(allow_non_fake_inputs=allowed),
        ):
            observer(x)
    assert not observer.has_statistics
    seen = []
    torch.func.grad(lambda v: (seen.append(observer(v)), v.sum())[1])(x)
    assert_same(seen[0], build(name)(x))


@pytest.mark.parametrize("name", OBSERVERS)
def test_the_default_device_may_be_meta(name: str) -> None:
    expected = build(name)(value())
    observer, x = build(name), value()
    torch.set_default_device("meta")
    try:
        found = observer(x)
    finally:
        torch.set_default_device(None)
    assert_same(found, expected)


@pytest.mark.parametrize("kind", ["sparse", "meta", "complex", "list"])
def test_masks_and_column_groups_are_refused_by_name(kind: str) -> None:
    make, told = REFUSED[kind]
    tokens = Observer.load_from_registry(
        "minmax", "input", QuantizationArgs(num_bits=8, strategy="tensor")
    )
    with pytest.raises(ValueError, match=rf"^value\.input: mask: .*{told}"):
        tokens(value(), mask=make(torch.ones(34)))
    args = QuantizationArgs(num_bits=8, strategy="group", group_size=128)
    weight = Observer.load_from_registry("memoryless_mse", "weight", args)
    with pytest.raises(ValueError, match=rf"^value\.weight: g_idx: .*{told}"):
        weight(value(), g_idx=make(torch.arange(512.0) // 128))


class TestGlobalScale:
    @pytest.mark.parametrize("kind", GLOBAL_SCALES)
    @pytest.mark.parametrize(
        "name", ["memoryless_minmax", "memoryless_mse", "optimal", "histogram"]
    )
    def test_an_odd_one_is_refused_by_name(self, name: str, kind: str) -> None:
        module = nn.Linear(4, 4)
        base = "input" if name == "histogram" else "weight"
        observer = Observer.load_from_registry(
            name, base, QuantizationArgs(**NVFP4), module, **OBSERVERS[name]
        )
        setattr(module, f"{base}_global_scale", GLOBAL_SCALES[kind])
        told = rf"^Linear\.{base}_global_scale: "
        small = value()[:, :256]
        for run in (observer, observer.get_qparams):
            with pytest.raises(ValueError, match=told):
                run(small)
        delattr(module, f"{base}_global_scale")
        with pytest.raises(ValueError, match=told):
            observer.get_qparams(small, global_scale=GLOBAL_SCALES[kind])
        assert not observer.has_statistics
        setattr(module, f"{base}_global_scale", torch.tensor([3.0]))
        observer.observe(small)
        setattr(module, f"{base}_global_scale", GLOBAL_SCALES[kind])
        with pytest.raises(ValueError, match=told):
            observer.get_qparams()

    @pytest.mark.parametrize(
        "name", ["memoryless_minmax", "memoryless_mse", "optimal", "histogram", "minmax"]
    )
    def test_one_as_an_argument_does_as_one_on_the_module(self, name: str) -> None:
        x, given = value()[:, :256], torch.tensor([3.0])
        args, options = QuantizationArgs(**NVFP4), OBSERVERS.get(name, {})
        module = nn.Linear(4, 4)
        module.weight_global_scale = given
        base = "input" if name in ("histogram", "minmax") else "weight"
        setattr(module, f"{base}_global_scale", given)
        expected = Observer.load_from_registry(name, base, args, module, **options)(x)
        other = nn.Linear(4, 4)
        setattr(other, f"{base}_global_scale", given * 2)
        observer = Observer.load_from_registry(name, base, args, other, **options)
        found = observer.get_qparams(x, global_scale=given)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert observer.get_qparams()[0] is found[0]
        doubled = observer.get_qparams(global_scale=given * 2)
        assert torch.equal(doubled[0].float(), 2 * found[0].float())
        observer.reset()
        assert observer.get_qparams(global_scale=given) == (None, None)

    def test_one_that_the_strategy_has_no_use_for(self) -> None:
        observer = Observer.load_from_registry("minmax", "weight", QuantizationArgs(num_bits=8))
        with pytest.raises(ValueError, match=r"global_scale: strategy 'tensor' has none"):
            observer.get_qparams(value(), global_scale=torch.ones(1))

    @pytest.mark.parametrize("kind", GLOBAL_SCALES)
    def test_an_odd_one_as_an_argument(self, kind: str) -> None:
        from calipers.ranges import (
            ShrinkGrid,
            count_patterns,
            group_values,
            min_max,
            search_grid_ranges,
            search_histogram_range,
            search_optimal_scales,
        )

        odd, args, x = GLOBAL_SCALES[kind], QuantizationArgs(**NVFP4), value()
        views = group_values(x, "weight", args)
        extremes = [min_max(view) for view in views]
        counted = group_values(x, "input", args)[0]
        histogram = count_patterns(counted)
        optimal = Observer.load_from_registry("optimal", "weight", args, objective="mse")
        for run in (
            lambda: search_grid_ranges(
                views, extremes, args, ShrinkGrid(0.2, 100, 5, 2.4), global_scale=odd
            ),
            lambda: search_optimal_scales(views, extremes, args, global_scale=odd),
            lambda: search_histogram_range(
                histogram, *min_max(counted), args, x.dtype, global_scale=odd
            ),
            lambda: range_of_qparams(torch.ones(2), None, args, odd),
            lambda: optimal.global_scale_errors(x, [odd]),
        ):
            with pytest.raises(ValueError, match="global_scale: "):
                run()

    def test_one_of_another_shape_or_dtype_is_the_same(self) -> None:
        module = nn.Linear(4, 4)
        observer = Observer.load_from_registry(
            "memoryless_mse", "weight", QuantizationArgs(**NVFP4), module
        )
        module.weight_global_scale = torch.tensor([3.0])
        expected = observer(value())
        for scale in (torch.tensor(3.0), torch.tensor([[3.0]]).double(), torch.tensor([3])):
            module.weight_global_scale = scale
            assert_same(observer(value()), expected)


def test_that_ranks_are_not_counted_is_said_once() -> None:
    observer = Observer.load_from_registry(
        "minmax", "input", QuantizationArgs(num_bits=8, strategy="tensor")
    )
    with logged("DEBUG") as lines:
        for _ in range(3):
            observer(value().view(2, 17, -1))
    assert len(lines) == 1
