"""How often a whole model is compiled for: at most twice for a scheme."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import calipers
from calipers.demo import MODEL_PATH
from calipers.ranges import engines, grid_inductor, group_sums


@pytest.fixture(autouse=True)
def _compiled_from_scratch(monkeypatch):
    monkeypatch.setenv("CALIPERS_ENGINE", "inductor")
    torch._dynamo.reset()
    grid_inductor._compiled_errors.cache_clear()
    group_sums._compiled.cache_clear()
    assert engines.inductor_problem(torch.device("cpu")) is None


def compilations() -> int:
    count: int = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return count


def calibrate(model: torch.nn.Module, scheme: str, observer: str = "memoryless_mse") -> int:
    """Graphs compiled for the weights of the model."""
    before = compilations()
    data = [torch.arange(64).view(1, -1)] if observer == "optimal" else None
    report = calipers.calibrate(copy.deepcopy(model), scheme, observer, data)
    assert len(report.modules) > 1
    assert not engines._failures
    return compilations() - before


@pytest.mark.slow
def test_the_demo_model():
    model = AutoModelForCausalLM.from_pretrained(MODEL_PATH, dtype="auto").eval()
    shapes = {m.weight.shape for m in model.modules() if isinstance(m, torch.nn.Linear)}
    assert len(shapes) > 2
    assert 1 <= calibrate(model, "W4A16") <= 2


def llama_of_100_million_parameters() -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=14,
        num_attention_heads=12,
        num_key_value_heads=4,
        vocab_size=16000,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).bfloat16().eval()
    assert 9e7 < sum(p.numel() for p in model.parameters()) < 1.2e8
    return model


@pytest.mark.slow
@pytest.mark.parametrize("observer", ["memoryless_mse", "optimal"])
@pytest.mark.parametrize("scheme", ["W4A16", "W8A16", "NVFP4A16"])
def test_a_llama_of_100_million_parameters(scheme, observer):
    assert 1 <= calibrate(llama_of_100_million_parameters(), scheme, observer) <= 2


def test_the_native_engine_compiles_nothing_for_a_model(monkeypatch):
    """Its library is there, once for a machine."""
    monkeypatch.setenv("CALIPERS_ENGINE", "native")
    model = llama_of_100_million_parameters()
    assert [calibrate(model, scheme) for scheme in ("W4A16", "NVFP4A16")] == [0, 0]
