"""`--only language`, for a model on disk that sees as well."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from cli.conftest import Calipers, error_of, succeeded, train_tokenizer
from multimodal_models import gemma3, other_inputs, qwen2_vl


@pytest.fixture(scope="module", params=["gemma3", "qwen2_vl"])
def seeing(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of its kind with a tokenizer of its own."""
    path = tmp_path_factory.mktemp("models") / request.param
    with torch.random.fork_rng():
        model = {"gemma3": gemma3, "qwen2_vl": qwen2_vl}[request.param]()
    model.resize_token_embeddings(320)
    model.save_pretrained(path)
    train_tokenizer().save_pretrained(path)
    return path


def test_calibrate_and_load(calipers: Calipers, seeing: Path, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    few = ("--samples", 2, "--eval-samples", 2, "--sequence-length", 16)
    given = ("--data", texts / "text.jsonl", "--eval", texts / "text.jsonl")
    result = succeeded(
        calipers(
            *("calibrate", seeing, "--only", "language", "--scheme", "FP8", "--out", out),
            *(*few, *given, "--json"),
        )
    )
    modules = [each["name"] for each in result["calibration"]["modules"]]
    assert len(modules) == 14
    assert all("language_model" in each for each in modules)
    assert "not the language part" in {
        each["reason"] for each in result["calibration"]["left_alone"]
    }
    loaded = AutoModelForImageTextToText.from_pretrained(out)
    with torch.no_grad():
        assert bool(loaded(**other_inputs(loaded)).logits.isfinite().all())
    quantized = [name for name, each in loaded.named_modules() if hasattr(each, "weight_scale")]
    assert len(quantized) == 14


def test_without_it_the_error_says_the_word(calipers: Calipers, seeing: Path, texts: Path) -> None:
    data = ("--data", texts / "text.jsonl", "--samples", 2, "--no-eval")
    error = error_of(calipers("calibrate", seeing, "--scheme", "FP8", *data))
    assert "(--only language)" in error


def test_compare(calipers: Calipers, seeing: Path, texts: Path) -> None:
    few = ("--samples", 2, "--eval-samples", 2, "--sequence-length", 16)
    given = ("--data", texts / "text.jsonl", "--eval", texts / "text.jsonl")
    result = succeeded(
        calipers(
            *("compare", seeing, "--only", "language", "--scheme", "FP8"),
            *("--observer", "memoryless_minmax", *few, *given, "--json"),
        )
    )
    (run,) = result["runs"]
    assert run["perplexity"]["value"] > 1


def test_other_words_and_other_models(calipers: Calipers, llama: Path, texts: Path) -> None:
    assert "--only must be one of language, got 'vision'" in error_of(
        calipers("calibrate", llama, "--only", "vision")
    )
    whole = ("--no-data", "--no-eval", "--scheme", "FP8_DYNAMIC", "--json")
    result = succeeded(calipers("calibrate", llama, "--only", "language", *whole))
    assert result["calibration"]["quantized_share"] == 1.0
