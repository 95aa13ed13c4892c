"""The contract's table of methods, and subclasses of both forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import calculate_qparams
from torch import Tensor, nn

from calipers.observers import Observer, ObserverOptions
from observers.samples import BY_NAME, CASES, GLOBAL_SCALE, Case, assert_same, logged, sample

Range = tuple[Tensor, Tensor]
GROUP = BY_NAME["group"]
TENSOR = BY_NAME["tensor-2d"]


class FirstForm(Observer):
    """Overrides calculate_qparams only; writes its calls down."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.calls: list[tuple[tuple[int, ...], tuple[int, ...] | None]] = []

    def calculate_qparams(
        self, observed: Tensor, reduce_dims: tuple[int, ...] | None = None, tensor_id: Any = None
    ) -> Range:
        self.calls.append((tuple(observed.shape), reduce_dims))
        if reduce_dims is None:
            low, high = observed.amin().reshape(1), observed.amax().reshape(1)
        else:
            low = observed.amin(dim=reduce_dims, keepdim=True)
            high = observed.amax(dim=reduce_dims, keepdim=True)
        return calculate_qparams(low, high, self.args, global_scale=self.global_scale)


class SecondForm(Observer):
    """Overrides get_min_max only; writes the shapes down."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.shapes: list[tuple[int, ...]] = []

    def get_min_max(self, observed: Tensor) -> Range:
        self.shapes.append(tuple(observed.shape))
        return observed.amin((0, -1)), observed.amax((0, -1))


class Nothing(Observer):
    pass


def holder(case: Case) -> nn.Module:
    module = nn.Module()
    if case.strategy == "tensor_group":
        setattr(module, f"{case.base_name}_global_scale", torch.tensor([GLOBAL_SCALE]))
    return module


def built(cls: type[Observer], case: Case, module: nn.Module, **options: Any) -> Any:
    return cls(case.base_name, case.args(), module, **options)


def reference(case: Case, value: Tensor, **kwargs: Any) -> Range:
    module = holder(case)
    name = "memoryless_minmax"
    return Observer.load_from_registry(name, case.base_name, case.args(), module)(value, **kwargs)


# -- subclasses of the first form ------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
def test_first_form_subclass_works_with_every_strategy(case: Case) -> None:
    module = holder(case)
    observer = built(FirstForm, case, module)
    value = case.value()
    result = observer(value)
    assert result[0].shape == result[1].shape == case.qparams
    assert_same(result, reference(case, value))
    assert_same(observer.get_qparams(), result)


def test_first_form_subclass_by_the_first_form() -> None:
    value = sample((2, 3, 5, 4))
    observer = FirstForm(QuantizationArgs(strategy="attn_head"))
    assert_same(
        observer(value),
        Observer.load_from_registry("memoryless_minmax", "q", observer.args)(value),
    )
    token = FirstForm(QuantizationArgs(strategy="token", dynamic=True))
    assert token(sample((2, 5, 12)))[0].shape == (2, 5, 1)


def test_group_is_one_call() -> None:
    observer = FirstForm(GROUP.args())
    observer(GROUP.value())
    assert observer.calls == [((6, 3, 8), (2,))]


@pytest.mark.parametrize(("cols", "tail"), [(21, 5), (801, 1)])
def test_short_last_group_is_one_more_call(cols: int, tail: int) -> None:
    observer = FirstForm(GROUP.args())
    observer(sample((6, cols)))
    assert sorted(observer.calls) == sorted([((6, cols // 8, 8), (2,)), ((6, 1, tail), (2,))])


def test_each_size_of_group_is_one_call() -> None:
    groups = [g for g, size in enumerate([8, 4, 8, 4, 11, 5]) for _ in range(size)]
    g_idx = torch.tensor(groups)[torch.randperm(40, generator=torch.Generator().manual_seed(0))]
    args = QuantizationArgs(num_bits=4, strategy="group", group_size=7)
    observer = FirstForm(args)
    value = sample((6, 40))
    result = observer(value, g_idx)
    expected = [((6, n, size), (2,)) for n, size in ((2, 8), (2, 4), (1, 11), (1, 5))]
    assert sorted(observer.calls) == sorted(expected)
    assert_same(result, Observer.load_from_registry("memoryless_minmax", args)(value, g_idx))


@pytest.mark.parametrize("cls", [FirstForm, SecondForm])
def test_bad_input_of_subclasses(cls: type[Observer]) -> None:
    module = nn.Linear(24, 6)
    observer = built(cls, GROUP, module)
    assert observer(torch.empty(0, 24)) == (None, None)
    value = GROUP.value()
    result = observer(value)
    assert_same(observer(torch.empty(0, 24)), result)
    spoilt, blanked = value.clone(), value.clone()
    spoilt[:, 3], blanked[:, 3] = torch.nan, 0
    assert_same(observer(spoilt), reference(GROUP, blanked))
    assert observer.num_nonfinite == 6
    with pytest.raises(ValueError, match=r"Linear"):
        observer(torch.full((6, 24), torch.inf))
    with pytest.raises(ValueError, match="meta"):
        observer(torch.empty(6, 24, device="meta"))
    integers = (value * 10).int()
    assert_same(observer(integers), reference(GROUP, integers.float()))
    observer.reset()
    assert observer.get_qparams() == (None, None)


def test_first_form_state_is_its_last_pair() -> None:
    observer = FirstForm(GROUP.args())
    result = observer(GROUP.value())
    loaded = FirstForm(GROUP.args())
    loaded.load_state(observer.state())
    assert_same(loaded.get_qparams(), result)


# -- subclasses of the second form -----------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
def test_second_form_subclass_works_with_every_strategy(case: Case) -> None:
    module = holder(case)
    observer = built(SecondForm, case, module)
    value = case.value()
    assert_same(observer(value), reference(case, value))
    scale = observer.get_global_scale(value)
    assert scale.shape == (1,)
    assert scale.dtype == torch.float32


@pytest.mark.parametrize(
    ("case", "shape"),
    [
        ("tensor-2d", (1, 1, 144)),
        ("channel-2d", (1, 6, 1, 24)),
        ("group", (1, 6, 3, 8)),
        ("block", (1, 2, 2, 32)),
        ("tensor-input", (24, 1, 12)),
        ("group-input", (30, 3, 8)),
        ("tensor-q", (10, 1, 12)),
        ("attn_head", (10, 3, 1, 1, 4)),
    ],
)
def test_second_form_sees_the_canonical_layout(case: str, shape: tuple[int, ...]) -> None:
    observer = built(SecondForm, BY_NAME[case], holder(BY_NAME[case]))
    observer(BY_NAME[case].value())
    assert observer.shapes == [shape]


def test_second_form_sees_columns_brought_together() -> None:
    class Keeps(SecondForm):
        def get_min_max(self, observed: Tensor) -> Range:
            self.seen = observed.clone()
            return super().get_min_max(observed)

    value = GROUP.value()
    g_idx = torch.arange(24) % 3
    observer = Keeps(GROUP.args())
    observer(value, g_idx)
    assert torch.equal(observer.seen[0], value.reshape(6, 8, 3).transpose(1, 2))


def test_second_form_with_a_global_range_of_its_own() -> None:
    class Doubled(SecondForm):
        def get_global_min_max(self, observed: Tensor) -> Range:
            self.shapes.append(tuple(observed.shape))
            return 2 * observed.amin((0, -1)), 2 * observed.amax((0, -1))

    case = BY_NAME["tensor_group"]
    value = case.value()
    observer = Doubled("weight", case.args())
    plain = Observer.load_from_registry("memoryless_minmax", case.args()).get_global_scale(value)
    assert torch.equal(observer.get_global_scale(value), plain / 2)
    assert observer.shapes == [(1, 1, 192)]


@pytest.mark.parametrize(
    ("name", "hook"),
    [
        ("memoryless_minmax", "get_min_max"),
        ("static_minmax", "get_min_max"),
        ("minmax", "get_min_max"),
        ("memoryless_mse", "get_min_max"),
        ("imatrix_mse", "get_min_max"),
    ],
)
def test_hooks_of_registered_observers_take_the_canonical_layout(name: str, hook: str) -> None:
    observer = Observer.load_from_registry(name, GROUP.args())
    value = GROUP.value()
    low, high = getattr(observer, hook)(value.reshape(1, 6, 3, 8))
    fresh = Observer.load_from_registry(name, GROUP.args())
    assert_same(calculate_qparams(low, high, GROUP.args()), fresh(value))
    low, high = observer.get_global_min_max(value.reshape(1, 1, -1))
    assert low.shape == high.shape == (1,)
    assert low.item() == pytest.approx(value.min().item())
    assert high.item() == pytest.approx(value.max().item())


# -- the table of methods --------------------------------------------------------------------


def test_base_raises_by_the_name_of_the_subclass() -> None:
    with pytest.raises(NotImplementedError, match="Nothing"):
        Nothing(GROUP.args()).calculate_qparams(GROUP.value())
    with pytest.raises(NotImplementedError, match="Nothing"):
        Nothing(GROUP.args())(GROUP.value())
    with pytest.raises(NotImplementedError, match="Nothing"):
        Nothing(GROUP.args()).get_qparams_along_dim(GROUP.value(), 0)
    with pytest.raises(NotImplementedError, match="Observer"):
        Observer(GROUP.args()).calculate_qparams(GROUP.value())


@pytest.mark.parametrize(
    ("dim", "reduced"),
    [
        (0, (1, 2)),
        (2, (0, 1)),
        (-1, (0, 1)),
        (-3, (1, 2)),
        ([0, 2], (1,)),
        ({0, -1}, (1,)),
        (range(2), (2,)),
        ((d for d in (1, 2)), (0,)),
        ([1, -2], (0, 2)),
        ([], (0, 1, 2)),
    ],
)
def test_qparams_along_dim_reduce_all_others(dim: Any, reduced: tuple[int, ...]) -> None:
    value = sample((2, 3, 4))
    observer = FirstForm(QuantizationArgs(strategy="channel"))
    scale, _ = observer.get_qparams_along_dim(value, dim, tensor_id="any")
    assert observer.calls == [((2, 3, 4), reduced)]
    assert scale.shape == tuple(1 if d in reduced else s for d, s in enumerate(value.shape))


@pytest.mark.parametrize("name", ["memoryless_minmax", "static_minmax", "minmax"])
def test_calculate_qparams_of_registered_observers(name: str) -> None:
    value = sample((2, 3, 4))
    args = QuantizationArgs(num_bits=4, symmetric=False)
    observer = Observer.load_from_registry(name, args)
    for dims in ((0,), (1, 2), (-1,), (0, 1, 2)):
        low, high = value.amin(dims, keepdim=True), value.amax(dims, keepdim=True)
        expected = calculate_qparams(low, high, args)
        assert_same(observer.calculate_qparams(value, reduce_dims=dims), expected)
    scale, zero_point = observer.calculate_qparams(value)
    expected = calculate_qparams(value.amin().reshape(1), value.amax().reshape(1), args)
    assert_same((scale, zero_point), expected)
    kept = observer.get_qparams_along_dim(value, -2)
    assert_same(kept, observer.calculate_qparams(value, reduce_dims=(0, 2)))
    assert observer.get_qparams() == (None, None), "the hook left statistics behind"


@pytest.mark.parametrize("cls", [FirstForm, SecondForm])
def test_post_calculate_qparams_comes_once_after_each_recalculation(cls: type[Observer]) -> None:
    class Counts(cls):  # type: ignore[misc, valid-type]
        def post_calculate_qparams(self) -> None:
            self.seen = [*getattr(self, "seen", []), self._scale]

    observer = Counts(BY_NAME["group-ragged"].args())
    value = BY_NAME["group-ragged"].value()
    observer.get_qparams()
    assert not hasattr(observer, "seen")
    first = observer(value)
    second = observer.get_qparams(value * 2)
    assert [s.shape for s in observer.seen] == [(6, 3), (6, 3)]
    assert torch.equal(observer.seen[0], first[0])
    assert torch.equal(observer.seen[1], second[0])
    observer.get_qparams()
    observer.get_qparams(torch.empty(0, 21))
    assert len(observer.seen) == 2


def test_tokens_are_counted_in_two_dimensions_only() -> None:
    observer = Observer.load_from_registry("memoryless_minmax", "input", TENSOR.args())
    assert observer._num_observed_tokens is None
    with logged("DEBUG") as lines:
        for shape in ((), (3,), (2, 3, 4), (2, 3, 4)):
            observer.record_observed_tokens(torch.zeros(shape))
    assert len(lines) == 1
    assert observer._num_observed_tokens is None
    with logged("DEBUG") as lines:
        observer.record_observed_tokens(torch.zeros(5, 8))
        observer.record_observed_tokens(torch.zeros(2, 8))
    assert not lines
    assert observer._num_observed_tokens == 7
    observer(torch.ones(3, 8))
    assert observer._num_observed_tokens == 10
    observer.get_qparams(torch.ones(3, 8))
    assert observer._num_observed_tokens == 10
    for wrong in (None, 3, [torch.zeros(2, 2)], "text"):
        with pytest.raises(ValueError, match=type(wrong).__name__):
            observer.record_observed_tokens(wrong)
    assert observer._num_observed_tokens == 10
    observer.reset()
    assert observer._num_observed_tokens is None


def test_missing_global_scale_leaves_the_observer_as_it_was() -> None:
    case = BY_NAME["tensor_group"]
    module = nn.Linear(48, 4)
    observer = Observer.load_from_registry("memoryless_minmax", "weight", case.args(), module)
    with pytest.raises(ValueError, match=r"weight_global_scale.*first"):
        observer(case.value())
    module.weight_global_scale = torch.tensor([GLOBAL_SCALE])
    assert_same(observer(case.value()), reference(case, case.value()))


def test_global_scale_is_that_of_the_base_name() -> None:
    case = BY_NAME["tensor_group"]
    module = nn.Module()
    module.weight_global_scale = torch.tensor([1.0])
    module.input_global_scale = torch.tensor([GLOBAL_SCALE])
    observer = Observer.load_from_registry("memoryless_minmax", "input", case.args(), module)
    scale = observer(case.value())[0]
    assert scale.shape == (3,)
    low, high = case.value().unflatten(-1, (3, 16)).aminmax(dim=-1)
    expected = calculate_qparams(
        low.amin(0), high.amax(0), case.args(), global_scale=torch.tensor([GLOBAL_SCALE])
    )
    assert torch.equal(scale, expected[0])


# -- registry and options --------------------------------------------------------------------


def test_registering_an_observer_of_ones_own() -> None:
    class ScaledOptions(ObserverOptions):
        factor: float = 1.0

    @Observer.register("test_base_scaled")
    class Scaled(SecondForm):
        Options = ScaledOptions

        def get_min_max(self, observed: Tensor) -> Range:
            low, high = super().get_min_max(observed)
            return low * self.options.factor, high * self.options.factor

    value = TENSOR.value()
    args = TENSOR.args(observer_kwargs={"factor": 3.0})
    expected = reference(TENSOR, value * 3)
    assert_same(Observer.load_from_registry("test_base_scaled", args)(value), expected)
    half = Observer.load_from_registry("test_base_scaled", "weight", args, factor=1.0)
    assert_same(half(value), reference(TENSOR, value))
    assert args.observer_kwargs == {"factor": 3.0}
    with pytest.raises(ValueError, match=r"facter.*factor"):
        Scaled("weight", TENSOR.args(), facter=2.0)
    with pytest.raises(ValueError, match="factor"):
        Scaled("weight", TENSOR.args(), factor="big")


@pytest.mark.parametrize("call", ["get_value_from_registry", "load_from_registry"])
def test_unknown_name_lists_the_known_ones(call: str) -> None:
    with pytest.raises(ValueError, match="no_such_observer") as error:
        getattr(Observer, call)("no_such_observer")
    for name in ("memoryless_minmax", "imatrix_mse", "fouroversix"):
        assert name in str(error.value)


MSE_OBSERVERS = ["memoryless_mse", "mse", "nvfp4_expanded_mse"]


@pytest.mark.parametrize("name", MSE_OBSERVERS)
@pytest.mark.parametrize("option", ["chunk_size", "triton_error_buffer"])
def test_options_of_llmcompressor_are_taken_and_ignored(name: str, option: str) -> None:
    value = GROUP.value()
    plain = Observer.load_from_registry(name, GROUP.args(), grid=20)
    with logged("DEBUG") as lines:
        observers = [
            Observer.load_from_registry(name, "weight", GROUP.args(), grid=20, **{option: 0.3}),
            Observer.load_from_registry(
                name, GROUP.args(observer_kwargs={option: 0.3, "grid": 20})
            ),
        ]
    assert len([line for line in lines if option in line]) == 2
    expected = plain(value)
    for observer in observers:
        assert_same(observer(value), expected)


@pytest.mark.parametrize("name", ["memoryless_minmax", "static_minmax", "minmax"])
def test_options_of_llmcompressor_are_no_options_of_others(name: str) -> None:
    with pytest.raises(ValueError, match="chunk_size"):
        Observer.load_from_registry(name, "weight", GROUP.args(), chunk_size=64)
