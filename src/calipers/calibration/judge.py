"""`judge`: the scales that each of several observers gives, their errors, and which are taken."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from compressed_tensors.quantization import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from torch import Tensor, nn

from calipers.calibration.attention import STATES
from calipers.calibration.global_scales import borrowed_memory, shared_global_scale, weight_of
from calipers.calibration.held_out import Sample
from calipers.calibration.observed import ObservedModule, ObservedTensor
from calipers.calibration.report import ShadowReport
from calipers.calibration.shadows import Pick, observer_label
from calipers.calibration.targets import TENSORS, has_global_scale
from calipers.calibration.write import measure_output_error, measure_weight_error
from calipers.errors import CalipersError
from calipers.observers import Observer
from calipers.observers.input_moments import InputObserver

__all__ = ["Verdict", "activation_error", "in_batch", "judge"]

#: The key of the observer that decides without shadows; those have their labels.
_FIRST = ""
JudgedBy = Literal["held-out", "in-sample", "weight"]


@dataclass
class _Answer:
    """What one observer says of one tensor."""

    observer: Observer
    global_scale: Tensor | None = None
    scale: Tensor | None = None
    zero_point: Tensor | None = None
    error: float | None = None


@dataclass(frozen=True)
class Verdict:
    """What several observers said of one tensor, and whose scales are taken.

    Args:
        observer: The one that is taken.
        is_first: Whether that is the one which decides without shadows.
        global_scale: By it, shared with the layers that engines fuse; None where there is none.
        scale: By it; None of "local" activations.
        zero_point: As above.
        rows: For the report.
    """

    observer: Observer
    is_first: bool
    global_scale: Tensor | None
    scale: Tensor | None
    zero_point: Tensor | None
    rows: list[ShadowReport]


def judge(group: Sequence[ObservedModule], pick: Pick) -> dict[str, Verdict]:
    """Let all observers of the tensors of a fused group answer, and take one of each.

    Tensors that share a global scale are judged together, by the sum of their errors; others alone.
    Weights are judged by the error of the layer's output for inputs that were held out, where there
    are any, activations by their own error.

    Args:
        group: Layers that engines fuse; initialized, so that their parameters are there.
        pick: See `Shadows`.

    Returns:
        By full name of the tensor; none of tensors with one observer.
    """
    verdicts: dict[str, Verdict] = {}
    for base_name in TENSORS:
        members = [each for each in group if base_name in each.tensors]
        together = [each for each in members if has_global_scale(each.tensors[base_name].args)]
        alone = [each for each in members if each not in together]
        for these in (together, *([each] for each in alone)):
            if any(len(each.tensors[base_name].observers) > 1 for each in these):
                verdicts |= _judge_together(these, base_name, pick)
    return verdicts


def _judge_together(
    members: Sequence[ObservedModule], base_name: str, pick: Pick
) -> dict[str, Verdict]:
    tensors = [each.tensors[base_name] for each in members]
    samples = [_sample_of(each, base_name) for each in members]
    observers = [_candidates(each) for each in tensors]
    common = [key for key in observers[0] if all(key in each for each in observers)]
    answers: dict[str, list[_Answer]] = {}
    for key in common:
        asked = [_alone(tensor, own[key]) for tensor, own in zip(tensors, observers, strict=True)]
        shared = shared_global_scale(asked) if has_global_scale(asked[0].args) else None
        answers[key] = [
            _answer(each, shared, sample) for each, sample in zip(asked, samples, strict=True)
        ]
    best = common[0]
    if pick == "best":
        best = min(common, key=lambda key: _total(answers[key]))
    verdicts = {}
    for place, (tensor, sample) in enumerate(zip(tensors, samples, strict=True)):
        judged_by: JudgedBy = "weight"
        if sample is not None:
            judged_by = "held-out" if sample.held_out else "in-sample"
        taken = answers[best][place]
        verdicts[tensor.full_name] = Verdict(
            taken.observer,
            best == common[0],
            taken.global_scale,
            taken.scale,
            taken.zero_point,
            _rows(tensor, {key: answers[key][place] for key in common}, best, judged_by),
        )
    return verdicts


def _rows(
    tensor: ObservedTensor, answers: Mapping[str, _Answer], best: str, judged_by: JudgedBy
) -> list[ShadowReport]:
    """What is told of all observers, of those too that had no data; a fallback is the first."""
    labels = {observer_label(each): observer_label(each) for each in tensor.observers[1:]}
    return [
        ShadowReport(label, answers[key].error if key in answers else None, key == best, judged_by)
        for key, label in {_FIRST: observer_label(tensor.observer), **labels}.items()
    ]


def _total(answers: Sequence[_Answer]) -> float:
    """The sum of the errors of an observer; infinite where one is missing or NaN."""
    total = sum(math.inf if each.error is None else each.error for each in answers)
    return math.inf if math.isnan(total) else total


def _candidates(tensor: ObservedTensor) -> dict[str, Observer]:
    """The observer that decides, under `_FIRST`, and shadows that have data by their labels."""
    found = {_FIRST: tensor.deciding}
    for observer in tensor.observers[1:]:
        asked = observer if tensor.lent is None else _with_lent(tensor, observer)
        if asked is not None and _alone(tensor, asked).lacks is None:
            found[observer_label(observer)] = asked
    return found


def _with_lent(tensor: ObservedTensor, shadow: Observer) -> Observer | None:
    """A shadow of an expert that few tokens reached, which knows what was lent to the first.

    None where it cannot: what it knows by itself is too little to be compared, or taken.
    """
    if tensor.base_name == "weight" and not shadow.needs_data:
        return shadow
    first, lent = tensor.observer, tensor.lent
    if isinstance(first, InputObserver) and isinstance(shadow, InputObserver):
        assert isinstance(lent, InputObserver)
        if shadow.moments is first.moments:
            return copy.deepcopy(shadow, {id(shadow.moments): lent.moments})
    return None


def _alone(tensor: ObservedTensor, observer: Observer) -> ObservedTensor:
    """The tensor with one of its observers."""
    return ObservedTensor(tensor.name, tensor.module, tensor.base_name, tensor.args, [observer])


def _sample_of(each: ObservedModule, base_name: str) -> Sample | None:
    """The values that observers of a tensor are judged by; ids of an Embedding are none."""
    if each.samples is None or isinstance(each.module, nn.Embedding):
        return None
    return each.samples.of(TENSORS[base_name].side)


def _answer(tensor: ObservedTensor, shared: Tensor | None, sample: Sample | None) -> _Answer:
    observer = tensor.observer
    if tensor.base_name == "weight":
        weight = weight_of(tensor)
        with borrowed_memory(observer):
            scale, zero_point = observer.get_qparams(weight, global_scale=shared)
        scale = _given(observer, scale)
        judged = (weight, scale, zero_point, tensor.args, shared)
        if sample is None:
            error = measure_weight_error(*judged) ** 2
        else:
            error = measure_output_error(*judged, sample.tokens)
        return _Answer(observer, shared, scale, zero_point, error)
    scale = zero_point = None
    if not tensor.args.dynamic:
        scale, zero_point = observer.get_qparams(global_scale=shared)
        scale = _given(observer, scale)
    answer = _Answer(observer, shared, scale, zero_point)
    if sample is not None:
        answer.error = activation_error(tensor, scale, zero_point, shared, sample.tokens)
    return answer


def _given(observer: Observer, scale: Tensor | None) -> Tensor:
    if scale is None:
        raise CalipersError(f"{observer.name}: the observer gave no scale")
    return scale


def in_batch(tensor: ObservedTensor, tokens: Tensor) -> Tensor:
    """Tokens as the module sees them: of attention (1, heads, tokens, head_dim)."""
    return tokens.transpose(0, 1).unsqueeze(0) if tensor.base_name in STATES else tokens


def activation_error(
    tensor: ObservedTensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    global_scale: Tensor | None,
    tokens: Tensor,
) -> float:
    """Relative squared error of fake-quantized values, which has the sum of squares in float64.

    Args:
        tensor: The activation.
        scale: As it is, or will be, written; None takes local scales of the values (NVFP4).
        zero_point: Likewise, or None.
        global_scale: Likewise, or None.
        tokens: See `Sample`.
    """
    tokens = in_batch(tensor, tokens)
    device = tokens.device
    scale, zero_point, shared = (
        None if each is None else each.to(device) for each in (scale, zero_point, global_scale)
    )
    if scale is None:
        assert tensor.module is not None
        scale, zero_point = compute_dynamic_scales_and_zp(
            tokens, tensor.args, tensor.module, global_scale=shared
        )
    quantized = fake_quantize(tokens, scale, zero_point, tensor.args, shared)
    error = _sum_of_squares(tokens.double() - quantized.double())
    total = _sum_of_squares(tokens)
    if total == 0.0:
        return math.inf if error else 0.0
    return error / total


def _sum_of_squares(values: Tensor) -> float:
    return float(values.double().square().sum())
