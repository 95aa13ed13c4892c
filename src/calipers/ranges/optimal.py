"""`search_optimal_scales`: scales that minimise the error of a layer's output."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor

from calipers.engines.dispatch import run
from calipers.engines.kernels import CANDIDATE_SUMS, CandidateSums, Problem
from calipers.formats import has_scale_codes
from calipers.grouping import Groups
from calipers.ranges.candidate_sums import chunks_of
from calipers.ranges.in_float32 import has_free_scales, search_in_float32, times
from calipers.ranges.least_squares import ScaleSpec, search_least_squares
from calipers.ranges.qparams import cast_range, checked_global_scale
from calipers.ranges.scale_codes import search_scale_codes

__all__ = ["search_optimal_scales"]

Pair = tuple[Tensor, Tensor]


def search_optimal_scales(
    views: Sequence[Groups],
    extremes: Sequence[Pair],
    args: QuantizationArgs,
    *,
    importance: Sequence[Groups] | None = None,
    global_scale: Tensor | None = None,
    negative_scales: bool = False,
    rough: bool = False,
    engine: str | None = None,
) -> list[Pair]:
    """Scale and zero point with the smallest sum of w (x - fake_quantize(x))^2 in each group.

    Args:
        views: The views of one value.
        extremes: For each view the minimum and maximum of its groups, of its `qparam_shape`, in
            the dtype of the values, in which scales will be stored.
        args: Quantization arguments; the strategy does not count.
        importance: For each view that of its values, w >= 0, broadcast to the same shape; None
            weighs all alike.
        global_scale: TENSOR_GROUP only, shape (1,).
        negative_scales: Whether scales may be negative (symmetric integers): the extra code of the
            lopsided range then serves the positive side.
        rough: Whether scales near the best ones will do, for less work, where scales may be any
            number and there are no zero points; they may be worse than those of minimum and
            maximum.
        engine: "eager", "native" or "triton"; None chooses, see `calipers.engines.dispatch`.

    Returns:
        For each view scale and zero point, float32, of its `qparam_shape`: as they will be stored,
        the global scale divided out. In no group is the error greater than with the scale that
        compressed-tensors makes of minimum and maximum, which also serves groups of zeros.
    """
    dtype = extremes[0][0].dtype
    if global_scale is not None:
        global_scale = checked_global_scale(global_scale, views[0].values.device)
    by_view = [None] * len(views) if importance is None else importance
    values = sum(view.values.numel() for view in views)
    weighted = [] if importance is None else importance
    dtypes = tuple(each.values.dtype for each in (*views, *weighted))
    problem = Problem(views[0].values.device, values, dtypes, args)

    def search_scaled(
        code: CandidateSums,
        views: Sequence[Groups],
        extremes: Sequence[Pair],
        factor: float,
    ) -> list[Pair]:
        scale = None if global_scale is None else times(global_scale, factor)
        spec = ScaleSpec(args, dtype, negative_scales, scale, factor)

        found = [
            _search_view(view, low, high, its_importance, spec, code, rough)
            for view, (low, high), its_importance in zip(views, extremes, by_view, strict=True)
        ]
        if factor == 1:
            return found
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return [(cast_range(scale.double() * factor, wide), zero) for scale, zero in found]

    free = has_free_scales(args, dtype, global_scale)

    def search_whole(code: CandidateSums) -> list[Pair]:
        return search_in_float32(views, extremes, functools.partial(search_scaled, code), free)

    return run(CANDIDATE_SUMS, CandidateSums(), search_whole, problem, engine)


def _search_view(
    view: Groups,
    low: Tensor,
    high: Tensor,
    importance: Groups | None,
    spec: ScaleSpec,
    code: CandidateSums,
    rough: bool,
) -> Pair:
    scale = torch.empty(view.qparam_shape, dtype=torch.float32, device=view.values.device)
    zero_point = torch.zeros_like(scale)
    search = search_scale_codes
    if not has_scale_codes(spec.args):
        rough = rough and bool(spec.args.symmetric)
        search = functools.partial(search_least_squares, rough=rough)
    for chunk in chunks_of(view, importance, spec.args, code):
        ends = low[chunk.where].reshape(-1), high[chunk.where].reshape(-1)
        found = search(chunk, *ends, spec)
        scale[chunk.where] = found.scale.view(chunk.shape)
        if found.zero_point is not None:
            zero_point[chunk.where] = found.zero_point.view(chunk.shape)
    return scale, zero_point
