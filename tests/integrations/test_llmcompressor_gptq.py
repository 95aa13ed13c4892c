"""Negative scales in llmcompressor's recipes: handed over as they are, and what GPTQ rounds to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor

pytest.importorskip("llmcompressor")

from calipers.integrations.llmcompressor import install, uninstall
from calipers.observers import OptimalObserver

ROWS, COLS = 16, 64
OPTIONS = {"objective": "mse", "negative_scales": True}


@pytest.fixture(autouse=True)
def _uninstalled() -> Iterator[None]:
    yield
    uninstall()


def arguments() -> QuantizationArgs:
    return QuantizationArgs(
        num_bits=3, strategy="group", group_size=32, observer="optimal", observer_kwargs=OPTIONS
    )


def sample() -> Tensor:
    return torch.randn(ROWS, COLS, generator=torch.Generator().manual_seed(0)) * 0.1


def observed() -> Any:
    from llmcompressor.observers import Observer as PeerObserver

    observer = PeerObserver.load_from_registry("optimal", base_name="weight", args=arguments())
    return observer(sample())


def test_they_are_those_of_the_observer() -> None:
    install()
    observer = observed()
    assert observer.has_statistics
    found = observer.get_qparams()
    scale, zero_point = OptimalObserver("weight", arguments()).get_qparams(sample())
    assert torch.equal(found["scale"], scale)
    assert bool((scale < 0).any())
    assert torch.equal(found["zero_point"], zero_point)
    assert found["global_scale"] is None
    assert not observer.has_statistics


def test_gptq_rounds_to_them() -> None:
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    install()
    found = observed().get_qparams()
    x = torch.randn(200, COLS, generator=torch.Generator().manual_seed(1))
    rounded, losses, _ = quantize_weight(
        weights=sample()[None],
        hessians=(x.T @ x / len(x))[None],
        scale=found["scale"][None],
        zero_point=found["zero_point"][None],
        global_scale=None,
        quant_args=arguments(),
    )
    codes = rounded[0].unflatten(1, (-1, 32)) / found["scale"].unsqueeze(-1)
    assert torch.allclose(codes, codes.round(), atol=1e-3)
    assert codes.round().min() == -4
    assert codes.round().max() == 3
    assert bool(losses.isfinite().all())
