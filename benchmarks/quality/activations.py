"""Static activations: error over the pooled optimum on streams that drift and have outliers."""

from __future__ import annotations

import re
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams
from torch import Tensor

from calipers.observers import Observer

__all__ = ["measure_activations"]

Json = dict[str, Any]
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
FORMATS: dict[str, Json] = {
    "int8": {"num_bits": 8},
    "int4": {"num_bits": 4},
    "fp8": {"num_bits": 8, "type": "float"},
}
OBSERVERS: dict[str, Json] = {
    "histogram": {},
    "static_minmax": {},
    "minmax": {},
    "mse": {},
    "histogram percentile": {"method": "percentile"},
}


def stream(kind: str, dtype: torch.dtype, batches: int) -> list[Tensor]:
    """Batches of (tokens, hidden) whose width grows to four times what it was.

    "outliers": in 2 batches 1% of the values are 20 times as large; "gelu": these through GELU.
    """
    generator = torch.Generator().manual_seed(0)
    found = []
    for i in range(batches):
        batch = torch.randn(128, 256, generator=generator) * (0.5 + 1.5 * i / (batches - 1))
        if kind != "drift" and i in (batches // 5, batches * 3 // 4):
            batch[torch.rand(batch.shape, generator=generator) < 0.01] *= 20
        found.append((torch.nn.functional.gelu(batch) if kind == "gelu" else batch).to(dtype))
    return found


def measure_activations(quick: bool = False, only: str = "") -> Json:
    """Excess squared error in percent: in order, in reverse, and the worst of merged splits.

    Args:
        quick: A few batches alone.
        only: Regular expression that the formats' names must match.
    """
    results = []
    batches = 8 if quick else 64
    for kind in ("outliers",) if quick else ("drift", "outliers", "gelu"):
        for dtype_name, dtype in DTYPES.items():
            values = stream(kind, dtype, batches)
            pooled = torch.cat([v.flatten() for v in values]).unique(return_counts=True)
            for name, options in FORMATS.items():
                if not re.search(only, name):
                    continue
                args = QuantizationArgs(strategy="tensor", **options)
                best = smallest_error(*pooled, args, dtype)
                for observer, kwargs in OBSERVERS.items():
                    row = {"stream": kind, "dtype": dtype_name, "format": name}
                    found = measure(observer.split()[0], kwargs, args, values, pooled, best)
                    results.append({**row, "observer": observer, **found})
    return {"batches": batches, "results": results}


def measure(
    name: str,
    kwargs: Json,
    args: QuantizationArgs,
    values: list[Tensor],
    pooled: tuple[Tensor, Tensor],
    best: float,
) -> Json:
    """Excess errors of one observer, in percent of the pooled optimum."""

    def observed(batches: list[Tensor]) -> Observer:
        observer = Observer.load_from_registry(name, "input", args, **kwargs)
        for batch in batches:
            observer.observe(batch)
        return observer

    def excess(observer: Observer) -> float:
        scale, zero_point = observer.get_qparams()
        return 100 * (float(errors(*pooled, scale, zero_point, args)) / best - 1)

    splits = []
    for parts in (2, 5):
        merged = observed(values[::parts])
        for start in range(1, parts):
            merged.merge(observed(values[start::parts]))
        splits.append(excess(merged))
    return {
        "excess": excess(observed(values)),
        "reversed": excess(observed(values[::-1])),
        "merged": max(splits),
    }


def errors(
    values: Tensor, counts: Tensor, scale: Tensor, zero_point: Tensor, args: QuantizationArgs
) -> Tensor:
    """Sum of count * error^2 for each of several scales, float64."""
    token_args = args.model_copy(update={"strategy": "token"})
    found = []
    step = max(1, 2**20 // len(values))
    for s, z in zip(scale.float().split(step), zero_point.split(step), strict=True):
        rounded = fake_quantize(values.float()[None], s[:, None], z[:, None], token_args)
        found.append((rounded.double() - values.double()).square() @ counts.double())
    return torch.cat(found)


def smallest_error(
    values: Tensor, counts: Tensor, args: QuantizationArgs, dtype: torch.dtype
) -> float:
    """By trying scales of a dense grid, rounded to the dtype of the values, then finer ones."""
    # Rounded to bfloat16, float32 values are few enough for the dense grid, which says where to
    # look.
    places, which = values.bfloat16().unique(return_inverse=True)
    some = places, torch.zeros(len(places)).double().index_add_(0, which, counts.double())
    low, high = values.min().float(), values.max().float()
    shrink = torch.logspace(-2.5, 0.31, 1500)
    scale, zero_point = calculate_qparams(low * shrink, high * shrink, args)
    scale = scale.to(dtype)
    order = errors(*some, scale, zero_point, args).argsort()[:8]
    finer = (scale[order].float()[:, None] * torch.linspace(0.996, 1.004, 17)).to(dtype).flatten()
    found = errors(values, counts, finer, zero_point[:1].expand(len(finer)), args)
    return float(found.min())
