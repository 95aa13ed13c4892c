"""`plan_stream`: what quantizing a checkpoint will do, settled before any weight is read."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationStatus
from torch import nn

from calipers.calibration.attention import AttentionHooks
from calipers.calibration.calls import find_never_called
from calipers.calibration.checks import OnUnfit
from calipers.calibration.config import KVCacheLike, SchemeLike
from calipers.calibration.experts import separate_experts
from calipers.calibration.freeze import Freezing
from calipers.calibration.fused import find_fused_groups
from calipers.calibration.parts import Only
from calipers.calibration.plan import ObserverChoice, Plan, plan_observers, without_modules
from calipers.calibration.targets import kind_of
from calipers.checkpoint.load_check import refuse_unloadable
from calipers.checkpoint.names import are_renamed
from calipers.checkpoint.tensors import loading_dtype, saved_parts
from calipers.checkpoint.twin import make_twin, plain_defaults
from calipers.distributed import Ranks
from calipers.distributed.collectives import first_alone
from calipers.errors import CalipersError
from calipers.statistics_files import Statistics
from calipers.streaming.source import SourceCheckpoint
from calipers.streaming.statistics import Known, digests_of, refuse_unknown, take_over
from calipers.streaming.units import Unit, find_units

__all__ = ["Shard", "StreamPlan", "plan_stream"]

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
        known: Digest of what the observers know in place of data; None where they know nothing.
    """

    source: SourceCheckpoint
    plan: Plan
    freezing: Freezing
    attention: AttentionHooks
    shards: list[Shard]
    dtype: torch.dtype | None
    known: str | None

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
            "statistics": self.known,
            "dtype": str(self.source.model.dtype),
            "shards": [[each.name, _digest(_names(each))] for each in self.shards],
            "versions": {name: version(name) for name in _PACKAGES},
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
    known: Known | None = None,
    runs_data: bool = False,
    load_check: bool = True,
    shard_bytes: int,
    ranks: Ranks | None = None,
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
        known: What is known in place of data.
        runs_data: Whether data will be run through the model, so that nothing need be known of it.
        load_check: Try first on a small twin of the model whether the result would load back.
        shard_bytes: Most bytes of a shard, where it holds more than one unit.
        ranks: Processes that all make this plan; None takes all of torch.distributed.

    Raises:
        MissingDataError: Observers need statistics that are not there.
        StatisticsError: Statistics of another model, or that lack what an observer asks for.
        ValueError: As `plan_observers` and `refuse_unloadable`.
    """
    model = source.model
    restore = separate_experts(model)
    plan = plan_observers(model, scheme, choice, ignore, on_unfit, scheme_options, kv_cache, only)
    statistics = None if known is None else known.statistics
    if isinstance(statistics, Statistics):
        statistics.refuse_other_model(model, digests_of(source))
    else:  # files of statistics tell themselves
        plan = without_modules(plan, _never_called(model, plan), "never called")
    if load_check:
        schemes = {each.name: each.scheme for each in plan.resolution.targets}
        check = partial(refuse_unloadable, model, schemes, skip=on_unfit == "skip")
        unloadable = first_alone(ranks or Ranks(), check, "trying to load back")
        plan = without_modules(plan, unloadable, "cannot be loaded back")
    digest = None
    if known is not None:
        plan, digest = take_over(source, plan, known)
    elif not runs_data:
        refuse_unknown(plan)
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
        source, plan, freezing, attention, _shards(units, shard_bytes), stored, digest
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
