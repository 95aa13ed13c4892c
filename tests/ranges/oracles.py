"""Plain and slow searches for the best scale, in float64: what the fast ones are held against."""

from __future__ import annotations

import torch
from compressed_tensors.quantization import QuantizationArgs, fake_quantize
from torch import Tensor

KINDS = ("gauss", "laplace", "student", "outliers")


def values(kind: str, groups: int, size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(groups, size, generator=generator)
    if kind == "laplace":
        u = torch.rand(groups, size, generator=generator).clamp(1e-6, 1 - 1e-6) - 0.5
        x = -u.sign() * torch.log1p(-2 * u.abs())
    elif kind == "student":
        x = x / torch.randn(groups, size, 4, generator=generator).square().mean(-1).sqrt()
    elif kind == "outliers":
        x = torch.where(torch.rand(groups, size, generator=generator) < 0.01, x * 10, x)
    return x


def importance(groups: int, size: int, log_sigma: float, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (log_sigma * torch.randn(groups, size, generator=generator)).exp()


def error(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    args: QuantizationArgs,
    global_scale: Tensor | None = None,
) -> Tensor:
    """Sum of weight * (fake_quantize(x) - x)^2 of each row, by compressed-tensors' own rounding."""
    token = args.model_copy(update={"strategy": "token"})
    scale, zero_point = scale.reshape(-1, 1), zero_point.reshape(-1, 1)
    rounded = fake_quantize(x, scale, zero_point, token, global_scale)
    return (weight.double() * (rounded.double() - x.double()).square()).sum(1)


def best_symmetric(x: Tensor, weight: Tensor, bits: int) -> Tensor:
    """The smallest error of symmetric integers at any positive scale (F2): exact.

    Codes change only where |x| / s crosses k + 1/2, so the sums of all code vectors follow from
    sorting these scales.
    """
    x, weight = x.double(), weight.double()
    steps = torch.arange(2 ** (bits - 1), dtype=torch.float64)
    last = torch.where(x >= 0, 2 ** (bits - 1) - 1, 2 ** (bits - 1)).unsqueeze(-1)
    there = steps < last
    scale = torch.where(there, x.abs().unsqueeze(-1) / (steps + 0.5), -1).flatten(1)
    a = torch.where(there, (weight * x.abs()).unsqueeze(-1), 0).flatten(1)
    b = torch.where(there, weight.unsqueeze(-1) * (2 * steps + 1), 0).flatten(1)
    order = scale.argsort(1, descending=True)
    gain = a.gather(1, order).cumsum(1).square() / b.gather(1, order).cumsum(1)
    return (weight * x * x).sum(1) - gain.nan_to_num(0).amax(1)


def best_of(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    args: QuantizationArgs,
    zero_points: tuple[int, ...] = (0,),
    global_scale: Tensor | None = None,
) -> Tensor:
    """The smallest error over scales (candidates, groups) and zero points."""
    found = [
        error(x, weight, s, torch.full_like(s, z), args, global_scale)
        for s in scales
        for z in zero_points
    ]
    return torch.stack(found).amin(0)
