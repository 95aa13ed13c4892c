"""Scales for GPTQ: chosen on the weights as its feedback will have changed them.

GPTQ rounds one column after the other and has the later ones make up for its error (Frantar et al.
2022, arXiv:2210.17323). With U'U the inverse of the damped X'X, U upper triangular, the error of
the output is the sum over columns of ((t - q) / u)^2: t is a column as the feedback has left it, q
the column rounded, and u its entry on the diagonal of U. So the best scales for these t are those
of least squares with weights 1 / u^2. With other scales there is another feedback: both are found
in turn, and each row keeps the scales under which its own error was least.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy
from torch import Tensor

from calipers.formats import Format
from calipers.grouping import Grouping
from calipers.ranges.min_max import min_max
from calipers.ranges.optimal import search_optimal_scales

__all__ = ["refine_for_gptq"]

#: Strategies whose groups lie within a row.
_OF_ROWS = (
    QuantizationStrategy.CHANNEL,
    QuantizationStrategy.GROUP,
    QuantizationStrategy.TENSOR_GROUP,
)
#: How often scales are chosen anew, at most.
STEPS = 4


@dataclass(frozen=True)
class _Rounded:
    """What a pass of GPTQ gives: rows with their columns in the order of the weight.

    Attributes:
        targets: Columns as the feedback had left them when they were rounded, shape (rows, cols).
        errors: Of each row, shape (rows,), float64.
    """

    targets: Tensor
    errors: Tensor


def refine_for_gptq(
    weight: Tensor,
    hessian: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    args: QuantizationArgs,
    *,
    global_scale: Tensor | None = None,
    by_importance: bool = True,
    damping: float = 0.01,
    block: int = 128,
    steps: int = STEPS,
    negative_scales: bool = False,
) -> tuple[Tensor, Tensor]:
    """Scales and zero points with a smaller error of the output under GPTQ than those given.

    Args:
        weight: Shape (rows, cols).
        hessian: X'X of the inputs, divided by any number, shape (cols, cols).
        scale: Of the weight's qparam shape, as stored.
        zero_point: Likewise; None for zero.
        args: Quantization arguments of the weight.
        global_scale: TENSOR_GROUP only, shape (1,): scales are stored multiplied by it.
        by_importance: Columns are rounded in descending order of the diagonal of X'X.
        damping: Share of the mean of that diagonal that is added to it.
        block: Columns whose feedback is applied at once.
        steps: How often scales are chosen anew.
        negative_scales: Whether scales may be negative (symmetric integers).

    Returns:
        Scale in its dtype, and zero point in float32; in no row is the error greater than with
        those given. Those given where X'X has no factor.

    Raises:
        ValueError: A strategy whose groups span several rows.
    """
    if args.strategy not in _OF_ROWS:
        raise ValueError(
            f"args: expected the strategy channel, group or tensor_group, got {args.strategy}"
        )
    weight, hessian = weight.float(), hessian.float()
    unused = hessian.diag() == 0
    weight = weight.masked_fill(unused, 0)
    cols = weight.shape[1]
    grouping = Grouping.of(weight.shape, "weight", args)
    codes = Format.of(args)
    best = scale.float() if global_scale is None else scale.float() / global_scale.float()
    zero = torch.zeros_like(best) if zero_point is None else zero_point.float()
    order = torch.arange(len(hessian), dtype=torch.int64, device=weight.device)
    if by_importance:
        order = hessian.diag().argsort(descending=True)
    factor = _factor(hessian, order, damping)
    if factor is None:
        return scale, zero
    importance = torch.empty_like(order, dtype=torch.float32)
    importance[order] = factor.diag().square().reciprocal()
    importance = importance / importance.mean()
    before = _round(weight, factor, order, _by_value(args, cols, best, zero), codes, block)
    for _ in range(steps):
        views = grouping.split(before.targets)
        found = grouping.join(
            search_optimal_scales(
                views,
                [min_max(view) for view in views],
                args,
                importance=list(grouping.split(importance.expand(weight.shape))),
                global_scale=global_scale,
                negative_scales=negative_scales,
            )
        )
        new, new_zero = _as_stored(found[0], scale.dtype, global_scale), found[1]
        after = _round(weight, factor, order, _by_value(args, cols, new, new_zero), codes, block)
        better = after.errors < before.errors
        if not bool(better.any()):
            break
        best, zero = _of_rows(better, new, best), _of_rows(better, new_zero, zero)
        before = _Rounded(
            torch.where(better.unsqueeze(1), after.targets, before.targets),
            torch.where(better, after.errors, before.errors),
        )
    if global_scale is not None:
        best = best * global_scale.float()
    return best.to(scale.dtype), zero


def _factor(hessian: Tensor, order: Tensor, damping: float) -> Tensor | None:
    """U, upper triangular with U'U the inverse of the damped X'X, its columns in some order."""
    ordered = hessian[order][:, order]
    diagonal = ordered.diagonal()
    mean = diagonal.mean()
    diagonal[diagonal == 0] = 1
    diagonal += damping * mean
    lower, failed = torch.linalg.cholesky_ex(ordered)
    if bool(failed):
        return None
    upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    return None if bool(failed) or not bool(upper.isfinite().all()) else upper


def _round(
    weight: Tensor,
    factor: Tensor,
    order: Tensor,
    qparams: tuple[Tensor, Tensor],
    codes: Format,
    block: int,
) -> _Rounded:
    """One pass of GPTQ. Columns lie one after the other in memory meanwhile."""
    rest = weight.T[order].contiguous()
    scale, zero = (each.T[order].contiguous() for each in qparams)
    targets = torch.empty_like(rest)
    errors = torch.zeros(weight.shape[0], dtype=torch.float64, device=weight.device)
    for first in range(0, len(rest), block):
        last = min(first + block, len(rest))
        own, inside = rest[first:last], factor[first:last, first:last]
        lost = torch.empty_like(own)
        for at in range(last - first):
            column, step = own[at], scale[first + at]
            rounded = codes.round(column / step, zero[first + at]) * step
            torch.div(column - rounded, inside[at, at], out=lost[at])
            own[at + 1 :].addr_(inside[at, at + 1 :], lost[at], alpha=-1)
        targets[first:last] = own
        errors += lost.square().sum(0, dtype=torch.float64)
        rest[last:].addmm_(factor[first:last, last:].T, lost, alpha=-1)
    found = torch.empty_like(targets)
    found[order] = targets
    return _Rounded(found.T.contiguous(), errors)


def _by_value(
    args: QuantizationArgs, cols: int, scale: Tensor, zero: Tensor
) -> tuple[Tensor, Tensor]:
    """What groups of a row have, for each of its values."""
    size = cols if args.strategy == QuantizationStrategy.CHANNEL else args.group_size
    assert size is not None
    scale, zero = (each.repeat_interleave(size, 1)[:, :cols] for each in (scale, zero))
    return scale, zero


def _as_stored(scale: Tensor, dtype: torch.dtype, global_scale: Tensor | None) -> Tensor:
    if global_scale is None:
        return scale.to(dtype).float()
    return (scale * global_scale.float()).to(dtype).float() / global_scale.float()


def _of_rows(better: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(better.view(-1, *[1] * (new.dim() - 1)), new, old)
