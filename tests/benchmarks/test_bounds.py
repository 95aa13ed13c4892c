"""The bounds of `benchmarks.bounds` bound: no scale is better by the whole X'X."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, fake_quantize
from torch import Tensor

from benchmarks.bounds import best_of_rows, best_weight, error_of
from benchmarks.quality.formats import formats
from calipers.observers import Observer

GROUPS = {"int4 g16": 4, "int3 g16": 3}


def problem() -> tuple[Tensor, Tensor]:
    """A weight, and inputs that go together."""
    generator = torch.Generator().manual_seed(5)
    mix = torch.randn(8, 64, generator=generator)
    x = torch.randn(300, 8, generator=generator) @ mix + torch.randn(300, 64, generator=generator)
    return torch.randn(20, 64, generator=generator) * 0.02, x


def found(
    args: QuantizationArgs, weight: Tensor, x: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    module = torch.nn.Module()
    observer = Observer.load_from_registry("optimal", "weight", args, module, objective="hessian")
    observer.observe_input(x)
    shared = None
    if args.strategy == "tensor_group":
        shared = module.weight_global_scale = observer.get_global_scale(weight)
    scale, zero_point = observer(weight)
    return scale, fake_quantize(weight, scale, zero_point, args, shared), shared


@pytest.mark.parametrize("kind", [*GROUPS, "int4 channel", "NVFP4"])
def test_no_scale_is_better(kind: str) -> None:
    weight, x = problem()
    args = formats().get(kind) or QuantizationArgs(
        num_bits=GROUPS[kind], strategy="group", group_size=16
    )
    gram = x.T @ x
    scale, rounded, shared = found(args, weight, x)
    best = best_weight(weight, scale, gram, args, shared)
    bound = error_of(best - weight, gram)
    assert 0 < bound < error_of(rounded - weight, gram)


def test_one_scale_a_row_is_the_best_of_all() -> None:
    weight, x = problem()
    args, gram = formats()["int4 channel"], x.T @ x
    best = best_weight(weight, torch.ones(20, 1), gram, args, None)
    scales = torch.linspace(0.02, 1.2, 4000).unsqueeze(1) * weight.abs().amax(1) / 7.5
    least = torch.full((20,), torch.inf)
    for scale in scales:
        step = scale.unsqueeze(1)
        errors = (weight / step).round().clamp(-8, 7) * step - weight
        least = torch.minimum(least, ((errors @ gram) * errors).sum(1))
    rows = ((best - weight) @ gram * (best - weight)).sum(1)
    # Rows of 64 values have many optima, which no grid finds all.
    assert 0.99 < float(rows.sum() / least.sum()) < 1.06


@pytest.mark.parametrize("part", [0.0, 1.0])
def test_each_row_takes_the_one_of_least_error(part: float) -> None:
    weight, x = problem()
    gram = x.T @ x
    several = torch.stack([(weight / step).round() * step for step in (0.004, 0.006, 0.005)])
    best = best_of_rows(several, weight, gram, part)
    judge = gram + part * gram.diagonal().diag()
    chosen = []
    for row in range(len(weight)):
        errors = [
            float((one[row] - weight[row]) @ judge @ (one[row] - weight[row])) for one in several
        ]
        chosen.append(errors.index(min(errors)))
        assert torch.equal(best[row], several[chosen[-1], row])
    assert len(set(chosen)) > 1
