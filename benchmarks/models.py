"""What comes of each architecture: the share of its weights quantized, saved, loaded, compared.

    python -m benchmarks.models [--models PATTERN] [--json FILE]

Models are the tiny random ones of the tests, in bfloat16. `docs/models.md` has the table, and
`tests/end_to_end/test_models.py` compares it with what the code gives. A cell has the share of the
projection weights that is quantized, and whether the saved model comes back with equal logits: by
`from_pretrained` alone, or inside `calipers.loading_experts()`.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from loguru import logger

import calipers
from benchmarks.results import ROOT, Table, add_json_option, measured

sys.path.insert(0, str(ROOT / "tests"))

import architectures
from architectures import example_inputs

__all__ = ["MODELS", "RECIPES", "RESULT", "main", "measure"]

RESULT = "models.json"
#: Name of the model in the table, and of the function that makes it.
MODELS: dict[str, str] = {
    "Llama": "llama",
    "Llama, tied embeddings": "tied_llama",
    "Mistral": "mistral",
    "Qwen3": "qwen3",
    "Qwen3-MoE": "qwen3_moe",
    "Mixtral": "mixtral",
    "Gemma 3, text": "gemma3_text",
    "Gemma 3, multimodal": "gemma3",
    "Phi-3": "phi3",
    "OLMo 2": "olmo2",
    "GPT-2": "gpt2",
    "GPT-OSS": "gpt_oss",
    "DeepSeek-V3": "deepseek_v3",
    "GLM-4-MoE": "glm4_moe",
    "Qwen3-Next": "qwen3_next",
    "Granite-MoE": "granite_moe",
    "Llama 4": "llama4",
    "Qwen2-VL": "qwen2_vl",
    "Qwen3-VL": "qwen3_vl",
    "CLIP, vision": "clip",
    "SigLIP, vision": "siglip",
    "ViT": "vit",
    "BERT": "bert",
    "RoBERTa": "roberta",
    "ModernBERT": "modernbert",
    "T5": "t5",
    "Whisper": "whisper",
    "Mamba": "mamba",
    "Jamba": "jamba",
}
#: What is asked of each model: the arguments of `calibrate`, and whether data is given.
RECIPES: dict[str, tuple[Mapping[str, Any], bool]] = {
    "W4A16": ({"scheme": "W4A16", "observer": "memoryless_minmax"}, False),
    "W4A16 with data": ({"scheme": "W4A16"}, True),
    "FP8": ({"scheme": "FP8", "observer": "memoryless_minmax"}, True),
    "NVFP4": ({"scheme": "NVFP4", "observer": "memoryless_minmax"}, True),
    "FP8 cache": ({"scheme": None, "kv_cache": "FP8"}, True),
    "FP8 cache by head": ({"scheme": None, "kv_cache": "FP8_HEAD"}, True),
}


def measure(name: str) -> tuple[dict[str, str], list[dict[str, str]]]:
    """A row of the table, and the errors behind its cells.

    Args:
        name: A key of `MODELS`.
    """
    make: Callable[[], Any] = getattr(architectures, MODELS[name])
    row, errors = {"model": name}, []
    for recipe, (arguments, with_data) in RECIPES.items():
        row[recipe], error = _try(_in_bfloat16(make()), arguments, with_data=with_data)
        if error is not None:
            errors.append({"model": name, "recipe": recipe, "error": error})
    return row, errors


def _try(model: Any, arguments: Mapping[str, Any], *, with_data: bool) -> tuple[str, str | None]:
    """What comes of one recipe, in a word, and the error where there is one."""
    data = [_inputs(model, seed) for seed in (1, 2)] if with_data else None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        try:
            report = calipers.calibrate(
                model,
                data=data,
                on_missing="error" if arguments["scheme"] is None else "skip",
                **arguments,
            )
        except (calipers.CalipersError, ValueError) as error:
            return "refused", _in_short(error)
        share = "" if arguments["scheme"] is None else f"{100 * report.quantized_share:.0f}%, "
        try:
            calipers.save(model, path)
        except calipers.CalipersError as error:
            return f"{share}does not load", _in_short(error)
        expected = _output(model)
        for exact, loading in (("exact", _as_it_is), ("exact in loading_experts()", _by_expert)):
            try:
                loaded = _output(loading(type(model), path))
            except Exception as error:  # whatever a loader raises
                problem = f"{type(error).__name__}: {_in_short(error)}"
            else:
                problem = "other logits"
                if torch.equal(loaded, expected):
                    return f"{share}{exact}", None
    return f"{share}does not load", problem


def _in_bfloat16(model: Any) -> Any:
    """The parameters alone: rotary tables stay in float32, as in a loaded model."""
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    return model


def _inputs(model: Any, seed: int) -> dict[str, torch.Tensor]:
    given = example_inputs(model, seed)
    return {
        name: each.bfloat16() if each.is_floating_point() else each for name, each in given.items()
    }


@torch.no_grad()
def _output(model: Any) -> torch.Tensor:
    """Of inputs that the model was not calibrated with."""
    found = model(**_inputs(model, 3))
    output: torch.Tensor = found.logits if "logits" in found else found.last_hidden_state
    return output


def _as_it_is(kind: Any, path: Path) -> Any:
    return kind.from_pretrained(path, dtype="auto")


def _by_expert(kind: Any, path: Path) -> Any:
    with calipers.loading_experts():
        return kind.from_pretrained(path, dtype="auto")


def _in_short(error: Exception) -> str:
    """What an error says of the cause, without names of modules and what to do about it."""
    told = " ".join(str(error).split())
    for pattern in (
        r"loading raises .*?(?= no part of| leave them| a config| For details|$)",
        r"loads with other outputs(?=, by)",
        r"(?<=: )compressed-tensors [\d.]+ finds no attention",
        r"(?<=: )compressed-tensors [\d.]+ puts its QuantizedKVCache .*?, which has no update",
        r"its cache holds one latent for all heads",
        r"which cannot be quantized: .*?(?=\)|$)",
    ):
        found = re.search(pattern, told)
        if found is not None:
            return found[0].replace("|", "/")
    return (told if len(told) <= 240 else told[:237] + "...").replace("|", "/")


def _gathered(errors: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """One row for each error of a model, with the recipes that meet it."""
    rows: dict[tuple[str, str], list[str]] = {}
    for each in errors:
        rows.setdefault((each["model"], each["error"]), []).append(each["recipe"])
    return [
        {"model": model, "recipes": ", ".join(recipes), "error": error}
        for (model, error), recipes in rows.items()
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="", metavar="PATTERN", help="regular expression")
    add_json_option(parser)
    options = parser.parse_args(arguments)
    logger.disable("calipers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rows, errors = [], []
    for name in MODELS:
        if re.search(options.models, name):
            row, told = measure(name)
            rows.append(row)
            errors += told
            print(*row.values(), sep=" | ", flush=True)
    print()
    for each in errors:
        print(*each.values(), sep=": ")
    tables = {
        "models": Table([["model", "model", "{}"], *([r, r, "{}"] for r in RECIPES)], rows),
        "errors": Table(
            [[key, key, "{}"] for key in ("model", "recipes", "error")], _gathered(errors)
        ),
    }
    if options.json is not None:
        measured("benchmarks.models", arguments, tables).write(options.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
