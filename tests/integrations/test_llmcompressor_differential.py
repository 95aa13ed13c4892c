"""llmcompressor's observers against ours in their place: names, strategies, formats, dtypes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor, nn

from integrations.peer import MIN_MAX, NAMES, build
from ranges.strategies import MX, NVFP4

pytest.importorskip("llmcompressor")
from calipers.integrations.llmcompressor import install, uninstall
from calipers.observers import Observer as OurObserver

pytestmark = pytest.mark.filterwarnings("ignore:The 'fouroversix' observer is an alias")

INTS = {
    f"int{bits}{'' if symmetric else '-asym'}": {"num_bits": bits, "symmetric": symmetric}
    for bits in (4, 8)
    for symmetric in (True, False)
}
FORMATS: dict[str, dict[str, Any]] = {**INTS, "fp8": {"num_bits": 8, "type": "float"}}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor": {"strategy": "tensor"},
    "channel": {"strategy": "channel"},
    "group": {"strategy": "group", "group_size": 32},
    "tensor_group": {"strategy": "tensor_group", "group_size": 16},
    "block": {"strategy": "block", "block_structure": [24, 40]},
}
WEIGHTS = [
    *({**number, **layout} for number in FORMATS.values() for layout in LAYOUTS.values()),
    NVFP4,
    {"num_bits": 4, **MX},
]
INPUTS: list[tuple[str, dict[str, Any]]] = [
    (base_name, {**number, **layout})
    for number in FORMATS.values()
    for base_name, layout in (
        ("input", {"strategy": "tensor"}),
        ("output", {"strategy": "tensor"}),
        ("input", {"strategy": "tensor_group", "group_size": 16}),
        ("q", {"strategy": "tensor"}),
        ("k", {"strategy": "attn_head"}),
    )
]


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    uninstall()


def pair(name: str, args: QuantizationArgs, base_name: str = "weight") -> tuple[Any, Any]:
    """llmcompressor's observer and ours in its place."""
    theirs = build(name, args, base_name)
    with install(replace=True):
        ours = build(name, args, base_name)
    assert type(ours).__name__.startswith("Calipers")
    assert isinstance(ours, type(theirs))
    return theirs, ours


def weight(dtype: torch.dtype = torch.float32, rows: int = 72, cols: int = 256) -> Tensor:
    """Rows of different size and centre, with some outliers and a row of zeros."""
    generator = torch.Generator().manual_seed(rows + cols)
    values = torch.randn(rows, cols, generator=generator)
    values *= torch.linspace(0.1, 3, rows).unsqueeze(1)
    values += torch.linspace(-0.5, 0.5, rows).unsqueeze(1)
    values[:, ::29] *= 4
    values[5] = 0
    return values.to(dtype)


def activations(base_name: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    shape = (2, 4, 6, 32) if base_name in ("q", "k", "v") else (2, 9, 64)
    return [(torch.randn(shape, generator=generator) * s + 0.3).to(dtype) for s in (1, 2, 0.5)]


def assert_same(theirs: dict[str, Tensor], ours: dict[str, Tensor]) -> None:
    assert theirs.keys() == ours.keys()
    for key, expected in theirs.items():
        if expected is None:
            assert ours[key] is None
            continue
        assert ours[key].dtype == expected.dtype, key
        # Compared as float64: torch.equal lacks float8.
        assert torch.equal(ours[key].double(), expected.double()), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MIN_MAX)
def test_min_max_of_weights_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    for options in WEIGHTS:
        theirs, ours = pair(name, QuantizationArgs(**options))
        value = weight(dtype)
        assert_same(theirs(value).get_qparams(), ours(value).get_qparams())


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float32) for name in MIN_MAX),
        *((name, dtype) for name in MIN_MAX[:2] for dtype in (torch.float16, torch.bfloat16)),
    ],
    ids=str,
)
def test_min_max_of_activations_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    for base_name, options in INPUTS:
        theirs, ours = pair(name, QuantizationArgs(**options), base_name)
        for batch in activations(base_name, dtype):
            theirs(batch)
            ours(batch)
        assert_same(theirs.get_qparams(), ours.get_qparams())


