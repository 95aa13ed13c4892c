"""What is quantized tensor by tensor is, byte for byte, what `calibrate` and `save` write."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel

import architectures
import calipers
from calipers.errors import CalipersError
from calipers.streaming import quantize_checkpoint
from streaming.conftest import calibrate_and_save, expect_same, read_checkpoint, save_architecture

GROUPS = {"scheme_options": {"group_size": 32}}
MSE = {"observer_options": {"objective": "mse"}}
WAYS: dict[str, tuple[Any, ...]] = {
    "W4A16": ("W4A16", None, GROUPS),
    "W4A16_ASYM": ("W4A16_ASYM", None, GROUPS),
    "W4A16 mse": ("W4A16", "memoryless_mse", GROUPS),
    "W4A16 optimal": ("W4A16", "optimal", {**GROUPS, **MSE}),
    "W8A16": ("W8A16", None, {}),
    "FP8_DYNAMIC": ("FP8_DYNAMIC", None, {}),
    "NVFP4A16": ("NVFP4A16", None, {}),
    "NVFP4A16 optimal": ("NVFP4A16", "optimal", MSE),
    "MXFP4": ("MXFP4", None, {}),
}
#: Ties, experts one by one and in one parameter with biases, buffers, weights that are renamed.
ARCHITECTURES = ["tied_llama", "qwen3_moe", "gpt_oss", "deepseek_v3", "qwen2_vl"]
OTHERS = ["mixtral", "llama4", "granite_moe", "phi3", "bert", "gemma3", "whisper", "qwen3_next"]


def compare(source: Path, folder: Path, way: str, **options: Any) -> None:
    scheme, observer, more = WAYS[way]
    calibrate_and_save(source, folder / "whole", scheme, observer, **more, **options)
    quantize_checkpoint(
        source, folder / "streamed", scheme, observer, shard_bytes=100_000, **more, **options
    )
    expect_same(folder / "whole", folder / "streamed")


@pytest.mark.parametrize("way", WAYS)
def test_every_scheme_and_observer(checkpoints: Any, tmp_path: Path, way: str) -> None:
    compare(checkpoints("tied_llama"), tmp_path, way)


@pytest.mark.parametrize("way", ["W4A16 optimal", "NVFP4A16"])
@pytest.mark.parametrize("name", ARCHITECTURES[1:])
def test_architectures(checkpoints: Any, tmp_path: Path, name: str, way: str) -> None:
    compare(checkpoints(name), tmp_path, way)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [*ARCHITECTURES, *OTHERS])
def test_every_architecture_under_every_scheme(
    checkpoints: Any, tmp_path: Path, name: str, way: str
) -> None:
    compare(checkpoints(name), tmp_path, way)


def test_the_result_loads_and_answers_as_the_calibrated_model(
    checkpoints: Any, tmp_path: Path
) -> None:
    source = checkpoints("tied_llama")
    calibrated = architectures.tied_llama().__class__.from_pretrained(source)
    calipers.calibrate(calibrated, "W4A16", **GROUPS)
    quantize_checkpoint(source, tmp_path / "out", "W4A16", **GROUPS)
    loaded = type(calibrated).from_pretrained(tmp_path / "out")
    outputs = architectures.output_of(loaded), architectures.output_of(calibrated)
    torch.testing.assert_close(*outputs, rtol=0, atol=0)


def test_experts_that_lie_in_one_parameter_on_the_disk(tmp_path: Path) -> None:
    model = architectures.spread_weights(architectures.mixtral()).bfloat16()
    model.save_pretrained(tmp_path / "source", save_original_format=False)
    names = read_checkpoint(tmp_path / "source")
    assert any(name.endswith("experts.gate_up_proj") for name in names)
    compare(tmp_path / "source", tmp_path, "NVFP4A16")


def test_experts_that_are_left_alone_are_written_as_they_lie(
    checkpoints: Any, tmp_path: Path
) -> None:
    compare(checkpoints("qwen3_moe"), tmp_path, "W4A16", ignore=[r"re:.*\.experts\."])


@pytest.mark.parametrize("scheme", ["W4A16", "NVFP4A16"])
def test_another_dtype_than_that_of_the_checkpoint(
    checkpoints: Any, tmp_path: Path, scheme: str
) -> None:
    source = save_architecture("llama", tmp_path / "source", torch.float32)
    compare(source, tmp_path, scheme)
    quantize_checkpoint(source, tmp_path / "half", scheme, dtype="bfloat16", **WAYS[scheme][2])
    calibrate_in = architectures.llama().__class__.from_pretrained(source, dtype=torch.bfloat16)
    calipers.calibrate(calibrate_in, scheme, **WAYS[scheme][2])
    calipers.save(calibrate_in, tmp_path / "whole in half")
    expect_same(tmp_path / "whole in half", tmp_path / "half")


@pytest.mark.parametrize("equal", [True, False])
def test_a_tied_head_that_is_stored_as_well(checkpoints: Any, tmp_path: Path, equal: bool) -> None:
    model = architectures.spread_weights(architectures.tied_llama()).bfloat16()
    source = tmp_path / "source"
    model.save_pretrained(source)
    tensors = load_file(source / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    if not equal:
        head[3, 5] += 1
    save_file({**tensors, "lm_head.weight": head}, source / "model.safetensors", {"format": "pt"})
    compare(source, tmp_path, "W4A16")
    stored = read_checkpoint(tmp_path / "streamed")
    assert ("lm_head.weight" in stored) is not equal


def test_layers_that_share_a_global_scale_may_lie_in_different_files(tmp_path: Path) -> None:
    source = save_architecture("llama", tmp_path / "source", shard="20KB")
    index = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    layer = "model.layers.0.self_attn."
    assert len({index[f"{layer}{name}_proj.weight"] for name in "qkv"}) > 1
    compare(source, tmp_path, "NVFP4A16")
    scales = read_checkpoint(tmp_path / "streamed")
    assert len({scales[f"{layer}{name}_proj.weight_global_scale"] for name in "qkv"}) == 1


def test_a_pooler_that_the_checkpoint_lacks_is_left_out(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=64, hidden_size=128, intermediate_size=128, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    model = BertModel(config)
    state = {k: v for k, v in model.state_dict().items() if "pooler" not in k}
    model.save_pretrained(tmp_path / "source", state_dict=state)
    with pytest.raises(CalipersError, match=r"lacks pooler\.dense.* put its module on the ignore"):
        quantize_checkpoint(tmp_path / "source", tmp_path / "out", "W8A16")
    quantize_checkpoint(tmp_path / "source", tmp_path / "out", "W8A16", ignore="pooler")
    stored = read_checkpoint(tmp_path / "out")
    assert not any("pooler" in name for name in stored)
    assert "encoder.layer.0.attention.self.query.weight_packed" in stored


def test_one_unit_a_file_at_least(checkpoints: Any, tmp_path: Path) -> None:
    report = quantize_checkpoint(
        checkpoints("tied_llama"), tmp_path / "small", "FP8_DYNAMIC", shard_bytes=1
    )
    assert report.shards > 10
    quantize_checkpoint(checkpoints("tied_llama"), tmp_path / "large", "FP8_DYNAMIC")
    assert (tmp_path / "large" / "model.safetensors").is_file()
    expect_same(tmp_path / "small", tmp_path / "large")
    index = json.loads((tmp_path / "small" / "model.safetensors.index.json").read_text())
    sizes = [len(raw) for _, _, raw in read_checkpoint(tmp_path / "small").values()]
    assert index["metadata"]["total_size"] == sum(sizes) == report.bytes_after


def test_statistics_take_the_place_of_data(
    checkpoints: Any, tmp_path: Path, gathered: Callable[..., Any]
) -> None:
    source = checkpoints("tied_llama")
    statistics = gathered(source, tmp_path / "whole", "FP8", "optimal")
    quantize_checkpoint(source, tmp_path / "out", "FP8", "optimal", statistics=statistics)
    expect_same(tmp_path / "whole", tmp_path / "out")


@pytest.fixture
def gathered() -> Callable[..., Any]:
    """Calibrates with data, saves, and gives the states of all observers that learnt from it."""

    def gather(source: Path, out: Path, scheme: str, observer: str) -> Any:
        model = architectures.tied_llama().__class__.from_pretrained(source)
        with calipers.attach(model, scheme, observer=observer) as calibration:
            calibration.run([architectures.example_inputs(model, seed) for seed in range(3)])
            states = {
                tensor.full_name: {k: v.clone() for k, v in tensor.observer.state().items()}
                for each in calibration.observed
                for tensor in each.tensors.values()
            }
            calibration.freeze()
        calipers.save(model, out)
        return states

    return gather
