"""What comes of each architecture: the share of its weights quantized, saved, loaded, compared.

    python -m benchmarks.models [--models PATTERN] [--json FILE]

Models are the tiny random ones of the tests, in bfloat16. `docs/models.md` has the table, and
`tests/end_to_end/test_models.py` compares it with what the code gives. A cell has the share of the
projection weights that is quantized, and whether the saved model comes back with equal logits: by
`from_pretrained` alone, or inside `calipers.loading_experts()`. Other tables have what stays where
that share is below 100%, and the errors.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from loguru import logger

import calipers
from benchmarks.results import ROOT, Table, add_json_option, measured
from calipers.calibration.report import CalibrationReport
from calipers.calibration.targets import kind_of

sys.path.insert(0, str(ROOT / "tests"))

import architectures
from multimodal_models import all_inputs

__all__ = ["MODELS", "RECIPES", "RESULT", "Found", "main", "measure", "tables_of"]

RESULT = "models.json"
#: Name of the model in the table, and of the function that makes it.
MODELS: dict[str, str] = {
    "Llama": "llama",
    "Llama, tied embeddings": "tied_llama",
    "Llama, classifier": "llama_classifier",
    "Mistral": "mistral",
    "Qwen3": "qwen3",
    "Qwen3-MoE": "qwen3_moe",
    "Mixtral": "mixtral",
    "Gemma 3, text": "gemma3_text",
    "Gemma 3, multimodal": "gemma3",
    "Phi-3": "phi3",
    "OLMo 2": "olmo2",
    "Falcon": "falcon",
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

#: Logits differ by less than this share of their range where sums have another order in bfloat16.
_NEAR = 0.01


@dataclass(frozen=True)
class Found:
    """What comes of one model.

    Attributes:
        row: Of the table, a cell for each recipe.
        stays: What is left alone where a cell has less than 100%, a row for each recipe.
        errors: Those behind the cells, a row for each recipe.
    """

    row: dict[str, str]
    stays: list[dict[str, str]] = field(default_factory=list)
    errors: list[dict[str, str]] = field(default_factory=list)


def measure(name: str) -> Found:
    """What comes of a model under each recipe.

    Args:
        name: A key of `MODELS`.
    """
    make: Callable[[], Any] = getattr(architectures, MODELS[name])
    found = Found({"model": name})
    for recipe, (arguments, with_data) in RECIPES.items():
        head = {"model": name, "recipes": recipe}
        model = _in_bfloat16(make())
        data = [all_inputs(model, seed) for seed in (1, 2)] if with_data else None
        try:
            report = calipers.calibrate(model, data=data, **arguments)
        except (calipers.CalipersError, ValueError) as error:
            found.row[recipe] = "refused"
            found.errors.append({**head, "error": _in_short(error)})
            continue
        share = ""
        if arguments["scheme"] is not None:
            share = f"{100 * report.quantized_share:.0f}%, "
            if not share.startswith("100"):
                found.stays.extend({**head, **each} for each in _what_stays(report, model))
        loads, error = _save_and_load(model)
        found.row[recipe] = f"{share}{loads}"
        if error is not None:
            found.errors.append({**head, "error": error})
    return found


def _what_stays(report: CalibrationReport, model: Any) -> list[dict[str, str]]:
    """Matrices that count and stay as they are, like ones in one row, the largest share first."""
    shares: dict[tuple[str, str], float] = defaultdict(float)
    for each in report.left_alone:
        own = dict(model.get_submodule(each.name).named_parameters(recurse=False))
        matrices = " and ".join(name for name, value in own.items() if value.ndim > 1)
        shares[f"{kind_of(each.name)}.{matrices}", each.why] += each.share
    rows = sorted(shares.items(), key=lambda row: -row[1])
    return [
        {"stays": kind, "share": f"{100 * share:.1f}%", "why": why}
        for (kind, why), share in rows
        if share
    ]


def _save_and_load(model: Any) -> tuple[str, str | None]:
    """How a calibrated model comes back, in a word, and the error where it does not."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        try:
            calipers.save(model, path)
        except calipers.CalipersError as error:
            return "does not load", _in_short(error)
        expected = _output(model)
        spread = expected.max() - expected.min()
        is_near = False
        for exact, loading in (("exact", _as_it_is), ("exact in loading_experts()", _by_expert)):
            try:
                loaded = _output(loading(type(model), path))
            except Exception as error:  # whatever a loader raises
                problem = f"{type(error).__name__}: {_in_short(error)}"
            else:
                problem = "other logits"
                if torch.equal(loaded, expected):
                    return exact, None
                is_near |= bool((loaded - expected).abs().max() < _NEAR * spread)
    if is_near:
        return "near", f"logits differ by less than {_NEAR:.0%} of their range"
    return "does not load", problem


def _in_bfloat16(model: Any) -> Any:
    """The parameters alone: rotary tables stay in float32, as in a loaded model."""
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    return model


@torch.no_grad()
def _output(model: Any) -> torch.Tensor:
    """Of inputs that the model was not calibrated with, computed as by a loaded model.

    torch.matmul copies a transposed input where the weight requires a gradient, under no_grad as
    well, and then rounds otherwise; what is loaded packed requires none.
    """
    model.requires_grad_(False)
    found = model(**all_inputs(model, 3))
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
        r"\d+% of the weights that stay are in .*?(?=\)|$)",
    ):
        found = re.search(pattern, told)
        if found is not None:
            return found[0].replace("|", "/")
    return (told if len(told) <= 240 else told[:237] + "...").replace("|", "/")


def tables_of(found: Sequence[Found]) -> dict[str, Table]:
    """What the result file has of models, by name of the table."""
    stays = _gathered([row for each in found for row in each.stays])
    errors = _gathered([row for each in found for row in each.errors])
    return {
        "models": Table(_columns("model", *RECIPES), [each.row for each in found]),
        "stays": Table(_columns("model", "recipes", "stays", "share", "why"), stays),
        "errors": Table(_columns("model", "recipes", "error"), errors),
    }


def _gathered(rows: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """One row for those that differ in their recipes alone, with all of these."""
    recipes: dict[tuple[tuple[str, str], ...], list[str]] = defaultdict(list)
    for row in rows:
        recipes[tuple((k, v) for k, v in row.items() if k != "recipes")].append(row["recipes"])
    return [
        {"model": rest[0][1], "recipes": ", ".join(found), **dict(rest)}
        for rest, found in recipes.items()
    ]


def _columns(*keys: str) -> list[list[str]]:
    return [[key, key, "{}"] for key in keys]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="", metavar="PATTERN", help="regular expression")
    add_json_option(parser)
    options = parser.parse_args(arguments)
    logger.disable("calipers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    found = []
    for name in MODELS:
        if re.search(options.models, name):
            found.append(measure(name))
            print(*found[-1].row.values(), sep=" | ", flush=True)
    tables = tables_of(found)
    for name in ("stays", "errors"):
        print()
        for row in tables[name].rows:
            print(*row.values(), sep=" | ")
    if options.json is not None:
        measured("benchmarks.models", arguments, tables).write(options.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
