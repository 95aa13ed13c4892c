"""Measures of the tensors of a module that has its scales: what goes into a report of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from calipers.calibration.judge import Verdict, activation_error, in_batch
from calipers.calibration.observed import ObservedModule, ObservedTensor
from calipers.calibration.report import ActivationMeasures, WeightMeasures
from calipers.calibration.targets import TENSORS
from calipers.calibration.write import squared_errors
from calipers.grouping import Grouping
from calipers.observers.input_moments import InputMoments, InputObserver
from calipers.ranges.input_gram import ColumnGroups
from calipers.ranges.measures import (
    GroupSample,
    Plot,
    measure_sample,
    plot_sample,
    sample_groups,
    scales_at_ends,
    sqnr_db,
)
from calipers.ranges.output_error import InputGram

__all__ = ["measure_activations", "measure_weight"]


@torch.no_grad()
def measure_weight(
    tensor: ObservedTensor, weight: Tensor, verdict: Verdict | None
) -> tuple[float, WeightMeasures, Plot | None]:
    """The relative error of a weight, its measures, and what a picture of it needs.

    The weight is gone through once, a few rows at a time; shares and the picture are those of a
    sample.

    Args:
        tensor: The weight, whose scales are written.
        weight: Its values.
        verdict: Of several observers; None where one decides alone.
    """
    scale, zero_point, global_scale = _qparams(tensor)
    assert scale is not None
    gram = _gram(tensor, weight.shape[-1])
    squared, of_output = squared_errors(
        weight, scale, _registered(tensor, "zero_point"), tensor.args, global_scale, gram
    )
    error = math.sqrt(squared)
    sample = _sample(weight, tensor, scale, zero_point, global_scale)
    found = None if sample is None else measure_sample(sample, tensor.args)
    ends = scales_at_ends(scale, tensor.args)
    output_error = None if of_output is None else _finite(math.sqrt(of_output))
    measures = WeightMeasures(
        error=_finite(error),
        output_error=output_error,
        output_error_from=None if gram is None or output_error is None else gram.kind,
        held_out_error=_held_out(verdict),
        sqnr_db=sqnr_db(squared),
        clipped=None if found is None else found.clipped,
        zeros=None if found is None else found.zeros,
        entropy=None if found is None else found.entropy,
        bits=tensor.args.num_bits,
        scales_saturated=None if ends is None else ends[0],
        scales_underflowed=None if ends is None else ends[1],
    )
    return error, measures, None if sample is None else plot_sample(sample, tensor.args)


@torch.no_grad()
def measure_activations(
    each: ObservedModule,
) -> tuple[dict[str, ActivationMeasures], dict[str, Plot]]:
    """Measures and pictures of activations whose scales are written, by base name."""
    measures: dict[str, ActivationMeasures] = {}
    plots: dict[str, Plot] = {}
    for base_name, tensor in each.tensors.items():
        if base_name == "weight":
            continue
        scale, zero_point, global_scale = _qparams(tensor)
        moved = each.moved(base_name, global_scale if tensor.args.dynamic else scale)
        kept = None if each.samples is None else each.samples.of(TENSORS[base_name].side)
        if kept is None:
            measures[base_name] = ActivationMeasures(moved=moved)
            continue
        zero = _registered(tensor, "zero_point")
        error = activation_error(tensor, scale, zero, global_scale, kept.tokens)
        clipped = None
        if scale is not None:
            values = in_batch(tensor, kept.tokens)
            sample = _sample(values, tensor, scale, zero_point, global_scale)
            if sample is not None:
                clipped = measure_sample(sample, tensor.args).clipped
                plots[base_name] = plot_sample(sample, tensor.args)
        judged_by: Literal["held-out", "in-sample"] = "held-out" if kept.held_out else "in-sample"
        measures[base_name] = ActivationMeasures(sqnr_db(error), judged_by, clipped, moved)
    return measures, plots


def _qparams(tensor: ObservedTensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Scale, zero point of asymmetric codes, and global scale, as they are written."""
    zero_point = None if tensor.args.symmetric else _registered(tensor, "zero_point")
    return _registered(tensor, "scale"), zero_point, _registered(tensor, "global_scale")


def _registered(tensor: ObservedTensor, what: str) -> Tensor | None:
    found: Tensor | None = getattr(tensor.module, f"{tensor.base_name}_{what}", None)
    return found


def _sample(
    values: Tensor,
    tensor: ObservedTensor,
    scale: Tensor,
    zero_point: Tensor | None,
    global_scale: Tensor | None,
) -> GroupSample | None:
    """A sample of values; None where the scale is arranged in a way of its own."""
    g_idx = getattr(tensor.module, f"{tensor.base_name}_g_idx", None)
    grouping = Grouping.of(values.shape, tensor.base_name, tensor.args, g_idx)
    if scale.shape != grouping.qparam_shape:
        return None
    qparams = (
        None if each is None else each.to(values.device)
        for each in (scale, zero_point, global_scale)
    )
    step, zero, shared = qparams
    assert step is not None
    return sample_groups(grouping.split(values), step, zero, shared)


def _gram(tensor: ObservedTensor, cols: int) -> InputGram | None:
    """The most that observers of a weight know of X'X; None where none looked at inputs."""
    best = None
    wanted = _wanted_products(tensor)
    for observer in (tensor.deciding, *tensor.observers):
        if not isinstance(observer, InputObserver):
            continue
        gram = observer.input_gram(wanted.get(id(observer.moments)))
        if gram is None or gram.diagonal.shape != (cols,):
            continue
        if best is None or (best.kind == "diagonal" and gram.kind != "diagonal"):
            best = gram
    return best


def _wanted_products(tensor: ObservedTensor) -> dict[int, Callable[[int], ColumnGroups]]:
    """Which products were summed into moments that several observers hold."""
    found = {}
    for observer in tensor.observers:
        if isinstance(observer, InputObserver) and observer.wanted_products is not None:
            moments: InputMoments = observer.moments
            found[id(moments)] = observer.wanted_products
    return found


def _held_out(verdict: Verdict | None) -> float | None:
    """The error of the chosen observer on tokens that none saw; None without such tokens."""
    for row in () if verdict is None else verdict.rows:
        if row.chosen and row.judged_by == "held-out" and row.error is not None:
            return _finite(math.sqrt(row.error))
    return None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
