"""Compiled and wrapped models: named, calibrated, saved and loaded as the model inside."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from calibration.tiny_models import tiny_llama, token_batches
from calipers._unwrap import unwrap
from calipers.calibration import attach, calibrate
from calipers.checkpoint import compressed_size, save
from calipers.errors import CheckpointError


class Wrapper(nn.Module):
    """A user's own, around one model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, **batch):
        return self.inner(**batch)


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def compiled_blocks(model: nn.Module) -> nn.Module:
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = torch.compile(layer, backend="eager")
    return model


def nested(model: nn.Module) -> nn.Module:
    return nn.DataParallel(torch.compile(compiled_blocks(model), backend="eager"))


OF_TORCH = [compiled, compiled_in_place, compiled_blocks, nn.DataParallel, nested]


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(**token_batches()[0]).logits


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("wrap", "preset"), [*((wrap, "FP8") for wrap in (*OF_TORCH, Wrapper)), (compiled, "W4A16")]
)
def test_saved_and_loaded_with_equal_logits(wrap, preset, tmp_path):
    plain, model = tiny_llama(), tiny_llama()
    wrapped = wrap(model)
    expected = calibrate(plain, preset, data=token_batches())
    report = calibrate(wrapped, preset, data=token_batches())
    if wrap is not Wrapper:  # its batches are its own, and so are its names
        assert report.modules == expected.modules
        assert report.left_alone == expected.left_alone
    assert compressed_size(wrapped) == compressed_size(plain)
    save(wrapped, tmp_path / "saved", load_check=False)
    save(plain, tmp_path / "plain", load_check=False)
    for file in ("config.json", "model.safetensors"):
        one, other = ((tmp_path / name / file).read_bytes() for name in ("saved", "plain"))
        assert one == other, file
    assert "_orig_mod" not in json.dumps(json.loads((tmp_path / "saved/config.json").read_text()))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(loaded), logits(plain))


# dynamo warns of the lru_cache in compressed-tensors' quantized forward
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*lru_cache")
def test_what_was_compiled_before_runs_quantized_after():
    plain, wrapped = tiny_llama(), torch.compile(tiny_llama(), backend="eager")
    before = logits(wrapped)
    for model in (plain, wrapped):
        calibrate(model, "W4A16", "memoryless_minmax")
    assert torch.equal(logits(wrapped), logits(plain))
    assert not torch.equal(logits(wrapped), before)


@pytest.mark.parametrize("wrap", OF_TORCH)
def test_wrappers_are_back_after_attaching(wrap):
    model = tiny_llama(layers=2)
    wrapped = wrap(model)
    names = [name for name, _ in wrapped.named_modules()]
    with attach(wrapped, "FP8") as calibration:
        assert calibration.model is unwrap(wrapped)
        assert not any("_orig_mod" in each.name for each in calibration.observed)
        calibration.run(token_batches())
    assert [name for name, _ in wrapped.named_modules()] == names
    calibration = attach(wrapped, "W4A16", observer="memoryless_minmax")
    calibration.freeze()
    assert [n for n, _ in wrapped.named_modules() if not n.endswith("_observer")] == names
    calibration.detach()
    assert [name for name, _ in wrapped.named_modules()] == names


def test_wrappers_are_back_after_an_error():
    model = compiled_blocks(tiny_llama())
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match="ignore"):
        attach(model, "W4A16", ignore="no_such_layer")
    assert [name for name, _ in model.named_modules()] == names


def test_data_runs_as_it_is_written():
    """A model that is compiled as one graph could not take the observers."""
    model = tiny_llama()
    model.compile(backend="eager", fullgraph=True)
    expected = calibrate(tiny_llama(), "W4A16", "imatrix_mse", token_batches())
    assert calibrate(model, "W4A16", "imatrix_mse", token_batches()).modules == expected.modules


def test_an_attention_mask_counts_through_a_wrapper():
    batch = {**token_batches(1)[0], "attention_mask": torch.ones(2, 8, dtype=torch.long)}
    batch["attention_mask"][0, :3] = 0
    report = calibrate(nn.DataParallel(tiny_llama()), "FP8", data=[batch])
    assert (report.tokens_given, report.tokens_counted) == (16, 13)


def test_two_models_are_no_wrapper(tmp_path):
    pair = nn.ModuleList([tiny_llama(), tiny_llama()])
    with pytest.raises(CheckpointError, match="got ModuleList"):
        save(pair, tmp_path / "saved")
