"""Checkpoints hold experts one by one, under the names that the model's own checkpoints have."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from loguru import logger
from safetensors.torch import load_file

import architectures
import calipers
from architectures import example_inputs, output_of, spread_weights

MOE = ["qwen3_moe", "mixtral", "deepseek_v3", "glm4_moe", "qwen3_next", "jamba"]
#: Their own checkpoints hold all experts in one tensor, so transformers does not know them apart.
JOINED = ["granite_moe", "gpt_oss", "llama4"]


def calibrated(name: str, scheme: Any, ignore: Any = ()) -> Any:
    model = spread_weights(getattr(architectures, name)())
    data = [example_inputs(model, seed) for seed in range(3)]
    calipers.calibrate(model, scheme, data=data, ignore=ignore, on_missing="fallback")
    return model


def saved(model: Any, folder: Path) -> list[str]:
    """Save, and return the warnings of it."""
    warnings: list[str] = []
    sink = logger.add(lambda message: warnings.append(str(message)), level="WARNING")
    try:
        calipers.save(model, folder)
    finally:
        logger.remove(sink)
    return [each for each in warnings if "loading_experts" in each]


def loaded(model: Any, folder: Path, within: Any = nullcontext) -> Any:
    with within():
        return type(model).from_pretrained(folder)


@pytest.mark.parametrize("name", MOE)
def test_packed_integers_load_as_they_are(name: str, tmp_path: Path) -> None:
    model = calibrated(name, "W4A16", "re:.*mamba" if name == "jamba" else ())
    assert saved(model, tmp_path / "out") == []
    expected = output_of(model)
    assert torch.equal(output_of(loaded(model, tmp_path / "out")), expected)
    one_by_one = loaded(model, tmp_path / "out", calipers.loading_experts)
    assert torch.equal(output_of(one_by_one), expected)


@pytest.mark.parametrize(
    ("name", "path", "leaves"),
    [
        ("mixtral", "block_sparse_moe.experts.1", ("w1", "w2", "w3")),
        ("qwen3_moe", "mlp.experts.1", ("down_proj", "gate_proj", "up_proj")),
    ],
)
def test_names_are_those_of_the_models_own_checkpoints(
    name: str, path: str, leaves: tuple[str, ...], tmp_path: Path
) -> None:
    plain = getattr(architectures, name)()
    plain.save_pretrained(tmp_path / "plain")
    original = load_file(tmp_path / "plain" / "model.safetensors")
    saved(calibrated(name, "W4A16"), tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for leaf in leaves:
        key = f"model.layers.1.{path}.{leaf}.weight"
        assert key in original
        assert {f"{key}_packed", f"{key}_scale", f"{key}_shape"} <= stored.keys()
        assert tuple(stored[f"{key}_shape"]) == original[key].shape
    assert not [key for key in stored if "gate_up_proj" in key]


@pytest.mark.parametrize("scheme", ["FP8_DYNAMIC", "W8A8", "NVFP4A16", "W4A16_ASYM", "FP8"])
def test_other_schemes_need_the_loader_and_say_so(scheme: str, tmp_path: Path) -> None:
    model = calibrated("mixtral", scheme)
    (warning,) = saved(model, tmp_path / "out")
    assert "inside `with calipers.loading_experts():` alone" in warning
    found = output_of(loaded(model, tmp_path / "out", calipers.loading_experts))
    expected = output_of(model)
    if scheme == "NVFP4A16":  # which loads in bfloat16
        assert (found - expected).abs().max() < 0.03 * (expected.max() - expected.min())
    else:
        assert torch.equal(found, expected)
