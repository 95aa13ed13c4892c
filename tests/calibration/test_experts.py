"""Experts that a model keeps in one parameter become Linear layers while it is calibrated."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.offload import from_accelerate, offload_module
from compressed_tensors.offload.cache import OffloadCache
from loguru import logger

import architectures
from architectures import example_inputs, output_of, spread_weights
from calipers.calibration import attach, calibrate
from calipers.calibration.experts import (
    LinearExperts,
    find_fused_experts,
    separate_experts,
    separated_experts,
)
from calipers.errors import CalipersError

MODELS = [
    "qwen3_moe",
    "mixtral",
    "deepseek_v3",
    "glm4_moe",
    "granite_moe",
    "gpt_oss",
    "llama4",
    "qwen3_next",
    "jamba",
]


def made(name: str) -> Any:
    return spread_weights(getattr(architectures, name)())


def experts_of(model: Any) -> list[LinearExperts]:
    return [each for each in model.modules() if isinstance(each, LinearExperts)]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_are_those_of_the_model(name: str, implementation: str, dtype: torch.dtype) -> None:
    model = made(name).to(dtype)
    model.config._experts_implementation = implementation
    before, weights = output_of(model), dict(model.named_parameters())
    with separated_experts(model):
        assert len(experts_of(model)) in (1, 2)
        assert not find_fused_experts(model)
        found = output_of(model)
        for each in experts_of(model):
            each.all_experts = True
        assert torch.equal(output_of(model), found)
    if name == "gpt_oss":
        # a Linear adds its bias before it rounds, which shows on processors that round in between
        most = 0.02 if dtype == torch.bfloat16 else 1e-5
        assert (found - before).abs().max() <= most * (before.max() - before.min())
    else:
        assert torch.equal(found, before)
    assert not experts_of(model)
    after = dict(model.named_parameters())
    assert after.keys() == weights.keys()
    assert all(after[key] is value for key, value in weights.items())
    assert torch.equal(output_of(model), before)


def test_layers_are_views_under_the_names_of_checkpoints() -> None:
    model = made("mixtral")
    experts = model.model.layers[1].mlp.experts
    memory = experts.gate_up_proj.untyped_storage().data_ptr()
    separate_experts(model)
    expert = model.model.layers[1].mlp.experts[1]
    assert [name for name, _ in expert.named_children()] == ["w1", "w3", "w2"]
    assert torch.equal(expert.w1.weight, experts.gate_up_proj[1, :256])
    assert torch.equal(expert.w3.weight, experts.gate_up_proj[1, 256:])
    assert torch.equal(expert.w2.weight, experts.down_proj[1])
    assert expert.w3.weight.untyped_storage().data_ptr() == memory


def test_alternating_columns_and_biases() -> None:
    model = made("gpt_oss")
    experts = model.model.layers[0].mlp.experts
    separate_experts(model)
    expert = model.model.layers[0].mlp.experts[2]
    assert torch.equal(expert.gate_proj.weight, experts.gate_up_proj[2, :, ::2].T)
    assert torch.equal(expert.up_proj.weight, experts.gate_up_proj[2, :, 1::2].T)
    assert torch.equal(expert.up_proj.bias, experts.gate_up_proj_bias[2, 1::2])
    assert torch.equal(expert.down_proj.bias, experts.down_proj_bias[2])


def test_copies_and_pickles_compute_the_same() -> None:
    model = made("qwen3_moe")
    expected = output_of(model)
    separate_experts(model)
    assert torch.equal(output_of(copy.deepcopy(model)), expected)
    assert torch.equal(output_of(pickle.loads(pickle.dumps(model))), expected)


def test_what_was_done_to_the_model_meanwhile_is_kept() -> None:
    model = made("qwen3_moe")
    with separated_experts(model):
        model.to(torch.bfloat16).train()
    experts = model.model.layers[0].mlp.experts
    assert experts.down_proj.dtype == torch.bfloat16
    assert experts.training


@pytest.mark.parametrize("name", MODELS)
def test_all_of_them_are_quantized(name: str) -> None:
    model = made(name)
    report = calibrate(model, "W8A16", "memoryless_minmax")
    reasons = {each.reason for each in report.left_alone}
    assert "fused experts" not in reasons
    layers = [each for each in report.modules if ".experts." in each.name]
    assert len(layers) == sum(len(each) for each in experts_of(model)) * 3
    rest = {each.name.rpartition(".")[2] for each in report.left_alone} - {"lm_head"}
    assert rest <= {"gate", "router", "shared_expert_gate", "conv1d", "dt_proj"}


def test_detached_the_model_is_as_it_was() -> None:
    model = made("qwen3_moe")
    before = dict(model.named_modules())
    calibration = attach(model, "W4A16", observer="imatrix_mse")
    assert experts_of(model)
    calibration.run([example_inputs(model)])
    calibration.detach()
    after = dict(model.named_modules())
    assert after.keys() == before.keys()
    assert all(after[key] is value for key, value in before.items())


@pytest.mark.parametrize("data", [None, [{"input_ids": "none"}]])
def test_after_an_error_the_model_is_as_it_was(data: Any) -> None:
    model = made("qwen3_moe")
    before = dict(model.named_modules())
    with pytest.raises((CalipersError, AttributeError)):
        calibrate(model, "W4A16", "imatrix_mse", data)
    after = dict(model.named_modules())
    assert all(after[key] is value for key, value in before.items())
    assert after.keys() == before.keys()


def test_experts_that_are_left_alone_stay_one_parameter() -> None:
    model = made("qwen3_moe")
    ignored = "re:.*layers.0.mlp.experts"
    calibrate(model, "W8A16", "memoryless_minmax", ignore=[ignored])
    assert list(find_fused_experts(model)) == ["model.layers.0.mlp.experts"]
    assert len(experts_of(model)) == 1
    calibrate(model, "W8A16", "memoryless_minmax", ignore="re:.*(self_attn|layers.1)")
    assert not find_fused_experts(model)


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_offloaded_models_give_the_same_scales(place: str, tmp_path: Path) -> None:
    plain, offloaded = made("qwen3_moe"), made("qwen3_moe")
    more = {"offload_dir": str(tmp_path)} if place == "disk" else {}
    for module in list(offloaded.modules()):
        if module._parameters:
            offload_module(module, onload_device="cpu", offload_device=place, **more)
    before = dict(offloaded.named_modules())
    with separated_experts(offloaded):
        assert torch.equal(output_of(offloaded), output_of(plain))
    after = dict(offloaded.named_modules())
    assert all(after[key] is value for key, value in before.items())
    batches = [example_inputs(plain, seed) for seed in range(2)]
    calibrate(plain, "W4A16", "imatrix_mse", batches)
    report = calibrate(offloaded, "W4A16", "imatrix_mse", batches)
    assert any(".experts." in each.name for each in report.modules)
    for each in report.modules:
        expected = plain.get_submodule(each.name).weight_scale
        found = offloaded.get_submodule(each.name)
        assert torch.equal(found.weight_scale, expected)
        assert isinstance(found._parameters, OffloadCache)
        assert torch.equal(found.weight, plain.get_submodule(each.name).weight)
    assert torch.equal(output_of(offloaded), output_of(plain))


def test_experts_with_a_hook_of_accelerate_say_how_to_take_it_off() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    model = made("qwen3_moe")
    for experts in find_fused_experts(model).values():
        hooks.add_hook_to_module(experts, hooks.AlignDevicesHook(io_same_device=True))
    told: list[str] = []
    sink = logger.add(lambda message: told.append(str(message)), level="WARNING")
    calibrate(model, "W8A16", "memoryless_minmax")
    logger.remove(sink)
    (warning,) = [each for each in told if "hooks of accelerate" in each]
    assert "2 modules hold experts" in warning
    from_accelerate(model)
    assert len(find_fused_experts(model)) == 2
