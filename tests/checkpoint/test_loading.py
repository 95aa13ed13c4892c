"""What `loading_experts` gets loaded beside experts, and what it leaves alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
)
from safetensors.torch import load_file, save_file
from torch import nn

import architectures
import calipers
from architectures import output_of, spread_weights

_EIGHT_BITS = QuantizationArgs(num_bits=8, strategy="channel")
EMBEDDINGS = QuantizationConfig(
    config_groups={"group_0": QuantizationScheme(targets=["Embedding"], weights=_EIGHT_BITS)}
)


def saved(name: str, scheme: Any, folder: Path) -> Any:
    model = spread_weights(getattr(architectures, name)())
    calipers.calibrate(model, scheme, "memoryless_minmax")
    calipers.save(model, folder)
    return model


@pytest.mark.parametrize(
    ("name", "scheme"), [("siglip", "W4A16"), ("mamba", "W4A16"), ("llama", EMBEDDINGS)]
)
def test_packed_weights_that_are_initialized_by_name(
    name: str, scheme: Any, tmp_path: Path
) -> None:
    model = saved(name, scheme, tmp_path / "out")
    with pytest.raises(AttributeError, match="object has no attribute 'weight'"):
        type(model).from_pretrained(tmp_path / "out")
    with calipers.loading_experts():
        loaded = type(model).from_pretrained(tmp_path / "out")
    packed = [each for each in loaded.modules() if "weight_packed" in each._parameters]
    assert packed
    assert not any("weight" in each._parameters for each in packed)  # no stand-in is left
    assert torch.equal(output_of(loaded), output_of(model))


def test_what_a_checkpoint_lacks_is_initialized_as_outside(tmp_path: Path) -> None:
    """Norms to ones, and a dense layer to random numbers."""
    model = saved("siglip", "W4A16", tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    lacking = ("encoder.layers.0.layer_norm1.weight", "embeddings.patch_embedding.weight")
    for name in lacking:
        del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    with calipers.loading_experts():
        loaded = type(model).from_pretrained(tmp_path / "out")
    norm, patches = (loaded.get_parameter(name) for name in lacking)
    assert torch.equal(norm, torch.ones_like(norm))
    assert 0.01 < patches.std() < 0.2
    fresh = nn.Conv2d(3, 128, 8, 8)
    assert patches.shape == fresh.weight.shape
