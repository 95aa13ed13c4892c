"""Sums over inputs stay finite, and tell of the other inputs, whatever size a few of them have."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import nn

from calipers.observers import Observer
from observers.samples import logged, sample

GROUP = QuantizationArgs(num_bits=4, strategy="group", group_size=8)
CHANNEL = QuantizationArgs(num_bits=4, strategy="channel")
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("imatrix_mse", {}),
    ("optimal", {}),
    ("optimal", {"objective": "hessian"}),
]
kinds = pytest.mark.parametrize(("name", "options"), KINDS, ids=["imatrix", "optimal", "hessian"])


def build(name: str, options: dict[str, Any], args: QuantizationArgs = GROUP) -> Observer:
    torch.manual_seed(0)
    module = nn.Linear(32, 8, bias=False)
    observer = Observer.load_from_registry(name, "weight", args, module, **options)
    observer.name = "layer.weight"
    return observer


def assert_finite(observer: Observer) -> None:
    for name, value in observer.state().items():
        assert bool(value.isfinite().all()), name
        if name.startswith("input"):
            assert value.dtype == torch.float64


@pytest.mark.parametrize("args", [GROUP, CHANNEL], ids=["group", "channel"])
@pytest.mark.parametrize(
    ("freak", "dtype"),
    [
        (1e20, torch.float32),
        (-3e38, torch.float32),
        (1e20, torch.bfloat16),
        (1e200, torch.float64),
        (torch.inf, torch.float32),
    ],
    ids=str,
)
@kinds
def test_one_freak_input(
    name: str, options: dict[str, Any], freak: float, dtype: torch.dtype, args: QuantizationArgs
) -> None:
    """It is left out and counted: the result is that of a zero in its place."""
    x, weight = sample((64, 32), 1).to(dtype), sample((8, 32), 2)
    x[5, 3] = 0
    calm = build(name, options, args)
    calm.observe_input(x)
    expected = calm(weight)
    x[5, 3] = freak
    observer = build(name, options, args)
    with logged("WARNING") as messages:
        observer.observe_input(x)
        observer.observe_input(sample((64, 32), 3).to(dtype))
    assert_finite(observer)
    assert observer.num_nonfinite == 1
    (message,) = messages
    assert "inputs of layer: left out 1 " in message
    assert "of 2048 values" in message
    observer.reset()
    observer.observe_input(x)
    # Sums are float64 for the one and float32 for the other.
    torch.testing.assert_close(observer(weight), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("size", [1e20, 1e-25, 1e100, 1e-120])
@kinds
def test_inputs_of_one_size_give_the_same_scales_at_any_size(
    name: str, options: dict[str, Any], size: float
) -> None:
    x, weight = sample((64, 32), 1).double(), sample((8, 32), 2)
    calm, observer = build(name, options), build(name, options)
    calm.observe_input(x)
    observer.observe_input(x * size)
    assert_finite(observer)
    assert observer.num_nonfinite == 0
    torch.testing.assert_close(observer(weight), calm(weight), rtol=1e-5, atol=0)


@kinds
def test_zeros_are_no_freaks(name: str, options: dict[str, Any]) -> None:
    observer = build(name, options)
    with logged("WARNING") as messages:
        observer.observe_input(torch.zeros(4, 32))
        observer.observe_input(torch.eye(32) * 1e20)
    assert observer.num_input_tokens == 36
    assert observer.num_nonfinite == 0
    assert_finite(observer)
    assert not messages


@kinds
def test_half_precision_inputs_are_not_summed_in_it(name: str, options: dict[str, Any]) -> None:
    x = torch.full((70_000, 32), 3.0, dtype=torch.float16)
    observer = build(name, options)
    observer.observe_input(x)
    assert torch.equal(observer.input_square_sum, torch.full((32,), 630_000.0).double())


@kinds
def test_messages_about_inputs_name_the_module_and_its_inputs(
    name: str, options: dict[str, Any]
) -> None:
    observer = build(name, options)
    observer.name = "0.weight"
    x = torch.ones(2, 32)
    x[0, 0] = torch.nan
    with logged("WARNING") as messages:
        observer.observe_input(x)
    (message,) = messages
    assert message.startswith("inputs of 0: left out 1 NaN or Inf of 64 values")
    with pytest.raises(ValueError, match=r"^inputs of 0: all 64 observed values are NaN or Inf"):
        observer.observe_input(torch.full((2, 32), torch.nan))
    with pytest.raises(ValueError, match=r"^inputs of 0: had 32 columns so far, got shape \(2, 3"):
        observer.observe_input(torch.ones(2, 3))
    observer.name = "weight"  # of a model that is one layer
    with pytest.raises(ValueError, match=r"^inputs: had 32 columns"):
        observer.observe_input(torch.ones(2, 3))
