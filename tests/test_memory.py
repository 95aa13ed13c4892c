"""No address reaches a kernel before it is known what lies there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor

from calipers.engines import dispatch
from calipers.engines.native import abi
from calipers.memory import UnreadableError, is_readable
from calipers.ranges import (
    ShrinkGrid,
    group_values,
    min_max,
    search_grid_ranges,
    search_optimal_scales,
)
from odd_tensors import REFUSED, SAME, negative_bit

CHANNEL = QuantizationArgs(num_bits=4, strategy="channel")
GRID = ShrinkGrid(0.2, 100, 5, 2.4)
TESTS = Path(__file__).parent.parent
#: What the old code read at address zero: each observer and engine call, in a process of its own.
CHILD = """
import sys, warnings
warnings.simplefilter("ignore")
import torch
from compressed_tensors.quantization import QuantizationArgs
from calipers.observers import Observer
from odd_tensors import REFUSED, SAME
value = torch.randn(34, 512, generator=torch.Generator().manual_seed(0))
args = QuantizationArgs(num_bits=4, strategy="channel")
for kind in sys.argv[1:]:
    print(kind, flush=True)
    for name, options in {"memoryless_mse": {}, "optimal": {"objective": "mse"}}.items():
        observer = Observer.load_from_registry(name, "weight", args, None, **options)
        try:
            scale, _ = observer({**REFUSED, **SAME}[kind][0](value))
            assert scale.shape == (34, 1) and bool((scale > 0).all())
        except ValueError as error:
            assert str(error).startswith("value.weight: "), error
"""


def value() -> Tensor:
    return torch.randn(34, 512, generator=torch.Generator().manual_seed(0)).exp() - 0.5


@pytest.fixture(autouse=True)
def _nothing_is_given_up(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dispatch, "_failures", {})
    yield
    assert dispatch._failures == {}


@pytest.mark.slow
def test_tensors_without_memory_do_not_end_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = ["DTensor", "FakeTensor", "wrapper", "zero tensor", "memory given back"]
    monkeypatch.setenv("CALIPERS_ENGINE", "native")
    monkeypatch.syspath_prepend(str(TESTS))
    monkeypatch.setenv("PYTHONPATH", ":".join(path for path in sys.path if path))
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *kinds], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr


def searches(x: Tensor, engine: str) -> list[Tensor]:
    """Each search on the same views."""
    view = group_values(x, "weight", CHANNEL)[0]
    extremes = min_max(view, engine=engine)
    (grid,) = search_grid_ranges([view], [extremes], CHANNEL, GRID, engine=engine)
    (best,) = search_optimal_scales([view], [extremes], CHANNEL, engine=engine)
    return [*extremes, *grid, best[0]]


@pytest.mark.parametrize("kind", ["negative bit", "zero tensor"])
def test_the_searches_leave_to_eager_what_a_kernel_cannot_read(kind: str) -> None:
    make, meant = SAME[kind]
    for found, expected in zip(
        searches(make(value()), "native"), searches(meant(value()), "eager"), strict=True
    ):
        assert torch.equal(found, expected)


def test_importance_that_a_kernel_cannot_read() -> None:
    view = group_values(value(), "weight", CHANNEL)[0]
    extremes, found = min_max(view), []
    weights = torch.rand(34, 512, generator=torch.Generator().manual_seed(1))
    for each, engine in ((negative_bit(-weights), "native"), (weights, "eager")):
        importance = list(group_values(each, "weight", CHANNEL))
        (pair,) = search_optimal_scales(
            [view], [extremes], CHANNEL, importance=importance, engine=engine
        )
        found.append(pair[0])
    assert torch.equal(*found)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", sorted({**REFUSED, **SAME}.keys() - {"list", "not initialized"}))
def test_no_address_is_told(kind: str) -> None:
    odd = {**REFUSED, **SAME}[kind][0](value())
    if kind in ("no numbers", "complex"):  # they lie in memory, but no kernel reads them
        with pytest.raises(TypeError):
            abi.address(odd)
        return
    assert not is_readable(odd)
    with pytest.raises(UnreadableError, match="cannot be read where it lies"):
        abi.address(odd, odd.dtype)


def test_other_dtypes_numbers_and_gaps_are_faults() -> None:
    x = value()
    assert abi.address(None) is None
    assert abi.address(x, count=x.numel()) == x.data_ptr()
    for wrong in (
        lambda: abi.address(x, torch.float64),
        lambda: abi.address(x, count=x.numel() + 1),
        lambda: abi.address(x.t()),
    ):
        with pytest.raises(TypeError):
            wrong()


def test_an_engine_is_given_up_only_where_the_reference_succeeds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails() -> None:
        raise RuntimeError("sizes do not match")

    def unreadable() -> None:
        raise UnreadableError("not in memory")

    with pytest.raises(RuntimeError, match="sizes do not match"):
        dispatch.attempt("native", fails, fails)
    assert dispatch.attempt("native", unreadable, lambda: 1) == 1
    assert dispatch._failures == {}
    assert dispatch.attempt("native", fails, lambda: 1) == 1
    assert dispatch._failures.pop("native") == (
        "the native engine failed: RuntimeError: sizes do not match"
    )
