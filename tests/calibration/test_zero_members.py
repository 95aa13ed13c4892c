"""Members of a fused NVFP4 group that are zero throughout have no say in its global scale."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import nn

from calibration.tiny_models import tiny_llama, token_batches
from calipers.calibration import CalibrationReport, calibrate
from calipers.observers import Observer
from observers.samples import NVFP4, sample

PARENTS = {
    "q_proj": "self_attn",
    "k_proj": "self_attn",
    "v_proj": "self_attn",
    "gate_proj": "mlp",
    "up_proj": "mlp",
}
FUSED = [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")]
OBSERVERS = ["memoryless_minmax", "memoryless_mse", "nvfp4_expanded_mse", "optimal"]


def layer(model: nn.Module, name: str) -> nn.Linear:
    return model.get_submodule(f"model.layers.0.{PARENTS[name]}.{name}")


def calibrated(zero: tuple[str, ...], observer: str, scheme: str) -> tuple[Any, CalibrationReport]:
    model = tiny_llama()
    for name in PARENTS:
        nn.init.normal_(layer(model, name).weight, std=0.002)
    for name in zero:
        nn.init.zeros_(layer(model, name).weight)
    return model, calibrate(model, scheme, observer, token_batches())


@pytest.mark.parametrize("scheme", ["NVFP4", "NVFP4A16"])
@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize(
    "zero", [("gate_proj", "q_proj"), ("up_proj", "q_proj", "v_proj")], ids=str
)
def test_weights(zero: tuple[str, ...], observer: str, scheme: str) -> None:
    model, report = calibrated(zero, observer, scheme)
    for row in report.modules:
        name = row.name.rpartition(".")[2]
        if name in zero:
            assert row.weight_error == 0
        else:
            assert 0 < row.weight_error < 0.15, row.name  # .96 with a stand-in of 1
    for family in FUSED:
        scales = {float(layer(model, name).weight_global_scale) for name in family}
        assert len(scales) == 1
        assert scales.pop() > 100_000  # 448 * 6 / amax, where amax is some .01
    assert bool(model(**token_batches()[0]).logits.isfinite().all())


@pytest.mark.parametrize("observer", OBSERVERS)
def test_a_group_of_zeros_alone_has_a_finite_scale(observer: str) -> None:
    model, report = calibrated(("gate_proj", "up_proj"), observer, "NVFP4")
    errors = {row.name.rpartition(".")[2]: row.weight_error for row in report.modules}
    assert errors["gate_proj"] == errors["up_proj"] == 0
    scale = layer(model, "up_proj").weight_global_scale
    assert bool((scale > 0) & scale.isfinite())
    assert bool(model(**token_batches()[0]).logits.isfinite().all())


class Gated(nn.Module):
    """Siblings by name, of which one sees nothing but zeros."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate_proj = nn.Linear(32, 32, bias=False)
        self.up_proj = nn.Linear(32, 32, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gate_proj(x * 0) + self.up_proj(x)


def test_activations() -> None:
    model, x = Gated(), sample((4, 32)) * 1e-3
    calibrate(model, "NVFP4", "memoryless_minmax", [x])
    expected = 448 * 6 / x.abs().amax()
    for module in (model.gate_proj, model.up_proj):
        torch.testing.assert_close(module.input_global_scale.data, expected.view(1))


@pytest.mark.parametrize("name", ["memoryless_minmax", "nvfp4_expanded_mse", "minmax"])
@pytest.mark.parametrize(
    ("size", "says"), [(0.0, False), (1e-40, False), (1e-30, True), (1.0, True)]
)
def test_whether_a_global_scale_comes_from_values(name: str, size: float, says: bool) -> None:
    observer = Observer.load_from_registry(name, "input", QuantizationArgs(**NVFP4))
    assert not observer.has_global_values
    observer.observe_global(torch.tensor([[-size, 0.0]]))
    assert observer.has_global_values is says
