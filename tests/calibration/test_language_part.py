"""`only="language"`: towers, projectors and encoders of sounds are left alone by one word."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from torch import nn
from transformers import CLIPConfig, CLIPModel

import architectures
from calibration.tiny_models import tiny_llama, token_batches
from calipers.calibration import attach, calibrate
from calipers.calibration.parts import find_language_part, find_outside
from calipers.errors import CalipersError, MissingDataError, SchemeError
from multimodal_models import MODELS, VISION, other_inputs, text_inputs
from observers.samples import logged

PARTS = {
    "gemma3": ["model.language_model"],
    "qwen2_vl": ["model.language_model"],
    "qwen3_vl": ["model.language_model"],
    "llama4_vision": ["language_model"],
    "qwen2_audio": ["model.language_model"],
    "whisper": ["model.decoder"],
}


@pytest.mark.parametrize("name", MODELS)
def test_the_language_part_alone_is_quantized(name: str) -> None:
    model = MODELS[name]()
    assert sorted(find_language_part(model)) == PARTS[name]
    # text reaches the whole part: nothing is missing
    report = calibrate(
        model, "FP8", "memoryless_minmax", data=[text_inputs(model)], only="language"
    )
    (part,) = PARTS[name]
    assert report.modules
    assert all(each.name.startswith(f"{part}.") for each in report.modules)
    outside = {each for each, module in model.named_modules() if isinstance(module, nn.Linear)} - {
        each.name for each in report.modules
    }
    reasons = {each.name: each.reason for each in report.left_alone}
    for each in outside:
        head = each in ("lm_head", "proj_out", "language_model.lm_head")
        known = "output head" if head else "not the language part"
        assert reasons[each] == ("router" if each.endswith(".router") else known), each
    assert not any(hasattr(model.get_submodule(each), "quantization_scheme") for each in outside)


def test_projectors_that_are_raw_parameters_are_outside_too() -> None:
    model = architectures.gemma3()
    assert "model.multi_modal_projector" in find_outside(model)
    with attach(model, "FP8", only="language") as calibration:
        calibration.run([other_inputs(model)])
        report = calibration.freeze()
    (projector,) = (each for each in report.left_alone if "projector" in each.name)
    assert projector.reason == "not the language part"
    assert projector.weights == 128 * 128


@pytest.mark.parametrize("name", ["t5", "bert", "llama_classifier", "llama4", "mamba"])
def test_models_of_text_are_language_as_a_whole(name: str) -> None:
    model = getattr(architectures, name)()
    assert find_language_part(model) == {""}
    assert find_outside(model) == set()


def test_models_of_text_get_the_same_scales() -> None:
    states = []
    for only in (None, "language"):
        model: Any = tiny_llama()
        calibrate(model, "NVFP4", "memoryless_minmax", token_batches(1), only=only)
        states.append(model.state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_modules_of_the_usual_names_where_no_config_tells() -> None:
    model = nn.ModuleDict({"language_model": tiny_llama(), "eyes": nn.Linear(128, 128)})
    assert find_language_part(model) == {"language_model"}
    assert find_outside(model) == {"eyes"}


def clip() -> Any:
    text = {**architectures.SIZES, "vocab_size": 128, "num_hidden_layers": 1}
    vision = {**VISION, "num_hidden_layers": 2}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=128)
    return CLIPModel(config).eval()


def test_the_projection_of_the_text_of_clip_is_language() -> None:
    model = clip()
    assert find_language_part(model) == {"text_model", "text_projection"}
    outside = find_outside(model)
    assert "visual_projection" in outside
    assert "text_projection" not in outside
    report = calibrate(model, "FP8_DYNAMIC", "memoryless_minmax", only="language")
    assert "text_projection" in report
    assert "visual_projection" not in report


def test_little_is_said_of_the_language_part_alone() -> None:
    """Where all of it is quantized it is no matter how large the towers are."""
    with logged("WARNING") as messages:
        report = calibrate(clip(), "FP8_DYNAMIC", "memoryless_minmax", only="language")
    assert report.quantized_share < 0.5
    assert not messages
    most = ["re:.*mlp.*", "re:.*self_attn.*"]
    with logged("WARNING") as messages:
        calibrate(clip(), "FP8_DYNAMIC", "memoryless_minmax", ignore=most, only="language")
    assert ["% of the language part's projection weights" in each for each in messages] == [True]
    with logged("WARNING") as messages:
        calibrate(clip(), "FP8_DYNAMIC", "memoryless_minmax", ignore=["re:vision.*"])
    assert ["% of the model's projection weights" in each for each in messages] == [True]


def test_models_without_a_language_part_are_refused() -> None:
    for model in (architectures.siglip(), nn.Sequential(nn.Linear(128, 128))):
        with pytest.raises(CalipersError, match=r"has no language part .* ignore= \(--ignore\)"):
            calibrate(model, "W4A16", "memoryless_minmax", only="language")


def test_unknown_words_and_targets_outside() -> None:
    model = architectures.gemma3()
    with pytest.raises(CalipersError, match="only must be one of language, got 'vision'"):
        attach(model, "FP8", only="vision")  # type: ignore[arg-type]
    scheme = _only_target("model.vision_tower.encoder.layers.0.mlp.fc1")
    with pytest.raises(SchemeError, match="not the language part"):
        attach(model, scheme, only="language")


def test_a_head_that_is_named_is_language() -> None:
    model = architectures.gemma3()
    report = calibrate(model, _only_target("lm_head"), "memoryless_minmax", only="language")
    assert [each.name for each in report.modules] == ["lm_head"]


@pytest.mark.parametrize("on_missing", ["error", "fallback"])
@pytest.mark.parametrize("name", ["gemma3", "qwen2_audio"])
def test_text_alone_does_not_reach_a_tower(name: str, on_missing: Any) -> None:
    model = MODELS[name]()
    with pytest.raises(MissingDataError, match=r'(?s)tower.*images or sounds.*only="language"'):
        calibrate(model, "FP8", "memoryless_minmax", [text_inputs(model)], on_missing=on_missing)
    report = calibrate(
        model, "FP8", "memoryless_minmax", data=[other_inputs(model)], on_missing=on_missing
    )
    assert any("tower" in each.name for each in report.modules)
    assert not report.skipped


def _only_target(name: str) -> Any:
    return QuantizationScheme(targets=[name], weights=QuantizationArgs(num_bits=8))
