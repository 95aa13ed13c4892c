"""A float32 histogram with one huge value: the bound over the pooled optimum holds."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, fake_quantize

from calipers.observers import Observer


@pytest.mark.parametrize("sigmas", [1e4, 1e5, 1e6])
@pytest.mark.parametrize("bits", [4, 8])
def test_one_outlier(bits, sigmas):
    args = QuantizationArgs(num_bits=bits, strategy="tensor")
    x = torch.randn(1, 100_000, generator=torch.Generator().manual_seed(0))
    x[0, 7] = sigmas * 1.2345

    def error(scale):
        zero = torch.zeros(1, dtype=torch.int8)
        return float((fake_quantize(x, scale, zero, args) - x).double().square().sum())

    scale, _ = Observer.load_from_registry("histogram", "input", args)(x)
    codes = range(1, 2 ** (bits - 1))
    best = min(error(x[:, 7] / code) for code in codes)
    assert error(scale) <= best * 1.003
