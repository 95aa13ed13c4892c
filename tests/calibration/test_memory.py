"""Peak memory of freezing, counted by watching every storage that torch operations make."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from calipers.calibration import attach

WIDTH = 1024
MATRIX = WIDTH * WIDTH * 4  # one weight in float32


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages made inside the block that are alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, torch.Tensor):
                self._seen.setdefault(value.untyped_storage(), 0)
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self._add(value.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage in self._seen:
            return
        self._seen[storage] = storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, storage.nbytes())

    def _drop(self, size: int) -> None:
        self.live -= size


def stack(count: int, dtype: torch.dtype, width: int = WIDTH) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(count))).to(dtype)


def peak_of_freezing(model: nn.Module, scheme: QuantizationScheme, observer: str) -> int:
    # three steps of the grid take the memory of all twenty
    options = {"maxshrink": 0.03} if observer == "memoryless_mse" else {}
    with (
        attach(model, scheme, observer=observer, observer_options=options) as calibration,
        LiveBytes() as counter,
    ):
        calibration.freeze()
    qparams = sum(
        parameter.nbytes
        for name, parameter in model.named_parameters()
        if not name.endswith("weight")
    )
    return counter.peak - qparams


def test_the_counter_counts():
    with LiveBytes() as counter:
        kept = torch.zeros(1000)
        twice = kept * 2
        assert counter.live == 8000
        del twice
        kept.view(10, 100).add_(1)
        assert (counter.live, counter.peak) == (4000, 8000)


GROUP = QuantizationArgs(num_bits=4, group_size=128)
CHANNEL = QuantizationArgs(num_bits=8, strategy="channel")
BLOCK = QuantizationArgs(num_bits=8, type="float", strategy="block", block_structure=[128, 128])
TENSOR = QuantizationArgs(num_bits=8, type="float", strategy="tensor")


@pytest.mark.parametrize(
    ("weights", "dtype", "observer"),
    [
        (GROUP, torch.bfloat16, "memoryless_mse"),
        (CHANNEL, torch.float32, "memoryless_minmax"),
        (BLOCK, torch.float32, "memoryless_minmax"),
        (TENSOR, torch.float32, "memoryless_mse"),
    ],
)
def test_extra_memory_stays_under_one_weight_matrix_in_float32(weights, dtype, observer):
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    assert peak_of_freezing(stack(1, dtype), scheme, observer) < MATRIX


def test_extra_memory_does_not_grow_with_the_number_of_weights():
    scheme = QuantizationScheme(targets=["Linear"], weights=GROUP)
    few = peak_of_freezing(stack(1, torch.float32, 512), scheme, "memoryless_minmax")
    many = peak_of_freezing(stack(4, torch.float32, 512), scheme, "memoryless_minmax")
    assert many <= few + 64 * 1024
