from __future__ import annotations

import math

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams

from calibration.tiny_models import tiny_llama
from calipers.calibration import calibrate
from calipers.calibration.write import measure_weight_error

PRESETS = ["W8A8", "W4A16", "W4A16_ASYM", "FP8_BLOCK", "NVFP4A16", "MXFP4A16"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("preset", PRESETS)
def test_is_the_error_of_the_whole_fake_quantized_weight(preset, dtype, monkeypatch):
    # 128 columns: three rows at a time, so that pieces end inside blocks and matrices
    monkeypatch.setattr("calipers.calibration.write.chunk_size", lambda _: 3 * 128)
    model = tiny_llama().to(dtype)
    report = calibrate(model, preset, "memoryless_minmax")
    for row in report.modules:
        module = model.get_submodule(row.name)
        quantized = fake_quantize(
            module.weight,
            module.weight_scale,
            module.weight_zero_point,
            module.quantization_scheme.weights,
            getattr(module, "weight_global_scale", None),
        )
        weight = module.weight.detach().double()
        expected = float((weight - quantized.double()).norm() / weight.norm())
        assert expected > 1e-4
        assert math.isclose(row.weight_error, expected, rel_tol=1e-4)


@pytest.mark.parametrize("shape", [(1, 8), (5, 8), (300, 200), (7, 300_000)])
def test_any_shape_per_tensor(shape):
    torch.manual_seed(0)
    weight, args = torch.randn(shape), QuantizationArgs(num_bits=4, symmetric=False)
    scale, zero_point = calculate_qparams(weight.min(), weight.max(), args)
    quantized = fake_quantize(weight, scale, zero_point, args)
    expected = float((weight - quantized).double().norm() / weight.double().norm())
    found = measure_weight_error(weight, scale, zero_point, args)
    assert math.isclose(found, expected, rel_tol=1e-6)


def test_short_edge_blocks():
    torch.manual_seed(0)
    weight = torch.randn(50, 30)
    args = QuantizationArgs(
        num_bits=8, type="float", strategy="block", block_structure=[16, 16], symmetric=True
    )
    scale = torch.rand(4, 2) / 100 + 0.01
    expected = (weight - fake_quantize(weight, scale, None, args)).norm() / weight.norm()
    found = measure_weight_error(weight, scale, None, args)
    assert math.isclose(found, float(expected), rel_tol=1e-5)


def test_zeros_and_nothing():
    args = QuantizationArgs(num_bits=8)
    one, zero = torch.ones(1), torch.zeros(1, dtype=torch.int8)
    assert measure_weight_error(torch.zeros(4, 4), one, zero, args) == 0.0
    assert measure_weight_error(torch.zeros(0, 4), one, zero, args) == 0.0
    assert measure_weight_error(torch.full((2, 2), 0.4), one, zero, args) == 1.0
