"""The config of a checkpoint: every module gets its own scheme back, whatever the calls were."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from compressed_tensors.quantization import QuantizationConfig
from torch import nn

import calipers
from architectures import falcon, gemma3, mixtral, qwen2_vl
from calibration.tiny_models import tiny_llama
from calipers.checkpoint import saved_config as module_under_test
from calipers.checkpoint.saved_config import saved_config
from calipers.errors import CheckpointError

IDS = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS).logits.float()


def comes_back(model: Any, folder: Path) -> dict[str, Any]:
    """Save, load by transformers, compare logits; the written quantization_config."""
    expected = logits(model)
    calipers.save(model, folder)
    loaded = type(model).from_pretrained(folder)
    assert torch.equal(logits(loaded), expected)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    written: dict[str, Any] = config["quantization_config"]
    return written


def schemes_of(model: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Weight bits and type by module name."""
    return {
        name: (module.quantization_scheme.weights.num_bits, module.quantization_scheme.weights.type)
        for name, module in model.named_modules()
        if hasattr(module, "quantization_scheme")
    }


class TestTwoCalls:
    @pytest.mark.parametrize(
        ("first", "second"), [("FP8_DYNAMIC", "W4A16"), ("W8A8", "FP8_DYNAMIC")]
    )
    def test_complementary_ignores(self, first, second, tmp_path):
        model = tiny_llama(layers=2)
        calipers.calibrate(model, first, ignore="LlamaMLP")
        calipers.calibrate(model, second, ignore="LlamaAttention")
        before = schemes_of(model)
        written = comes_back(model, tmp_path / "model")
        assert len(before) == 14
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        assert schemes_of(loaded) == before
        # three layers of each decoder layer are in the MLP, four in the attention: the class stays
        # with the more frequent scheme, the others are named, numbers as a regex
        targets = [group["targets"] for group in written["config_groups"].values()]
        assert targets == [
            ["Linear"],
            [
                rf"re:model\.layers\.\d+\.mlp\.{leaf}$"
                for leaf in ("gate_proj", "up_proj", "down_proj")
            ],
        ]
        assert written["format"] == "mixed-precision"

    def test_layers_of_one_shape_under_two_schemes_are_named_one_by_one(self, tmp_path):
        model = tiny_llama(layers=3)
        calipers.calibrate(model, "W8A16", ignore="model.layers.1")
        calipers.calibrate(model, "W4A16", ignore=r"re:model\.layers\.[02]\.")
        written = comes_back(model, tmp_path / "model")
        targets = written["config_groups"]["group_1"]["targets"]
        assert len(targets) == 7
        assert all(target.startswith("model.layers.1.") for target in targets)

    def test_a_part_of_the_model_that_is_saved_as_a_whole(self, tmp_path):
        model = tiny_llama()
        calipers.calibrate(model.model, "W8A8")
        written = comes_back(model, tmp_path / "model")
        assert written["ignore"] == ["lm_head"]

    def test_the_same_scheme_twice_is_one_group(self, tmp_path):
        model = tiny_llama()
        calipers.calibrate(model, "W8A8", ignore="LlamaMLP")
        calipers.calibrate(model, "W8A8", ignore="LlamaAttention")
        written = comes_back(model, tmp_path / "model")
        assert list(written["config_groups"]) == ["group_0"]


class MyLinear(nn.Linear):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden @ self.weight.T


class MyLlama(transformers.LlamaForCausalLM):
    """A Llama whose MLPs are made of a subclass of Linear."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            up = layer.mlp.up_proj
            layer.mlp.up_proj = MyLinear(up.in_features, up.out_features, bias=False)
        self.post_init()


class TestSubclassesOfLinear:
    @pytest.mark.parametrize("scheme", ["W4A16", "FP8_DYNAMIC"])
    def test_are_stored_quantized_and_come_back(self, scheme, tmp_path):
        torch.manual_seed(0)
        model: Any = MyLlama(tiny_llama().config).eval()
        report = calipers.calibrate(model, scheme)
        assert len(report.modules) == 7
        comes_back(model, tmp_path / "model")
        plain = tiny_llama()
        calipers.calibrate(plain, scheme)
        size = calipers.checkpoint.compressed_size
        assert size(model) == size(plain)

    def test_of_falcon(self, tmp_path):
        model = falcon()
        report = calipers.calibrate(model, "FP8_DYNAMIC")
        assert report.quantized_share == 1.0
        comes_back(model, tmp_path / "model")


class TestRenamedCheckpoints:
    """Models whose checkpoints name modules otherwise than their classes do."""

    @pytest.mark.parametrize(
        ("make", "pattern", "here", "stored"),
        [
            (qwen2_vl, "re:.*visual.*", "model.visual.", "visual."),
            (gemma3, "model.vision_tower", "model.vision_tower.", "vision_tower."),
        ],
        ids=["qwen2_vl", "gemma3"],
    )
    @pytest.mark.parametrize("scheme", ["W4A16", "FP8_DYNAMIC"])
    def test_ignored_towers_stay_ignored(self, make, pattern, here, stored, scheme, tmp_path):
        made = make()
        made.save_pretrained(tmp_path / "source")
        model = type(made).from_pretrained(tmp_path / "source").eval()
        calipers.calibrate(model, scheme, ignore=pattern)
        written = comes_back(model, tmp_path / "model")
        for prefix in (here, stored):  # transformers reads the one, vLLM the other
            assert any(name.startswith(prefix) for name in written["ignore"]), prefix


def test_a_config_that_does_not_resolve_to_the_model_stops_the_save(tmp_path, monkeypatch):
    model = tiny_llama()
    calipers.calibrate(model, "W8A8", ignore="LlamaMLP")
    calipers.save(model, tmp_path / "model")
    before = {each.name: each.read_bytes() for each in (tmp_path / "model").iterdir()}
    monkeypatch.setattr(module_under_test, "_ignored", lambda *args: [])
    with pytest.raises(CheckpointError) as caught:
        calipers.save(model, tmp_path / "model", force=True)
    assert "would give 4 modules another scheme than they have" in str(caught.value)
    assert "model.layers.0.mlp.gate_proj" in str(caught.value)
    assert {each.name: each.read_bytes() for each in (tmp_path / "model").iterdir()} == before
    assert [each.name for each in tmp_path.iterdir()] == ["model"]


def test_routers_are_on_the_ignore_list_though_they_are_no_linear_here():
    model = mixtral()
    calipers.calibrate(model, "W8A8")
    found = saved_config(model)
    assert isinstance(found, QuantizationConfig)
    assert "model.layers.0.mlp.gate" in found.ignore


def test_nothing_quantized_is_no_config():
    assert saved_config(tiny_llama()) is None
