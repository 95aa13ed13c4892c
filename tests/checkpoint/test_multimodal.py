"""Models that see or hear come back with equal logits, for text and for images or sounds."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

import calipers
from calipers.checkpoint.load_check import check_load
from multimodal_models import MODELS, logits_of, other_inputs, stored, text_inputs

#: Those that a plain `make test` tries.
_FIRST = ("gemma3", "whisper")


@pytest.mark.parametrize("only", [None, "language"])
@pytest.mark.parametrize("preset", ["W4A16", "FP8", "NVFP4"])
@pytest.mark.parametrize(
    "name",
    [name if name in _FIRST else pytest.param(name, marks=pytest.mark.slow) for name in MODELS],
)
def test_equal_logits(name: str, preset: str, only: Any, tmp_path: Path) -> None:
    model = stored(MODELS[name](), tmp_path / "model", torch.bfloat16)
    batches = [text_inputs(model) if only else other_inputs(model)]
    out = tmp_path / "out"

    options = {"group_size": 32} if preset == "W4A16" else {}

    check_load(model, preset, only=only, scheme_options=options)
    calipers.calibrate(
        model, preset, "memoryless_minmax", batches, only=only, scheme_options=options
    )
    calipers.save(model, out)
    takes_help = only is None and name == "gemma3" and preset in ("W4A16", "NVFP4")
    with calipers.loading_experts() if takes_help else nullcontext():
        loaded = type(model).from_pretrained(out).eval()
    for found, expected in zip(logits_of(loaded), logits_of(model), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.usefixtures("without_help")
def test_a_tower_that_does_not_load_can_be_left_alone_by_one_word() -> None:
    told = r"(?s)would not load back.*only=\"language\" \(--only language\)"
    with pytest.raises(calipers.CalipersError, match=told):
        check_load(MODELS["gemma3"](), "W4A16")


def test_the_saved_ignore_list_names_the_towers(tmp_path: Path) -> None:
    model = MODELS["gemma3"]()
    calipers.calibrate(model, "FP8_DYNAMIC", only="language")
    calipers.save(model, tmp_path / "out")
    loaded = type(model).from_pretrained(tmp_path / "out")
    quantized = [name for name, each in loaded.named_modules() if hasattr(each, "weight_scale")]
    assert len(quantized) == 14
    assert all("language_model" in name for name in quantized)
