"""Surroundings, wide ranges and equal candidates, for the observers and formats that need more."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor, nn

from calipers.observers import Observer
from calipers.ranges import ShrinkGrid, group_values, min_max, search_grid_ranges
from memoised import forget_tables
from observers.samples import NVFP4, sample

INT4 = {"num_bits": 4, "strategy": "group", "group_size": 16}
MXFP4 = {
    "num_bits": 4,
    "type": "float",
    "strategy": "group",
    "group_size": 32,
    "scale_dtype": torch.uint8,
    "zp_dtype": torch.uint8,
}
KINDS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("histogram", {**INT4, "strategy": "channel", "group_size": None}, {}),
    ("imatrix_mse", INT4, {}),
    ("optimal", INT4, {"objective": "imatrix"}),
    ("optimal", INT4, {"objective": "hessian"}),
    *[
        (name, format, {"objective": "mse"} if name == "optimal" else {})
        for name in ("memoryless_minmax", "nvfp4_expanded_mse", "optimal")
        for format in (NVFP4, MXFP4)
    ],
]


def qparams(
    name: str, format: dict[str, Any], options: dict[str, Any], value: Tensor, inputs: Tensor
) -> list[Tensor]:
    module = nn.Module()
    observer = Observer.load_from_registry(
        name, "weight", QuantizationArgs(**format), module, **options
    )
    found = []
    if format is NVFP4:
        found.append(observer.get_global_scale(value))
        module.register_buffer("weight_global_scale", found[0])
    if "imatrix" in name or options.get("objective") in ("imatrix", "hessian"):
        observer.observe_input(inputs)
    return [*found, *observer(value)]


@pytest.fixture(autouse=True)
def forgotten_tables() -> None:
    """What is memoised is computed anew, so that odd surroundings may leave their traces in it."""
    forget_tables()


@pytest.mark.parametrize("engine", ["native", "eager"])
@pytest.mark.parametrize("around", ["double", "bfloat16", "meta", "autocast"])
@pytest.mark.parametrize(("name", "format", "options"), KINDS)
def test_surroundings_do_not_matter_then_or_later(
    name: str,
    format: dict[str, Any],
    options: dict[str, Any],
    around: str,
    engine: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CALIPERS_ENGINE", engine)
    cell = name, format, options, sample((4, 64), 1), sample((40, 64), 2)
    try:
        if around == "meta":
            torch.set_default_device("meta")
        elif around != "autocast":
            torch.set_default_dtype({"double": torch.float64, "bfloat16": torch.bfloat16}[around])
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=around == "autocast"):
            odd = qparams(*cell)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    later = qparams(*cell)
    for one, two in zip(odd, later, strict=True):
        assert one.dtype == two.dtype
        assert one.device == two.device
        assert torch.equal(one.float(), two.float())
    low, high = cell[3].aminmax()
    assert bool((odd[-2].float() > 0).all())
    if format is INT4:
        assert bool((odd[-2] < 1.6 * (high - low) / 15).all())  # twice the scale would not be


WIDE = [(torch.float16, 4e4), (torch.bfloat16, 2e38), (torch.float32, 2e38), (torch.float64, 1e300)]


@pytest.mark.parametrize(("dtype", "size"), WIDE)
@pytest.mark.parametrize(
    "strategy", [{"strategy": "channel"}, {"strategy": "block", "block_structure": [2, 16]}, INT4]
)
@pytest.mark.parametrize("name", ["memoryless_minmax", "memoryless_mse", "histogram", "optimal"])
def test_wide_ranges_of_any_strategy_keep_scale_and_zero_point(
    name: str, strategy: dict[str, Any], dtype: torch.dtype, size: float
) -> None:
    """As those of the same values of size 1, times the size."""
    if name == "histogram" and dtype in (torch.float16, torch.float64):
        pytest.skip("no range beyond float16, no bins beyond float32: the matrix compares errors")
    args = {**strategy, "num_bits": 8, "symmetric": False}
    options = {"objective": "mse"} if name == "optimal" else {}
    factor = 2.0 ** int(math.log2(size))
    x = sample((4, 64), 3).to(dtype).clamp(-1, 1)
    scale, zero = qparams(name, args, options, (x.double() * factor).to(dtype), x)
    plain, its_zero = qparams(name, args, options, x, x)
    assert bool(scale.isfinite().all())
    relative = scale.double() / (plain.double() * factor) - 1
    assert float(relative.abs().max()) <= (0.02 if name != "memoryless_minmax" else 0.01)
    assert float((zero.float() - its_zero.float()).abs().max()) <= 2


@pytest.mark.parametrize("engine", ["native", "eager"])
def test_float64_hessian_at_any_size(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CALIPERS_ENGINE", engine)
    options = {"objective": "hessian"}
    x, inputs = sample((4, 64), 1), sample((40, 64), 2)
    plain, _ = qparams("optimal", INT4, options, x, inputs)
    for exponent in (900, -900, 130, -130):
        scale, _ = qparams("optimal", INT4, options, x.double() * 2.0**exponent, inputs)
        assert scale.dtype == torch.float64
        torch.testing.assert_close(scale / 2.0**exponent, plain.double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("grid", [(0.2, 100, 5, 2.4, 1.0), (1 - 0.8 / 1.8, 200, 1000, 2.4, 1.8)])
@pytest.mark.parametrize("size", [1, 32])
def test_mxfp4_of_single_elements(size: int, grid: tuple[Any, ...], dtype: torch.dtype) -> None:
    """Native and eager take the same step, for one element in a group and for equal ones."""
    x = torch.linspace(0.01, 8, 128).to(dtype).unsqueeze(1)
    views = group_values(x.expand(-1, size).contiguous(), "weight", QuantizationArgs(**MXFP4))
    args, extremes = QuantizationArgs(**MXFP4), [min_max(view) for view in views]
    found = [
        search_grid_ranges(views, extremes, args, ShrinkGrid(*grid), engine=engine)
        for engine in ("native", "eager")
    ]
    for one, two in zip(*found, strict=True):
        assert torch.equal(one[0], two[0])
        assert torch.equal(one[1], two[1])
