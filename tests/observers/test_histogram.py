"""The histogram observer: pooled over batches, observers and heads."""

from __future__ import annotations

import copy

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor, nn

import calipers
from calipers.observers import HistogramObserver, Observer
from observers.samples import assert_same, assert_same_state, differs
from ranges.test_histogram import FORMATS, smallest_error, squared_error

HEAD = QuantizationArgs(num_bits=8, strategy="attn_head")


def per_tensor(kind: str, **changes: object) -> QuantizationArgs:
    return QuantizationArgs(strategy="tensor", **{**FORMATS[kind], **changes})


def stream(dtype: torch.dtype, batches: int = 24) -> list[Tensor]:
    """Batches whose width grows to four times what it was, two of them with outliers."""
    generator = torch.Generator().manual_seed(11)
    found = []
    for i in range(batches):
        batch = torch.randn(4, 16, 24, generator=generator) * (0.5 + 1.5 * i / (batches - 1))
        if i in (5, 17):
            batch[torch.rand(batch.shape, generator=generator) < 0.02] *= 20
        found.append(batch.to(dtype))
    return found


def pool(batches: list[Tensor], args: QuantizationArgs, name: str = "histogram") -> Observer:
    observer = Observer.load_from_registry(name, "input", args)
    for batch in batches:
        observer.observe(batch)
    return observer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["int8", "int4", "int4-asymmetric", "fp8"])
def test_error_is_that_of_the_pooled_optimum(kind: str, dtype: torch.dtype) -> None:
    args, batches = per_tensor(kind), stream(dtype)
    values = torch.cat(batches).flatten()
    best = smallest_error(values, args, dtype)
    error = squared_error(values, *pool(batches, args).get_qparams(), args)
    assert error <= best * 1.003
    plain = squared_error(values, *pool(batches, args, "static_minmax").get_qparams(), args)
    assert plain > best * 1.01, "these batches cannot tell"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_any_order_and_any_split_give_the_same(dtype: torch.dtype) -> None:
    args, batches = per_tensor("int8"), stream(dtype)
    one = pool(batches, args)
    shuffled = [batches[i] for i in torch.randperm(24, generator=torch.Generator().manual_seed(1))]
    assert_same_state(pool(shuffled, args).state(), one.state())
    parts = [pool(shuffled[i::5], args) for i in range(5)]
    merged = parts.pop(2)
    for part in parts:
        merged.merge(part)
    assert_same_state(merged.state(), one.state())
    assert_same(merged.get_qparams(), one.get_qparams())
    assert merged.num_batches == 24


def test_each_head_has_a_histogram_of_its_own() -> None:
    generator = torch.Generator().manual_seed(3)
    batches = [torch.randn(2, 3, 10, 8, generator=generator).bfloat16() * i for i in (1, 4, 2)]
    observer = Observer.load_from_registry("histogram", "k", HEAD)
    for batch in batches:
        observer.observe(batch)
    scale, zero_point = observer.get_qparams()
    assert scale.shape == (3, 1, 1)
    args = per_tensor("int8")
    for head in range(3):
        alone = Observer.load_from_registry("histogram", "k", args)
        for batch in batches:
            alone.observe(batch[:, head : head + 1])
        expected = alone.get_qparams()
        assert_same((scale[head, 0], zero_point[head, 0]), expected)


def test_methods() -> None:
    args, batches = per_tensor("int8"), stream(torch.float32)
    plain = pool(batches, args, "static_minmax").get_qparams()
    extremes = pool(batches, per_tensor("int8", observer_kwargs={"method": "minmax"}))
    assert_same(extremes.get_qparams(), plain)
    options = {"method": "percentile", "percentile": 99.0}
    clipped = pool(batches, per_tensor("int8", observer_kwargs=options))
    limit = torch.cat(batches).abs().flatten().double().quantile(0.99)
    # The scale of symmetric int8 is 2/255 of the size; a bin of float32 is within 1/128.
    expected = limit.float() * 2 / 255
    torch.testing.assert_close(clipped.get_qparams()[0][0], expected, rtol=1 / 128, atol=0)
    assert differs(clipped.get_qparams(), plain)


def test_deriving_does_not_disturb_what_was_counted() -> None:
    args, batches = per_tensor("fp8"), stream(torch.bfloat16)
    observer = pool(batches[:8], args)
    observer.get_qparams()
    before = copy.deepcopy(observer.state())
    observer.calculate_qparams(batches[9])
    assert_same_state(observer.state(), before)
    for batch in batches[8:]:
        observer(batch)
    assert_same(observer.get_qparams(), pool(batches, args).get_qparams())


def test_dtypes_that_cannot_be_counted_together_are_refused() -> None:
    args = per_tensor("int8")
    observer = pool(stream(torch.bfloat16, 3), args)
    state = observer.state()
    with pytest.raises(ValueError, match=r"bfloat16 so far and are torch\.float16 now"):
        observer.observe(torch.ones(3, dtype=torch.float16))
    with pytest.raises(ValueError, match=r"bfloat16 so far and are torch\.float32 now"):
        observer.merge(pool([torch.ones(3)], args))
    assert_same_state(observer.state(), state)
    other = pool([torch.ones(3, dtype=torch.int8)], args)
    other.observe(torch.ones(3, dtype=torch.float64))
    assert other.counts.sum() == 6


def test_too_many_scales_are_refused_by_name() -> None:
    args = QuantizationArgs(num_bits=4, strategy="group", group_size=32)
    observer = HistogramObserver("weight", args, nn.Linear(64, 1024))
    with pytest.raises(ValueError, match=r"Linear\.weight.*at most 512.*'group' gives 2048"):
        observer(torch.ones(1024, 64))
    assert observer.get_qparams() == (None, None)
    token = HistogramObserver("input", QuantizationArgs(strategy="token", dynamic=True))
    with pytest.raises(ValueError, match="'token' gives 513"):
        token(torch.ones(1, 513, 8))


def test_calibrate_takes_it_by_name() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    report = calipers.calibrate(
        model,
        "FP8",
        "memoryless_minmax",
        [torch.randn(5, 16) for _ in range(3)],
        activation_observer="histogram",
    )
    assert [module.activation_observer for module in report.modules] == ["histogram"] * 2
    assert model[2].input_scale.shape == (1,)
    assert model[2].input_scale > 0
