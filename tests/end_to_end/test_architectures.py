"""Quantize, save and load: each architecture comes back with its logits, or is refused before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import architectures
import calipers
from architectures import example_inputs, output_of

#: What transformers cannot load back, by scheme, with a word of the refusal.
REFUSED: dict[tuple[str, str], str] = {
    ("falcon", "W4A16"): r"(?s)would not load back.*mlp\.dense_4h_to_h.*no part of the model",
    ("modernbert", "W4A16"): r"(?s)would not load back.*attn\.Wqkv.*no part of the model",
    ("t5", "W4A16"): r"(?s)would not load back.*SelfAttention\.q.*no part of the model",
    ("siglip", "W4A16"): r"(?s)would not load back.*self_attn\.k_proj.*no part of the model",
    ("mamba", "W4A16"): r"(?s)would not load back.*mixer\.out_proj: .*ignore=\[",
    ("gemma3", "W4A16"): r"(?s)would not load back.*vision_tower.*fc1.*ignore=\[",
    ("gpt2_classifier", "W4A16"): "target 'Linear' matches only modules that are left alone",
    ("gpt2_classifier", "FP8"): "target 'Linear' matches only modules that are left alone",
}


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["W4A16", "FP8"])
@pytest.mark.parametrize(
    "name",
    [
        "falcon",
        "llama_classifier",
        "gpt2_classifier",
        "bert",
        "modernbert",
        "t5",
        "whisper",
        "siglip",
        "mamba",
        "jamba",
        "mixtral",
        "qwen3_moe",
        "deepseek_v3",
        "glm4_moe",
        "granite_moe",
        "llama4",
        "qwen3_next",
        "qwen2_vl",
        "gemma3",
    ],
)
def test_comes_back_or_is_refused(name: str, scheme: str, tmp_path: Path) -> None:
    make: Callable[[], Any] = getattr(architectures, name)
    model = make()
    data = [example_inputs(model)] if scheme == "FP8" else None
    on_missing = "error" if data is None else "skip"
    folder = tmp_path / "model"

    def quantize_and_save() -> None:
        calipers.calibrate(model, scheme, "memoryless_minmax", data, on_missing=on_missing)
        calipers.save(model, folder)

    if (name, scheme) in REFUSED:
        with pytest.raises(calipers.CalipersError, match=REFUSED[name, scheme]):
            quantize_and_save()
        assert not folder.exists()
        return
    quantize_and_save()
    expected = output_of(model)
    with calipers.loading_experts():
        loaded = output_of(type(model).from_pretrained(folder))
    assert torch.equal(loaded, expected)