def steps_apart(theirs: Any, ours: Any) -> tuple[int, int]:
    """Groups whose ranges lie on different steps, and all groups.

    The steps of every grid here are at least half a percent of the range apart; the same step comes
    out within a few units in the last place of float32.
    """
    length = theirs.max_vals - theirs.min_vals
    other = ours.max_vals - ours.min_vals
    assert other.shape == length.shape
    return int(((other - length).abs() > 1e-5 * length).sum()), length.numel()


@pytest.mark.parametrize("name", NAMES[3:])
def test_grids_pick_the_same_step(name: str) -> None:
    differ, groups = 0, 0
    for options in WEIGHTS:
        theirs, ours = pair(name, QuantizationArgs(**options))
        value = weight()
        if "imatrix" in name:
            feed(theirs, value)
            feed(ours, value)
        apart, number = steps_apart(theirs(value), ours(value))
        differ, groups = differ + apart, groups + number
        if not apart:
            assert_same(theirs.get_qparams(), ours.get_qparams())
    assert groups > 10_000
    assert differ <= 1e-4 * groups


def feed(observer: Any, value: Tensor) -> None:
    """Let it see inputs whose columns differ in energy."""
    module = nn.Linear(value.shape[1], value.shape[0], bias=False)
    observer.attach(module)
    generator = torch.Generator().manual_seed(3)
    spread = torch.rand(value.shape[1], generator=generator) * 3
    for _ in range(2):
        module(torch.randn(4, 8, value.shape[1], generator=generator) * spread)
    observer.detach(module)


@pytest.mark.parametrize("name", NAMES[3:])
def test_grids_on_activations(name: str) -> None:
    differ, groups = 0, 0
    for base_name, options in INPUTS:
        theirs, ours = pair(name, QuantizationArgs(**options), base_name)
        for batch in activations(base_name):
            apart, number = steps_apart(theirs(batch), ours(batch))
            differ, groups = differ + apart, groups + number
    assert differ == 0, f"{differ} of {groups}"


@pytest.mark.parametrize("name", NAMES)
def test_options_reach_the_search(name: str) -> None:
    """Options in the arguments and by keyword: as llmcompressor takes them."""
    if name in ("minmax", "mse"):
        options: dict[str, Any] = {"averaging_constant": 0.3}
    elif name in MIN_MAX:
        options = {}
    else:
        options = {"norm": 2.0, "maxshrink": 0.5, "grid": 40}
    plain = QuantizationArgs(num_bits=4, strategy="group", group_size=32)
    full = plain.model_copy(update={"observer_kwargs": options})
    value = weight()
    given_both_ways: list[tuple[QuantizationArgs, dict[str, Any]]] = [(full, {}), (plain, options)]
    for given, by_keyword in given_both_ways:
        theirs = build(name, given, **by_keyword)
        with install(replace=True):
            ours = build(name, given, **by_keyword)
        assert steps_apart(theirs(value), ours(value))[0] == 0


class Scales(OurObserver):
    """The first form: an observer that answers with scales."""

    def calculate_qparams(
        self, observed: Tensor, reduce_dims: Any = None, tensor_id: Any = None
    ) -> tuple[Tensor, Tensor]:
        dims = tuple(range(observed.dim())) if reduce_dims is None else reduce_dims
        scale = observed.abs().amax(dims, keepdim=True) / 7.1
        return scale, torch.full_like(scale, 3, dtype=torch.int8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
def test_an_observer_that_answers_with_scales_is_handed_over(
    dtype: torch.dtype, symmetric: bool
) -> None:
    from calipers.integrations.llmcompressor.adapter import adapt

    args = QuantizationArgs(num_bits=4, strategy="group", group_size=32, symmetric=symmetric)
    value = weight(dtype)
    value[5] = 1
    expected, zero_point = Scales(args)(value)
    with install():
        found = adapt(Scales)("weight", args)(value).get_qparams()
    assert found["scale"].dtype == expected.dtype == dtype
    assert torch.equal(found["scale"], expected)
    assert torch.equal(
        found["zero_point"], torch.zeros_like(zero_point) if symmetric else zero_point
    )
