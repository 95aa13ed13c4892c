"""Caches and attention states in checkpoints: names on disk, and logits of what is loaded back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.modeling import QuantizedAttentionImpl
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from safetensors.torch import load_file

import architectures
import calipers
from attention_models import batches, continued, logits, make
from calipers.checkpoint import check_load
from calipers.errors import CheckpointError

FP8 = QuantizationArgs(num_bits=8, type="float")


def calibrated(name: str, scheme: Any, kv_cache: Any = None, **changes: Any) -> Any:
    model = make(name, **changes)
    before = logits(model)
    calipers.calibrate(model, scheme, "memoryless_minmax", batches(), kv_cache=kv_cache)
    assert not torch.equal(logits(model), before)
    return model


def saved(model: Any, folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    calipers.save(model, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return load_file(folder / "model.safetensors"), config["quantization_config"]


def expect_equal_when_loaded(model: Any, folder: Path) -> None:
    with calipers.loading_experts():
        loaded, info = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    # experts of GPT-OSS are stored transposed: their sums have another order, by which inputs
    # that are quantized as they come may get another code
    close = 0.01 if type(model).__name__.startswith("GptOss") else 0
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=close)
    torch.testing.assert_close(continued(loaded), continued(model), rtol=0, atol=close)


def states_scheme(strategy: str = "tensor", *targets: str, kind: str = "float") -> Any:
    args = QuantizationArgs(num_bits=8, type=kind, strategy=strategy)
    group = QuantizationScheme(targets=list(targets or ["re:.*self_attn$"]), input_activations=args)
    return QuantizationConfig(config_groups={"attention": group})


@pytest.mark.parametrize(
    "name", ["llama", "mistral", "qwen3", "gemma3", "phi3", "gpt_oss", "latent"]
)
@pytest.mark.parametrize(
    ("scheme", "kv_cache"), [(None, "FP8"), ("FP8_DYNAMIC", "FP8_HEAD"), ("FP8", "INT8")]
)
def test_a_cache_comes_back_to_the_last_bit(
    name: str, scheme: str | None, kv_cache: str, tmp_path: Path
) -> None:
    if name == "latent" and (scheme is None or kv_cache == "FP8_HEAD"):
        pytest.skip("refused, see below")
    model = calibrated(name, scheme, kv_cache)
    tensors, config = saved(model, tmp_path / "model")
    heads = model.config.num_key_value_heads
    for layer in range(2):
        for state in ("k", "v"):
            scale = tensors[f"model.layers.{layer}.self_attn.{state}_scale"]
            assert scale.shape == ((heads, 1, 1) if kv_cache == "FP8_HEAD" else (1,))
            assert (scale > 0).all()
            assert not (scale == 1).any()
    assert not [key for key in tensors if key.endswith(("k_zero_point", "v_zero_point", "q_scale"))]
    assert config["kv_cache_scheme"]["strategy"] == (
        "attn_head" if kv_cache == "FP8_HEAD" else "tensor"
    )
    assert config["quantization_status"] == "compressed"
    assert (config["config_groups"] == {}) == (scheme is None)
    expect_equal_when_loaded(model, tmp_path / "model")


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "gemma3", "phi3"])
@pytest.mark.parametrize("strategy", ["tensor", "attn_head"])
def test_states_come_back_to_the_last_bit(name: str, strategy: str, tmp_path: Path) -> None:
    model = calibrated(name, states_scheme(strategy))
    tensors, config = saved(model, tmp_path / "model")
    for state, heads in (("q", 4), ("k", 2), ("v", 2)):
        scale = tensors[f"model.layers.1.self_attn.{state}_scale"]
        assert scale.shape == ((heads, 1, 1) if strategy == "attn_head" else (1,))
    (group,) = config["config_groups"].values()
    # vLLM passes over groups of nothing but a class whose name ends so
    assert group["targets"] == [type(model.model.layers[0].self_attn).__name__]
    assert group["targets"][0].endswith("Attention")
    # all attention has these arguments: vLLM reads them here
    assert config["kv_cache_scheme"] == group["input_activations"]
    expect_equal_when_loaded(model, tmp_path / "model")


def test_states_beside_layers_and_an_asymmetric_cache(tmp_path: Path) -> None:
    config = states_scheme("tensor", "LlamaAttention", kind="int")
    config.config_groups["mlp"] = QuantizationScheme(
        targets=["re:.*mlp.*"],
        weights=QuantizationArgs(num_bits=4, strategy="group", group_size=32),
    )
    model = calibrated("llama", config)
    _, written = saved(model, tmp_path / "states")
    assert len(written["config_groups"]) == 2
    expect_equal_when_loaded(model, tmp_path / "states")
    model = calibrated("llama", "W4A16", QuantizationArgs(num_bits=8, symmetric=False))
    tensors, _ = saved(model, tmp_path / "cache")
    assert tensors["model.layers.0.self_attn.k_zero_point"].shape == (1,)
    expect_equal_when_loaded(model, tmp_path / "cache")


def test_a_second_calibration_adds_a_cache(tmp_path: Path) -> None:
    model = calibrated("llama", "FP8_DYNAMIC")
    calipers.calibrate(model, None, data=batches(), kv_cache="FP8_HEAD")
    _, config = saved(model, tmp_path / "model")
    assert config["kv_cache_scheme"]["strategy"] == "attn_head"
    assert len(config["config_groups"]) == 1
    expect_equal_when_loaded(model, tmp_path / "model")


def test_the_language_part_of_a_multimodal_model(tmp_path: Path) -> None:
    model = architectures.gemma3()
    calipers.calibrate(model, None, data=[architectures.example_inputs(model)], kv_cache="FP8_HEAD")
    tensors, _ = saved(model, tmp_path / "model")
    scales = sorted(name for name in tensors if name.endswith("k_scale"))
    assert scales == [f"language_model.model.layers.{n}.self_attn.k_scale" for n in (0, 1)]
    loaded = type(model).from_pretrained(tmp_path / "model")
    assert torch.equal(architectures.output_of(loaded), architectures.output_of(model))


def test_latents_come_back_beside_quantized_layers_alone(tmp_path: Path) -> None:
    model = calibrated("latent", "FP8", "FP8")
    saved(model, tmp_path / "model")
    expect_equal_when_loaded(model, tmp_path / "model")
    # transformers asks a config of such a model for the group of its experts, unless they are
    # loaded one by one
    model = calibrated("deepseek_v3", None, "FP8")
    saved(model, tmp_path / "cache")
    with pytest.raises(IndexError):
        type(model).from_pretrained(tmp_path / "cache")
    expect_equal_when_loaded(model, tmp_path / "cache")


def test_scales_that_nobody_measured_are_not_saved(tmp_path: Path) -> None:
    model = make("llama")
    config = QuantizationConfig(config_groups={}, kv_cache_scheme=FP8)
    apply_quantization_config(model, config, show_progress=False)
    with pytest.raises(CheckpointError, match="not frozen"):
        calipers.save(model, tmp_path / "model")
    model = calibrated("llama", None, "FP8")
    model.model.layers[0].self_attn.v_scale.data.zero_()
    del model.model.layers[1].self_attn.k_scale
    with pytest.raises(CheckpointError, match="2 of 2 quantized modules lack a scale"):
        calipers.save(model, tmp_path / "model")


def test_attention_without_the_scheme_of_the_others_is_not_saved(tmp_path: Path) -> None:
    model = calibrated("llama", None, "FP8")
    del model.model.layers[1].self_attn.quantization_scheme
    with pytest.raises(CheckpointError, match=r"which they do not have: model\.layers\.1"):
        calipers.save(model, tmp_path / "model", load_check=False)


def test_saving_leaves_the_model_its_attention_function(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = calibrated("llama", states_scheme())
    # as if it had been hooked with this one; the twin of the check has another
    monkeypatch.setattr(QuantizedAttentionImpl, "_original_impl", "flex_attention")
    calipers.save(model, tmp_path / "model")
    assert QuantizedAttentionImpl._original_impl == "flex_attention"


def test_size_is_that_of_what_is_written(tmp_path: Path) -> None:
    model = calibrated("llama", "FP8_DYNAMIC", "FP8_HEAD")
    tensors, _ = saved(model, tmp_path / "model")
    assert calipers.checkpoint.compressed_size(model) == sum(
        each.numel() * each.dtype.itemsize for each in tensors.values()
    )


def test_check_load_knows_caches() -> None:
    check_load(make("llama"), None, kv_cache="FP8")
    check_load(make("deepseek_v3"), None, kv_cache="FP8")
