"""Reports as files have them, made up: 30 layers of 7 projections, as of SmolLM2-135M."""

from __future__ import annotations

import math
import random
from typing import Any

PROJECTIONS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


def tensor_plot(rng: random.Random, spread: float) -> dict[str, Any]:
    """A histogram of 64 bars, a range and the error over 32 factors."""
    edges = [-1 + 2 * (i + 0.5) / 64 for i in range(64)]
    counts = [int(60000 * math.exp(-((x / spread) ** 2)) * rng.uniform(0.8, 1.2)) for x in edges]
    counts[0] = counts[-1] = 1
    factors = [0.3 + 0.7 * i / 31 for i in range(32)]
    errors = [0.002 * f * f + 0.03 * math.exp(-((f / 0.3) ** 2)) for f in factors]
    chosen = min(zip(errors, factors, strict=True))[1]
    return {
        "histogram": {"low": -0.42, "high": 0.42, "counts": counts},
        "range": [-0.4 * chosen, 0.4 * chosen],
        "curve": {"factor": factors, "error": errors},
        "chosen_factor": chosen,
    }


def module(rng: random.Random, name: str, error: float, activations: bool) -> dict[str, Any]:
    inputs = {"sqnr_db": 31.5, "judged_by": "in-sample", "clipped": 0.0002, "moved": 0.012}
    plots = {"weight": tensor_plot(rng, 0.3)}
    if activations:
        plots["input"] = tensor_plot(rng, 0.1)
    return {
        "name": name,
        "weight_observer": "optimal",
        "weight_bits": 4,
        "weight_error": error,
        "activation_observer": "static_minmax" if activations else None,
        "activations": "static" if activations else None,
        "tokens": 63514,
        "fallback": [],
        "objective": "imatrix",
        "shared": 0.0,
        "states": [],
        "shadows": {},
        "weight": {
            "error": error,
            "output_error": error * rng.uniform(0.5, 1.1),
            "output_error_from": "gram",
            "held_out_error": None,
            "sqnr_db": -20 * math.log10(error),
            "clipped": rng.uniform(0, 0.002),
            "zeros": rng.uniform(0.08, 0.14),
            "entropy": rng.uniform(3.2, 3.7),
            "bits": 4,
            "scales_saturated": None,
            "scales_underflowed": None,
        },
        "activation_measures": {"input": inputs} if activations else {},
        "plots": plots,
    }


def report(
    seed: int = 0, layers: int = 30, activations: bool = False, level: float = 0.1, **head: Any
) -> dict[str, Any]:
    """A report of every measure; the same seed gives the same."""
    rng = random.Random(seed)
    modules = [
        module(
            rng,
            f"model.layers.{layer}.{name}",
            level * (1 + 0.1 * i / 7 + 0.3 * abs(layer - 15) / 15) * rng.uniform(0.9, 1.2),
            activations,
        )
        for layer in range(layers)
        for i, name in enumerate(PROJECTIONS)
    ]
    perplexity = {
        "before": 18.720,
        "before_error": 0.41,
        "after": 18.72 * (1 + 2 * level),
        "after_error": 0.52,
        "relative": 2 * level,
        "relative_error": 0.01,
        "kl": level / 1.5,
        "kl_error": 0.002,
        "top1": 1 - level,
        "top1_error": 0.003,
        "sequences": 77,
        "tokens": 35911,
    }
    head_left = {"name": "lm_head", "kind": "Linear", "reason": "output head", "weights": 28311552}
    return {
        "format": 1,
        "calipers": "0.1.0",
        "created": "2026-11-27T18:00:00+00:00",
        "model": "./SmolLM2-135M",
        "scheme": "W4A16",
        "observer": "optimal",
        "options": {"objective": "imatrix"},
        "measures": {"perplexity": perplexity},
        "modules": modules,
        "skipped": [],
        "left_alone": [{**head_left, "share": 0.0}],
        "quantized_share": 1.0,
        "seconds": 35.8,
        "batches": 128,
        "held_out": 0,
        "tokens_given": 65536,
        "tokens_counted": 63514,
        "unmasked": [],
        "coverage": [],
        **head,
    }


def with_experts(layers: int = 2, experts: int = 8) -> dict[str, Any]:
    """A report of a model with experts, one of which saw nothing and one few tokens."""
    told = report(layers=layers)
    for layer in range(layers):
        name = f"model.layers.{layer}.mlp.experts"
        tokens = {f"{name}.{i}": 40 * i * i for i in range(experts)}
        few = [each for each, count in tokens.items() if count < 256]
        unseen = [each for each, count in tokens.items() if not count]
        told["coverage"].append(
            {"name": name, "tokens": tokens, "enough": 256, "few": few, "unseen": unseen}
        )
    return told


def of_an_earlier_calipers() -> dict[str, Any]:
    """A report without any of the measures, as `to_dict` gave it once."""
    told = report(layers=2)
    for key in ("measures", "observer", "options", "coverage", "left_alone", "created"):
        del told[key]
    for row in told["modules"]:
        for key in ("weight", "activation_measures", "plots", "shadows", "shared"):
            del row[key]
    return told


def with_shadows() -> dict[str, Any]:
    """A report of two observers of weights; in the first layer the second one was better."""
    told = report(layers=2)
    for i, row in enumerate(told["modules"]):
        errors = (0.010, 0.012 if i >= 7 else 0.008)
        row["shadows"]["weight"] = [
            {"observer": name, "error": error, "chosen": first, "judged_by": "held-out"}
            for name, error, first in zip(("optimal", "mse"), errors, (True, False), strict=True)
        ]
    return told
