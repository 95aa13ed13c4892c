"""Quantization arguments, values and expected shapes that the tests of observers share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from loguru import logger
from torch import Tensor

from ranges.strategies import NVFP4

#: Without a GPU there are no cases of one: thousands of skipped tests would take a minute.
DEVICES = [
    "cpu",
    *([pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else []),
]

#: A global scale for values up to 12: above all samples, and their ranges times 1.8.
GLOBAL_SCALE = 448.0 * 6.0 / 12.0


@dataclass(frozen=True)
class Case:
    """A value, how it is quantized, and the shape its scales must have by the contract."""

    name: str
    shape: tuple[int, ...]
    qparams: tuple[int, ...]
    base_name: str = "weight"
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    @property
    def strategy(self) -> str:
        return self.options["strategy"]

    def args(self, **changes: Any) -> QuantizationArgs:
        return QuantizationArgs(**{"num_bits": 4, **self.options, **changes})

    def value(self, seed: int = 0, **kwargs: Any) -> Tensor:
        return sample(self.shape, seed, **kwargs)


def sample(
    shape: tuple[int, ...],
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Normal values with a few outliers, all within -4 and 4: shrinking a range pays in places."""
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(shape, generator=generator, dtype=torch.float64)
    value = torch.where(torch.rand(shape, generator=generator) < 0.05, value * 3, value)
    return (4 * torch.tanh(value / 4)).to(dtype).to(device)


_TENSOR = {"strategy": "tensor"}
_CHANNEL = {"strategy": "channel"}
_GROUP = {"strategy": "group", "group_size": 8}
_BLOCK = {"strategy": "block", "block_structure": [4, 8]}
_TOKEN = {"strategy": "token", "dynamic": True}
_HEAD = {"strategy": "attn_head"}

#: Every row of the contract's dispatch table, with short groups and blocks and leading dimensions.
CASES = [
    Case("tensor-0d", (), (1,), "weight", _TENSOR),
    Case("tensor-1d", (9,), (1,), "weight", _TENSOR),
    Case("tensor-2d", (6, 24), (1,), "weight", _TENSOR),
    Case("tensor-3d", (3, 6, 24), (1,), "weight", _TENSOR),
    Case("tensor-input", (2, 3, 4, 12), (1,), "input", _TENSOR),
    Case("tensor-q", (2, 3, 5, 4), (1,), "q", _TENSOR),
    Case("channel-1d", (6,), (6, 1), "weight", _CHANNEL),
    Case("channel-2d", (6, 24), (6, 1), "weight", _CHANNEL),
    Case("channel-experts", (3, 6, 24), (3, 6, 1), "weight", _CHANNEL),
    Case("group", (6, 24), (6, 3), "weight", _GROUP),
    Case("group-ragged", (6, 21), (6, 3), "weight", _GROUP),
    Case("group-wider", (6, 5), (6, 1), "weight", _GROUP),
    Case("group-experts", (3, 6, 21), (3, 6, 3), "weight", _GROUP),
    Case("group-input", (2, 3, 5, 24), (3,), "input", _GROUP),
    Case("tensor_group", (4, 48), (4, 3), "weight", NVFP4),
    Case("tensor_group-ragged", (4, 40), (4, 3), "weight", NVFP4),
    Case("block", (8, 16), (2, 2), "weight", _BLOCK),
    Case("block-ragged", (10, 21), (3, 3), "weight", _BLOCK),
    Case("block-wider", (3, 5), (1, 1), "weight", _BLOCK),
    Case("block-experts", (3, 10, 21), (3, 3, 3), "weight", _BLOCK),
    Case("token", (2, 5, 12), (2, 5, 1), "input", _TOKEN),
    Case("token-many-dims", (2, 3, 5, 12), (2, 3, 5, 1), "output", _TOKEN),
    Case("attn_head", (2, 3, 5, 4), (3, 1, 1), "k", _HEAD),
]
BY_NAME = {case.name: case for case in CASES}
WEIGHTS = [c for c in CASES if c.base_name == "weight" and len(c.shape) >= 2]
#: Values that come in batches, each with statistics of one shape.
BATCHED = [BY_NAME[n] for n in ("tensor-input", "tensor-q", "group-input", "attn_head")]


def wide(value: Tensor) -> Tensor:
    """Float8 tensors cannot be compared: as float32, which holds them exactly."""
    return value.float() if value.dtype == torch.float8_e4m3fn else value


def assert_same(actual: tuple[Any, Any], expected: tuple[Any, Any]) -> None:
    """Two pairs of scale and zero point are the same, bit for bit, dtype for dtype."""
    for name, one, two in zip(("scale", "zero_point"), actual, expected, strict=True):
        assert one is not None, f"{name} is None"
        assert two is not None, f"expected {name} is None"
        assert one.dtype == two.dtype, name
        assert one.shape == two.shape, name
        assert torch.equal(wide(one), wide(two)), f"{name}: {one} != {two}"


def differs(actual: tuple[Any, Any], other: tuple[Any, Any]) -> bool:
    return not torch.equal(wide(actual[0]), wide(other[0]))


def assert_same_state(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        assert torch.equal(actual[name].cpu(), value.cpu()), name


@contextmanager
def logged(level: str) -> Iterator[list[str]]:
    """The messages that are logged at `level` or above meanwhile."""
    lines: list[str] = []
    handle = logger.add(lambda m: lines.append(m.record["message"]), level=level)
    try:
        yield lines
    finally:
        logger.remove(handle)
