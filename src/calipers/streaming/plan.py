"""`plan_stream`: what quantizing a checkpoint will do, settled before any weight is read."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationStatus
from torch import Tensor, nn

from calipers.calibration.attention import AttentionHooks
from calipers.calibration.calls import find_never_called
from calipers.calibration.checks import OnUnfit
from calipers.calibration.config import KVCacheLike, SchemeLike
from calipers.calibration.experts import separate_experts
from calipers.calibration.freeze import Freezing
from calipers.calibration.fused import find_fused_groups
from calipers.calibration.observed import ObservedTensor
from calipers.calibration.parts import Only
from calipers.calibration.plan import ObserverChoice, Plan, plan_observers, without_modules
from calipers.calibration.targets import kind_of
from calipers.checkpoint.load_check import refuse_unloadable
from calipers.checkpoint.names import are_renamed
from calipers.checkpoint.tensors import loading_dtype, saved_parts
from calipers.checkpoint.twin import make_twin, plain_defaults
from calipers.errors import CalipersError, MissingDataError
from calipers.streaming.source import SourceCheckpoint
from calipers.streaming.units import Unit, find_units

__all__ = ["Shard", "Statistics", "StreamPlan", "plan_stream"]

#: States of observers by "module.base_name", as `Observer.state` gives them.
Statistics = Mapping[str, Mapping[str, Tensor]]

#: Those whose version may change a byte of the files.
_PACKAGES = ("calipers", "compressed-tensors", "safetensors", "torch", "transformers")


@dataclass(frozen=True)
class Shard:
    """One file of weights that will be written.

    Attributes:
        name: Name of the file.
        units: What it holds.
    """

    name: str
    units: list[Unit]

    @property
    def bytes_read(self) -> int:
        """Bytes of what is read for it."""
        return sum(each.bytes_read for each in self.units)

    @property
    def bytes_written(self) -> int:
        """Bytes of its tensors."""
        return sum(each.bytes_written for each in self.units)


@dataclass(frozen=True)
class StreamPlan:
    """What quantizing a checkpoint will do.

    Attributes:
        source: The checkpoint, with its model on the meta device.
        plan: The modules to quantize and their observers.
        freezing: Quantizes groups of them.
        attention: What shows the states of attention.
        shards: What is written.
        dtype: See `calipers.checkpoint.tensors.loading_dtype`.
        statistics: States of observers; None where there are none.
    """

    source: SourceCheckpoint
    plan: Plan
    freezing: Freezing
    attention: AttentionHooks
    shards: list[Shard]
    dtype: torch.dtype | None
    statistics: Statistics | None

    @property
    def bytes_read(self) -> int:
        """Bytes of all that is read."""
        return sum(each.bytes_read for each in self.shards)

    @property
    def bytes_written(self) -> int:
        """Bytes of all tensors that are written."""
        return sum(each.bytes_written for each in self.shards)

    def fingerprint(self) -> dict[str, Any]:
        """Everything that the files of the shards depend on, as JSON holds it."""
        choice = self.plan.choice
        return {
            "source": self.source.fingerprint(),
            "config": self.plan.config.model_dump_json(),
            "modules": _digest(each.name for each in self.plan.observed),
            "observers": [choice.weight, choice.activation, repr(sorted(choice.options.items()))],
            "code": _code_of(self.plan),
            "statistics": None if self.statistics is None else _digest_of(self.statistics),
            "dtype": str(self.source.model.dtype),
            "shards": [[each.name, _digest(_names(each))] for each in self.shards],
            "versions": {
                name: version(name)
                for name in (
                    "calipers",
                    "compressed-tensors",
                    "safetensors",
                    "torch",
                    "transformers",
                )
            },
        }


def plan_stream(
    source: SourceCheckpoint,
    scheme: SchemeLike | None,
    choice: ObserverChoice,
    ignore: str | Iterable[str] = (),
    on_unfit: OnUnfit = "error",
    scheme_options: Mapping[str, Any] | None = None,
    kv_cache: KVCacheLike = None,
    only: Only | None = None,
    *,
    statistics: Statistics | None = None,
    runs_data: bool = False,
    load_check: bool = True,
    shard_bytes: int,
) -> StreamPlan:
    """Settle what of a checkpoint will be read, quantized and written.

    Args:
        source: The checkpoint, whose model nothing was done to; its model is changed.
        scheme: As in `plan_observers`, and so are the next six.
        choice: How observers are chosen.
        ignore: Modules to leave alone.
        on_unfit: What to do about modules of other shapes.
        scheme_options: Other arguments of the scheme's weights.
        kv_cache: What keys and values are quantized to.
        only: A part of the model.
        statistics: States of observers that learn from data.
        runs_data: Whether data will be run through the model, so that no statistics are needed.
        load_check: Try first on a small twin of the model whether the result would load back.
        shard_bytes: Most bytes of a shard, where it holds more than one unit.

    Raises:
        MissingDataError: Observers need statistics that are not there.
        ValueError: As `plan_observers` and `refuse_unloadable`.
    """
    model = source.model
    restore = separate_experts(model)
    plan = plan_observers(model, scheme, choice, ignore, on_unfit, scheme_options, kv_cache, only)
    if load_check:
        schemes = {each.name: each.scheme for each in plan.resolution.targets}
        unloadable = refuse_unloadable(model, schemes, skip=on_unfit == "skip")
        plan = without_modules(plan, unloadable, "cannot be loaded back")
    plan = without_modules(plan, _never_called(model, plan), "never called")
    if not runs_data:
        _refuse_without_statistics(plan, statistics or {})
    _refuse_missing(source, plan)
    freezing = Freezing(plan.observed, plan.choice)
    attention = AttentionHooks(model)
    attention.install(plan.states)
    by_name = {each.name: each for each in plan.observed}
    for names in find_fused_groups(by_name):
        freezing.initialize([by_name[name] for name in names])
    for each in plan.observed:
        each.module.quantization_status = QuantizationStatus.FROZEN
    restore()
    if plan.observed:
        separate_experts(model, if_loaded_so=True)  # as `save` does for the time of a save
    stored = loading_dtype(model)
    parts = saved_parts(model)
    units = find_units(source, parts, plan.observed, stored if are_renamed(model) else None)
    return StreamPlan(
        source, plan, freezing, attention, _shards(units, shard_bytes), stored, statistics
    )


def _never_called(model: nn.Module, plan: Plan) -> set[str]:
    """Modules that a forward passes by, found on a small twin: the model itself has no weights."""
    kinds = {kind_of(each.name) for each in plan.observed}
    with plain_defaults():
        try:
            twin = make_twin(model)
        except Exception:  # whatever a class raises that cannot be built so small
            return set()
        separate_experts(twin)
        names = [name for name, _ in twin.named_modules() if kind_of(name) in kinds]
        never = {kind_of(name) for name in find_never_called(twin, names)}
    return {each.name for each in plan.observed if kind_of(each.name) in never}


def _refuse_without_statistics(plan: Plan, statistics: Statistics) -> None:
    tensors = [tensor for each in plan.observed for tensor in each.tensors.values()]
    lacking: dict[str, list[str]] = {}
    for tensor in tensors:
        if tensor.base_name == "weight" and not tensor.observer.needs_data:
            continue
        reason = _lack(tensor, statistics.get(tensor.full_name))
        if reason is not None:
            lacking.setdefault(reason, []).append(tensor.full_name)
    if lacking:
        told = [
            f"  {reason}: {len(names)} tensors, {names[0]}{', ...' * (len(names) > 1)}"
            for reason, names in lacking.items()
        ]
        raise MissingDataError(
            "\n".join(
                [
                    "a checkpoint alone does not tell these scales, which follow from data:",
                    *told,
                    "Give statistics= that were gathered with data, or calibrate the model. What "
                    "needs none: schemes without static activations (W4A16, FP8_DYNAMIC, "
                    "NVFP4A16), the observer memoryless_minmax, optimal with objective=mse.",
                ]
            )
        )


def _lack(tensor: ObservedTensor, state: Mapping[str, Tensor] | None) -> str | None:
    """Why a tensor cannot be quantized with these statistics, None where it can."""
    kind = type(tensor.observer).__name__
    if state is None:
        if tensor.base_name == "weight":
            return f"{kind} weighs weights by their layer's inputs"
        return f"{tensor.base_name} activations are quantized statically ({kind} must see them)"
    tensor.observer.load_state(state)
    lacks = tensor.lacks
    tensor.observer.reset()
    return None if lacks is None else f"by the statistics {lacks}"


def _refuse_missing(source: SourceCheckpoint, plan: Plan) -> None:
    names = [name for name in source.missing if name.rpartition(".")[0] in _names_of(plan)]
    if names:
        raise CalipersError(
            f"{source.path}: lacks {min(names)}, which the scheme quantizes: put its module on the "
            "ignore list (--ignore)"
        )


def _names_of(plan: Plan) -> set[str]:
    return {each.name for each in plan.observed}


def _shards(units: Sequence[Unit], most: int) -> list[Shard]:
    """Units in their order, in files of about equal limits."""
    groups: list[list[Unit]] = []
    held = 0
    for unit in units:
        if not groups or held + unit.bytes_written > most:
            groups.append([])
            held = 0
        groups[-1].append(unit)
        held += unit.bytes_written
    count = len(groups)
    if count == 1:
        return [Shard("model.safetensors", groups[0])]
    return [
        Shard(f"model-{number:05}-of-{count:05}.safetensors", group)
        for number, group in enumerate(groups, start=1)
    ]


def _names(shard: Shard) -> Iterable[str]:
    return (name for unit in shard.units for name in unit.outputs)


def _digest(names: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for name in names:
        digest.update(f"{name}\n".encode())
    return digest.hexdigest()


def _digest_of(statistics: Statistics) -> str:
    digest = hashlib.sha256()
    for name, state in sorted(statistics.items()):
        for key, value in sorted(state.items()):
            digest.update(f"{name} {key} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _code_of(plan: Plan) -> dict[str, str]:
    """Digests of the files of observers that are a user's own: they have no version."""
    kinds = {
        type(tensor.observer)
        for each in plan.observed
        for tensor in each.tensors.values()
        if not type(tensor.observer).__module__.startswith("calipers.")
    }
    found = {}
    for kind in kinds:
        file = inspect.getsourcefile(kind)
        if file is not None and Path(file).is_file():
            found[kind.__qualname__] = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    return found
