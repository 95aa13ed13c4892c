"""Statistics in place of data, where the weights of a model lie in a checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from loguru import logger
from torch import Tensor

from calipers.calibration.calls import CallCounter
from calipers.calibration.few_tokens import ExpertPolicy, settle_few_tokens
from calipers.calibration.missing import OnMissing, settle_missing
from calipers.calibration.observed import ObservedTensor
from calipers.calibration.plan import Plan, without_modules
from calipers.calibration.session import take_over_counts
from calipers.errors import MissingDataError
from calipers.statistics_files import Statistics, weight_digest
from calipers.statistics_files.fingerprint import saved_tensors
from calipers.streaming.source import Load, Place, Reader, SourceCheckpoint

__all__ = ["Known", "States", "digests_of", "refuse_unknown", "take_over"]

#: States of observers by "module.base_name", as `Observer.state` gives them.
States: TypeAlias = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class Known:
    """What is known in place of data.

    Attributes:
        statistics: What `calipers.observe` gathered, or states of observers that are taken as they
            are.
        on_missing: What to do about modules that saw no data, see `Calibration.freeze`.
        experts: What to do about experts that saw few tokens.
    """

    statistics: Statistics | States
    on_missing: OnMissing = "error"
    experts: ExpertPolicy = field(default_factory=ExpertPolicy)


def digests_of(source: SourceCheckpoint) -> dict[str, str]:
    """The `weight_digest` of all saved tensors of a checkpoint's model, in its order.

    Of a tensor that lies on the disk as it is only pages with the values that count are read; of
    one that transformers makes of others, what it is made of, one after the other.

    Args:
        source: The checkpoint; the experts of its model are taken apart.
    """
    found: dict[str, str] = {}
    places: dict[Load, list[tuple[str, Place]]] = {}
    for name, tensor in saved_tensors(source.model):
        place = source.place_of(tensor)
        found[name] = ""  # of one that the checkpoint lacks nothing is known
        if place is not None:
            places.setdefault(place.load, []).append((name, place))
    reader = Reader(source)
    for load in sorted(places, key=lambda each: source.order[each.keys[0][0]]):
        made = source.convert(load, reader.mapped(load))
        for name, place in places[load]:
            value = made[place.name]
            if place.view is not None:
                size, stride, offset = place.view
                value = value.as_strided(size, stride, int(value.storage_offset()) + offset)
            found[name] = weight_digest(value, load.dtype)
    return found


def take_over(source: SourceCheckpoint, plan: Plan, known: Known) -> tuple[Plan, str]:
    """Let the observers of a plan know what would come of data.

    Args:
        source: The checkpoint, the experts of whose model are taken apart.
        plan: What is quantized; its observers are changed.
        known: What is known.

    Returns:
        The plan without the modules that are left alone now, and a digest of all that was known.

    Raises:
        StatisticsError: Statistics that lack what an observer asks for.
        MissingDataError: Tensors without data.
    """
    tensors = {tensor.full_name: tensor for tensor in _tensors(plan)}
    if not isinstance(known.statistics, Statistics):
        _load(tensors, known.statistics)
        refuse_unknown(plan)
        return plan, _digest(known.statistics)
    observers = {name: tensor.observer for name, tensor in tensors.items()}
    states = known.statistics.states_for(observers)
    _load(tensors, states)
    manifest = known.statistics.manifest
    digest = _digest(states, manifest.model_dump_json(), known.on_missing, repr(known.experts))
    del states
    layers = [each.name for each in plan.observed if not each.is_attention]
    calls = CallCounter(source.model, layers)
    calls.remove()
    take_over_counts(manifest, plan.observed, calls)
    plan = without_modules(plan, calls.never_called, "never called")
    settle_few_tokens(
        plan.observed,
        known.experts.on_few_tokens,
        known.experts.enough_tokens,
        unseen=known.on_missing != "skip",
    )
    kept = settle_missing(plan.observed, known.on_missing, manifest.batches, source.model)
    names = {each.name for each in plan.observed} - {each.name for each in kept}
    for tensor in _tensors(plan):
        if tensor.fallback is not None:
            logger.warning("{} saw no data: the fallback was used", tensor.full_name)
    return without_modules(plan, names, "no data"), digest


def refuse_unknown(plan: Plan) -> None:
    """Refuse scales that follow from data where nothing is known of it.

    Raises:
        MissingDataError: Says why, and for which tensors.
    """
    lacking: dict[str, list[str]] = {}
    for tensor in _tensors(plan):
        if tensor.lacks is not None:
            lacking.setdefault(_reason(tensor), []).append(tensor.full_name)
    if not lacking:
        return
    told = [
        f"  {reason}: {len(names)} tensors, {names[0]}{', ...' * (len(names) > 1)}"
        for reason, names in lacking.items()
    ]
    raise MissingDataError(
        "\n".join(
            [
                "a checkpoint alone does not tell these scales, which follow from data:",
                *told,
                "Give statistics that were gathered with data (--statistics FILE, of `calipers "
                "observe`), or calibrate the model. What needs none: schemes without static "
                "activations (W4A16, FP8_DYNAMIC, NVFP4A16), the observer memoryless_minmax, "
                "optimal with objective=mse.",
            ]
        )
    )


def _reason(tensor: ObservedTensor) -> str:
    kind = type(tensor.observer).__name__
    if tensor.base_name == "weight":
        return f"{kind} weighs weights by their layer's inputs"
    return f"{tensor.base_name} activations are quantized statically ({kind} must see them)"


def _tensors(plan: Plan) -> Iterator[ObservedTensor]:
    return (tensor for each in plan.observed for tensor in each.tensors.values())


def _load(tensors: Mapping[str, ObservedTensor], states: States) -> None:
    for name, tensor in tensors.items():
        if name in states:
            tensor.observer.load_state(states[name])


def _digest(states: States, *others: str) -> str:
    digest = hashlib.sha256(repr(others).encode())
    for name, state in sorted(states.items()):
        for key, value in sorted(state.items()):
            digest.update(f"{name} {key} {value.dtype} {tuple(value.shape)}\n".encode())
            raw: Any = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            digest.update(raw)
    return digest.hexdigest()
