"""llmcompressor's GPTQ rounds to scales that are chosen for it, and takes negative ones."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor

pytest.importorskip("llmcompressor")

from calipers.integrations.llmcompressor import install, uninstall
from calipers.integrations.llmcompressor.gptq import MODULE

BASE = importlib.import_module(MODULE)
ROWS, COLS = 16, 64


@pytest.fixture(autouse=True)
def _uninstalled() -> Iterator[None]:
    yield
    uninstall()


def quantize(observer: str | None, **more: Any) -> tuple[Tensor, Tensor, Tensor]:
    """What becomes of the scales of two weights, their zero points, and the losses."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(2, ROWS, COLS, generator=generator) * 0.1
    x = torch.randn(2, 200, COLS, generator=generator)
    x = x @ (torch.eye(COLS) + torch.randn(COLS, COLS, generator=generator) / 8)
    args = QuantizationArgs(
        num_bits=3, strategy="group", group_size=32, observer=observer, actorder="static", **more
    )
    scale = weights.unflatten(2, (-1, 32)).abs().amax(-1) / 3.5
    zero_point = torch.zeros_like(scale, dtype=torch.int8)
    hessians = x.transpose(1, 2) @ x / 200
    _, losses, _ = BASE.quantize_weight(
        weights=weights.clone(),
        hessians=hessians.clone(),
        scale=scale,
        zero_point=zero_point,
        global_scale=None,
        quant_args=args,
    )
    return scale, zero_point, losses


def test_scales_of_optimal_are_chosen_anew() -> None:
    plain = quantize(None)
    install()
    found = quantize("optimal")
    assert not torch.equal(found[0], plain[0])
    assert bool((found[2] < plain[2]).all())
    assert found[1].dtype == torch.int8


@pytest.mark.parametrize("observer", [None, "memoryless_minmax", "calipers_memoryless_minmax"])
def test_those_of_others_stay(observer: str | None) -> None:
    plain = quantize(None)
    install()
    assert torch.equal(quantize(observer)[0], plain[0])


def test_it_can_be_left_out_and_is_undone() -> None:
    original = BASE.quantize_weight
    with install(gptq_scales=False) as outer:
        assert BASE.quantize_weight is original
        assert not outer.gptq_scales
        with install():
            assert BASE.quantize_weight is not original
        assert BASE.quantize_weight is original
    install()
    uninstall()
    assert BASE.quantize_weight is original


def test_negative_scales_are_handed_over_as_they_are() -> None:
    from llmcompressor.observers import Observer as PeerObserver

    install()
    options = {"objective": "mse", "negative_scales": True}
    args = QuantizationArgs(
        num_bits=3, strategy="group", group_size=32, observer="optimal", observer_kwargs=options
    )
    observer = PeerObserver.load_from_registry("optimal", base_name="weight", args=args)
    observer(torch.randn(ROWS, COLS, generator=torch.Generator().manual_seed(0)))
    assert observer.has_statistics
    qparams = observer.get_qparams()
    assert bool((qparams["scale"] < 0).any())
    assert bool((qparams["zero_point"] == 0).all())
    assert not observer.has_statistics
