"""Squared error over that of an exhaustive search, on synthetic weights."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, fake_quantize
from torch import Tensor

from benchmarks.peers import give_importance
from benchmarks.quality.formats import OURS, Choice, formats
from calipers.observers import Observer

__all__ = ["measure_excess"]

Json = dict[str, Any]
ROWS, GROUP = 16, 128
#: Those that can be fed E[x^2] or need nothing; the error of "hessian" is another one.
CHOICES = [
    c
    for c in OURS
    if not c.options.get("negative_scales") and c.options.get("objective") != "hessian"
]


def kinds() -> dict[str, QuantizationArgs]:
    """Formats whose optimum can be found by trying everything."""

    def integer(bits: int, symmetric: bool = True) -> QuantizationArgs:
        return QuantizationArgs(
            num_bits=bits, strategy="group", group_size=GROUP, symmetric=symmetric
        )

    listed = formats()
    return {
        "int2": integer(2),
        "int3": integer(3),
        "int4": integer(4),
        "int8": integer(8),
        "int2 asymmetric": integer(2, False),
        "int3 asymmetric": integer(3, False),
        "int4 asymmetric": integer(4, False),
        "fp8": QuantizationArgs(num_bits=8, type="float", strategy="group", group_size=GROUP),
        "NVFP4": listed["NVFP4"],
        "MXFP4": listed["MXFP4"],
    }


def samples(name: str, shape: tuple[int, int]) -> Tensor:
    """Values, float32, about as large as weights are."""
    generator = torch.Generator().manual_seed(7)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
    if name == "Laplace":
        values = -values.sign() * uniform.clamp(min=1e-12).log()
    elif name == "Student t4":
        squares = torch.randn((4, *shape), generator=generator, dtype=torch.float64).square()
        values = values / squares.mean(0).sqrt()
    elif name == "outliers":
        values = torch.where(uniform < 0.01, values * 8, values)
    return (values * 0.02).float()


def measure_excess(quick: bool = False, only: str = "") -> Json:
    """Excess in percent of the weighted squared error over the oracle's, summed over all groups.

    Args:
        quick: A few rows alone.
        only: Regular expression that the formats' names must match.
    """
    shape = (ROWS // 2 if quick else ROWS, 4 * GROUP)
    generator = torch.Generator().manual_seed(3)
    normal = torch.randn(shape[1], generator=generator)
    importance = {
        "unweighted": None,
        "log-sigma 1": normal.exp(),
        "log-sigma 2": (2 * normal).exp(),
    }
    results = []
    for data in ("Gaussian", "Laplace", "Student t4", "outliers"):
        weight = samples(data, shape)
        for weights, columns in importance.items():
            for kind, args in kinds().items():
                if not re.search(only, kind):
                    continue
                oracle = Oracle(args, weight, columns)
                for choice in CHOICES:
                    asked = choice.options.get("objective", choice.name)
                    weighted = asked in ("imatrix", "imatrix_mse", "nvfp4_expanded_imatrix")
                    plain = asked in ("mse", "memoryless_mse", "memoryless_minmax")
                    if not choice.fits(kind) or (plain if columns is not None else weighted):
                        continue
                    results.append(
                        {
                            "data": data,
                            "weights": weights,
                            "format": kind,
                            "observer": str(choice),
                            "excess": excess_of(choice, oracle),
                        }
                    )
    return {"results": results}


class Oracle:
    """The optimum of one format on one weight; searched once for each global scale."""

    def __init__(self, args: QuantizationArgs, weight: Tensor, columns: Tensor | None) -> None:
        self.args, self.weight, self.columns = args, weight, columns
        importance = torch.ones_like(weight) if columns is None else columns.expand_as(weight)
        tensors = (weight, importance)
        self.x, self.w = (t.unflatten(-1, (-1, args.group_size)).double() for t in tensors)
        self._found: dict[float | None, float] = {}

    def error(self, scale: Tensor, zero_point: Tensor, global_scale: Tensor | None) -> float:
        """Sum over all groups for given scales."""
        pair = scale.unsqueeze(-1), zero_point.unsqueeze(-1)
        return float(errors_of(self.x, self.w, *pair, self.args, global_scale).sum())

    def smallest_error(self, global_scale: Tensor | None) -> float:
        """The same for the best scales under this global scale."""
        key = None if global_scale is None else float(global_scale)
        if key not in self._found:
            search = search_for(self.args)
            self._found[key] = float(search(self.x, self.w, self.args, global_scale).sum())
        return self._found[key]


@torch.no_grad()
def excess_of(choice: Choice, oracle: Oracle) -> float:
    """Percent over the oracle, which searches under the same global scale."""
    args, weight, module = oracle.args, oracle.weight, torch.nn.Module()
    observer = Observer.load_from_registry(choice.name, "weight", args, module, **choice.options)
    if oracle.columns is not None:
        give_importance(observer, oracle.columns)
    global_scale = None
    if args.strategy == "tensor_group":
        global_scale = observer.get_global_scale(weight)
        module.weight_global_scale = global_scale
    error = oracle.error(*observer(weight), global_scale)
    return 100 * (error / oracle.smallest_error(global_scale) - 1)


def errors_of(
    x: Tensor,
    w: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    args: QuantizationArgs,
    global_scale: Tensor | None,
) -> Tensor:
    """Error of each group; `scale` and `zero_point` of shape (..., 1)."""
    token_args = args.model_copy(update={"strategy": "token"})
    rounded = fake_quantize(x.float(), scale.float(), zero_point, token_args, global_scale)
    return ((rounded.double() - x).square() * w).sum(-1)


Search = Callable[[Tensor, Tensor, QuantizationArgs, "Tensor | None"], Tensor]


def search_for(args: QuantizationArgs) -> Search:
    """The search that finds the optimum of a format."""
    if args.scale_dtype is not None:
        return try_all_codes
    if args.type == "float":
        return try_dense_scales
    if args.symmetric and args.num_bits < 8:
        return walk_breakpoints
    return try_dense_scales


def walk_breakpoints(x: Tensor, w: Tensor, args: QuantizationArgs, _: Tensor | None) -> Tensor:
    """Exact for symmetric integers: codes change only at s = |x| / (k + 1/2).

    Sorted from large to small, A = cumsum(w |x|) and B = cumsum(w (2k + 1)) are sum w x q and
    sum w q^2 behind each change, and the smallest error is sum w x^2 - max A^2 / B.
    """
    high = 2 ** (args.num_bits - 1) - 1
    k = torch.arange(high + 1, dtype=torch.float64)
    size = x.abs().unsqueeze(-1)
    breakpoints = size / (k + 0.5)
    # Positive values have one code fewer.
    taken = (k < high) | (x < 0).unsqueeze(-1)
    weight = w.unsqueeze(-1) * taken
    order = breakpoints.flatten(-2).argsort(-1, descending=True)
    a = (weight * size).expand_as(breakpoints).flatten(-2).gather(-1, order).cumsum(-1)
    b = (weight * (2 * k + 1)).flatten(-2).gather(-1, order).cumsum(-1)
    return (w * x.square()).sum(-1) - (a.square() / b.clamp(min=1e-300)).amax(-1)


def try_all_codes(
    x: Tensor, w: Tensor, args: QuantizationArgs, global_scale: Tensor | None
) -> Tensor:
    """Every scale that can be stored: 126 of E4M3 (NVFP4), powers of two (MX)."""
    if global_scale is None:
        codes = torch.exp2(torch.arange(-40.0, 20.0))
    else:
        codes = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    best = torch.full(x.shape[:-1], torch.inf, dtype=torch.float64)
    for code in codes:
        scale = code.expand(*x.shape[:-1], 1)
        zero_point = torch.zeros_like(scale)
        best = best.minimum(errors_of(x, w, scale, zero_point, args, global_scale))
    return best


def try_dense_scales(x: Tensor, w: Tensor, args: QuantizationArgs, _: Tensor | None) -> Tensor:
    """Scales all over and zero points around the likely one, then finer about the best."""
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    levels = 2**args.num_bits - 1
    if args.type == "float":
        whole, near = 2 * torch.maximum(-low, high) / (2 * 448), [0]
    elif args.symmetric:
        whole, near = 2 * torch.maximum(-low, high) / levels, [0]
    else:
        whole, near = (high - low) / levels, list(range(levels + 1))
    best = torch.full(x.shape[:-1], torch.inf, dtype=torch.float64).unsqueeze(-1)
    best_scale, best_zero = whole.clone(), torch.zeros_like(whole)
    least = -(2 ** (args.num_bits - 1))
    # Over an octave above the smallest scale that covers all values none is better.
    coarse = torch.linspace(0.15, 2, 600 if len(near) == 1 else 150)
    for shrink in coarse:
        for offset in near:
            zero = torch.full_like(whole, float(least + offset if len(near) > 1 else 0))
            best, best_scale, best_zero = _better(
                (best, best_scale, best_zero), whole * shrink, zero, x, w, args
            )
    centre = best_scale.clone()
    step = float(coarse[1] - coarse[0])
    for shrink in torch.linspace(1 - 2 * step, 1 + 2 * step, 200):
        best, best_scale, best_zero = _better(
            (best, best_scale, best_zero), centre * shrink, best_zero, x, w, args
        )
    return best.squeeze(-1)


def _better(
    past: tuple[Tensor, Tensor, Tensor],
    scale: Tensor,
    zero: Tensor,
    x: Tensor,
    w: Tensor,
    args: QuantizationArgs,
) -> tuple[Tensor, Tensor, Tensor]:
    error = errors_of(x, w, scale, zero, args, None).unsqueeze(-1)
    is_better = error < past[0]
    news = (error, scale, zero)
    return tuple(torch.where(is_better, new, old) for new, old in zip(news, past, strict=True))
