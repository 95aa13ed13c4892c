"""What observers do on an accelerator: no device is mixed, and activations read nothing back.

Without a GPU that shows on fake tensors: under FakeTensorMode they have a device and no values, two
devices in one operation raise, and so does reading a value back. Fake tensors of "cuda" cannot be
indexed by a build of torch without CUDA (it asks for a guard of the device); those of "meta" can,
and behave the same in all else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

from calipers.formats import is_known_to_library
from calipers.observers import Observer
from memoised import forget_tables

#: Tests register observers of their own.
NAMES = sorted(
    name
    for name in Observer.registered_names()
    if Observer.get_value_from_registry(name).__module__.startswith("calipers.")
)
SHAPES = {"weight": (64, 128), "input": (2, 8, 128), "k": (2, 4, 8, 32)}
STRATEGIES = {
    "weight": ["tensor", "channel", "group", "block", "tensor_group"],
    "input": ["tensor", "token", "group", "tensor_group"],
    "k": ["tensor", "attn_head"],
}
CASES = [(base, strategy) for base, strategies in STRATEGIES.items() for strategy in strategies]
ACTIVATIONS = [case for case in CASES if case[0] != "weight"]
#: These search a range whenever they observe, and ask the device whether the search can end.
SEARCHING = {"memoryless-mse", "mse", "imatrix-mse", "optimal"}
#: They pick values (the patterns that occurred, the groups that need a closer look), and how many
#: that are only a device with values can tell.
HOW_MANY_TELLS_THE_DEVICE = {"histogram", "optimal"}


def args_of(strategy: str) -> QuantizationArgs:
    if strategy == "group":
        return QuantizationArgs(num_bits=4, strategy="group", group_size=32)
    if strategy == "block":
        return QuantizationArgs(num_bits=8, strategy="block", block_structure=[32, 32])
    if strategy == "tensor_group":
        return QuantizationArgs(
            num_bits=4,
            type="float",
            strategy="tensor_group",
            group_size=16,
            scale_dtype=torch.float8_e4m3fn,
        )
    if strategy == "token":
        dynamic = QuantizationArgs(num_bits=8, strategy="token", dynamic=True)
        return dynamic.model_copy(update={"dynamic": False})
    return QuantizationArgs(num_bits=8, strategy=strategy)


@pytest.fixture(autouse=True)
def without_engines(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Torch operations alone, on tensors that observers refuse elsewhere, being fake.

    What was worked out of them must not be found again by other tests.
    """
    monkeypatch.setenv("CALIPERS_ENGINE", "eager")
    for module in ("calipers.observers.statistics", "calipers.ranges.qparams"):
        for name in ("plain_values", "plain_tensor"):
            monkeypatch.setattr(f"{module}.{name}", torch.Tensor.detach, raising=False)
    forget_tables()
    for strategies in STRATEGIES.values():
        for strategy in strategies:  # asks compressed-tensors by a value, once in a process
            assert is_known_to_library(args_of(strategy))
    yield
    forget_tables()


@contextmanager
def answered_readbacks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let every value that is read back be False or 1."""
    with monkeypatch.context() as patched:
        for name, value in (("bool", False), ("int", 1), ("float", 1.0)):
            patched.setattr(torch.Tensor, f"__{name}__", lambda tensor, value=value: value)
        yield


def build(name: str, base: str, strategy: str) -> Observer:
    options: dict[str, object] = {"objective": "mse"} if name == "optimal" else {}
    if "expanded" in name:  # 200 candidates would take minutes of fake operations
        options = {"grid": 20.0}
    return Observer.load_from_registry(name, base, args_of(strategy), **options)


@pytest.mark.parametrize(("base", "strategy"), CASES)
@pytest.mark.parametrize("name", NAMES)
def test_all_tensors_are_on_the_device_of_the_value(
    name: str, base: str, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    observer = build(name, base, strategy)
    with FakeTensorMode(allow_non_fake_inputs=True), answered_readbacks(monkeypatch):
        value = torch.empty(SHAPES[base], device="meta", dtype=torch.bfloat16)
        given = torch.ones(1, device="meta") if strategy == "tensor_group" else None
        try:
            observer.observe(value)
            if strategy == "tensor_group":
                assert observer.get_global_scale(value).device.type == "meta"
            found = observer.get_qparams(global_scale=given)
        except DynamicOutputShapeException:
            assert name in HOW_MANY_TELLS_THE_DEVICE
            return
        assert all(each.device.type == "meta" for each in found)


@pytest.mark.parametrize(("base", "strategy"), ACTIVATIONS)
@pytest.mark.parametrize("name", [name for name in NAMES if name not in SEARCHING])
def test_observing_an_activation_reads_nothing_back(name: str, base: str, strategy: str) -> None:
    observer = build(name, base, strategy)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for _ in range(2):
            value = torch.empty(SHAPES[base], device="meta", dtype=torch.bfloat16)
            observer.observe(value)
            observer.record_observed_tokens(value)
            if strategy == "tensor_group":
                observer.observe_global(value)
    assert observer.num_batches == 2


@pytest.mark.parametrize(("base", "strategy"), ACTIVATIONS)
@pytest.mark.parametrize("name", [name for name in NAMES if "imatrix" not in name])
def test_counting_on_the_device_gives_the_same(
    name: str, base: str, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN and Inf are left out as on the CPU, and are counted by the time somebody asks."""
    monkeypatch.delenv("CALIPERS_ENGINE")
    torch.manual_seed(0)
    batches = [torch.randn(SHAPES[base]) for _ in range(3)]
    batches[1].view(-1)[::7] = torch.nan
    batches[1].view(-1)[3] = torch.inf
    given = torch.ones(1) if strategy == "tensor_group" else None
    found = []
    for later in (False, True):
        observer = build(name, base, strategy)
        if later:
            monkeypatch.setattr(type(observer), "_counts_on_device", lambda self, value: True)
        for batch in batches:
            observer.observe(batch)
        assert (observer._uncounted is not None) is later
        found.append((*observer.get_qparams(global_scale=given), observer.num_nonfinite))
        assert observer._uncounted is None
    (scale, zero_point, count), (same, same_zero, same_count) = found
    assert torch.equal(scale, same)
    assert torch.equal(zero_point, same_zero)
    assert count == same_count == int((~batches[1].isfinite()).sum())


def test_nothing_but_nan_shows_when_scales_are_derived(monkeypatch: pytest.MonkeyPatch) -> None:
    observer = build("static_minmax", "input", "tensor")
    monkeypatch.setattr(type(observer), "_counts_on_device", lambda self, value: True)
    observer.observe(torch.full((2, 8), torch.nan))
    with pytest.raises(ValueError, match=r"value\.input: all observed values are NaN or Inf"):
        observer.get_qparams()
    observer.observe(torch.ones(2, 8))
    assert float(observer.get_qparams()[0]) == pytest.approx(2 / 255)
    assert observer.num_nonfinite == 16
