"""`quantize_checkpoint`: a checkpoint quantized shard by shard, without a model in memory."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationStatus
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from calipers._process import give_back_memory
from calipers._words import check_choice
from calipers.calibration.batches import Progress
from calipers.calibration.checks import OnUnfit
from calipers.calibration.config import KVCacheLike, SchemeLike
from calipers.calibration.few_tokens import ENOUGH_TOKENS, ExpertPolicy, OnFewTokens
from calipers.calibration.fused import find_fused_groups
from calipers.calibration.missing import OnMissing
from calipers.calibration.observed import ObservedModule
from calipers.calibration.parts import Only
from calipers.calibration.plan import ObserverChoice
from calipers.calibration.write import forget_quantization
from calipers.checkpoint.journal import Staging, join_staging, resumable
from calipers.checkpoint.names import are_renamed
from calipers.checkpoint.save import CannotWriteError, refuse_taken, refuse_unusable_scales
from calipers.checkpoint.source import carry_files, refuse_source
from calipers.checkpoint.write import write_files
from calipers.distributed import Ranks, joined_ranks, split_by_size
from calipers.distributed.meeting import TIMEOUT
from calipers.statistics_files import Statistics, read_statistics
from calipers.streaming.assemble import INDEX
from calipers.streaming.pipeline import read_ahead, writing_behind
from calipers.streaming.plan import Shard, StreamPlan, plan_stream
from calipers.streaming.source import Load, Reader, SourceCheckpoint
from calipers.streaming.statistics import Known, States
from calipers.streaming.units import Unit, stored_tensors

__all__ = [
    "SHARD_BYTES",
    "StreamReport",
    "quantize_checkpoint",
    "run_stream",
    "weights_in_place",
    "write_configs",
]

#: Most bytes of a file of weights.
SHARD_BYTES = 2 * 10**9
#: Bytes of the checkpoint that are read ahead.
_AHEAD = 2**26
_MEGABYTE = 10**6

#: What was read for a unit.
Tensors = dict[Load, dict[str, Tensor]]


@dataclass(frozen=True)
class StreamReport:
    """What was done to a checkpoint.

    Attributes:
        out: The folder that was written.
        modules: How many modules were quantized.
        shards: Files of weights.
        resumed: How many of them a command that was killed had written already.
        bytes_before: Bytes of the tensors in the checkpoint that are used.
        bytes_after: Bytes of the tensors in the result.
        seconds: How long it took, opening the checkpoint included.
    """

    out: Path
    modules: int
    shards: int
    resumed: int
    bytes_before: int
    bytes_after: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {**asdict(self), "out": str(self.out)}


def quantize_checkpoint(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    scheme: SchemeLike | None,
    observer: str | None = None,
    *,
    observer_options: Mapping[str, Any] | None = None,
    activation_observer: str | None = None,
    ignore: str | Iterable[str] = (),
    on_unfit: OnUnfit = "error",
    scheme_options: Mapping[str, Any] | None = None,
    kv_cache: KVCacheLike = None,
    only: Only | None = None,
    statistics: str | Path | Statistics | States | None = None,
    on_missing: OnMissing = "error",
    on_few_tokens: OnFewTokens = "shrink",
    enough_tokens: int = ENOUGH_TOKENS,
    force: bool = False,
    load_check: bool = True,
    dtype: str = "auto",
    device: str | torch.device = "cpu",
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
    rank_timeout: float = TIMEOUT,
) -> StreamReport:
    """Quantize a checkpoint of safetensors into another one, a few tensors at a time.

    The tensors are those that `calibrate` and `save` would write, byte for byte; how they are
    distributed over files may differ. The model is never in memory: beside what PyTorch and the
    model's structure take, memory holds two files of the result (one that is filled and one that is
    written), 128 MiB that were read ahead, and 16 times the largest unit: a module, or the modules
    that share a global scale or that transformers reads as one. Statistics are in memory twice as
    well, and histograms with 512 KiB for each scale.

    Under torchrun the files are shared over the ranks; all of them call this, with the same
    arguments, and return once the folder is complete.

    Where the process is killed, or an exception goes out, the shards that are complete stay beside
    `out`, and the same call goes on after them.

    Args:
        path: A local transformers folder with safetensors.
        out: Folder to write; see `calipers.save`.
        scheme: As in `calibrate`; it must need no data but `statistics`.
        observer: Observer of weights; None takes the one that the scheme names, else
            "memoryless_minmax", or "optimal" where there are statistics.
        observer_options: As in `calibrate`, and so are the next six.
        activation_observer: Observer of static activations.
        ignore: Modules left alone.
        on_unfit: What to do about modules whose columns a group size does not divide.
        scheme_options: Arguments of the scheme's weights that are to be others.
        kv_cache: What keys and values are quantized to.
        only: "language" quantizes the language part alone.
        statistics: What `calipers.observe` gathered, or the file of it: the tensors are those that
            `calibrate` gives with it. Of another model it is refused, by a few values of each
            tensor. Or states of observers that are taken as they are, as `Observer.state` gives
            them, by the name of the tensor ("model.layers.0.mlp.down_proj.weight",
            "model.layers.0.mlp.down_proj.input").
        on_missing: What to do about modules that saw no data; see `Calibration.freeze`, and so
            about the next two.
        on_few_tokens: What to do about experts that saw few tokens.
        enough_tokens: Tokens from which an expert stands alone.
        force: Replace an existing folder, with all that is in it.
        load_check: Try first on a small twin of the model whether the result loads back.
        dtype: "auto" for that of the checkpoint, or the name of a torch dtype.
        device: Where scales are computed and weights quantized.
        shard_bytes: Most bytes of a file of weights; a single unit may be larger.
        progress: Called as `progress("megabytes", done, total)`, by what was read.
        rank_timeout: Seconds that one rank waits for another that shows no sign of life; it shows
            one with each unit.

    Raises:
        MissingDataError: The scheme or an observer needs statistics that are not there.
        StatisticsError: Statistics of another model, or that lack what an observer asks for.
        RankError: Another rank failed or did not come.
        CheckpointError: The path is taken, or cannot be written; a module cannot be compressed.
        CalipersError: The checkpoint cannot be opened, is incomplete or is quantized already.
        ValueError: As `calibrate`. All of these are told before any weight is read, but for what
            only the weights tell.

    Example:
        >>> import tempfile
        >>> from calipers.demo import MODEL_PATH
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = quantize_checkpoint(MODEL_PATH, f"{folder}/out", "W4A16")
        >>> report.modules, report.shards
        (21, 1)
    """
    started = time.perf_counter()
    source, target = Path(path).expanduser(), Path(out).expanduser()
    refuse_source(target, source)
    refuse_taken(target, force=force)
    choice = ObserverChoice(
        observer, activation_observer, dict(observer_options or {}), statistics is not None
    )
    choice.check()
    check_choice("on_missing", on_missing, OnMissing)
    known = None
    if statistics is not None:
        if not isinstance(statistics, Mapping):
            statistics = read_statistics(statistics)
        known = Known(statistics, on_missing, ExpertPolicy(on_few_tokens, enough_tokens))
    with joined_ranks(rank_timeout) as ranks, ranks.telling_failure("quantizing a checkpoint"):
        plan = plan_stream(
            SourceCheckpoint(source, dtype),
            scheme,
            choice,
            ignore,
            on_unfit,
            scheme_options,
            kv_cache,
            only,
            known=known,
            load_check=load_check,
            shard_bytes=shard_bytes,
            ranks=ranks,
        )
        known = statistics = None  # the observers know
        resumed = run_stream(
            plan, target, ranks, force=force, device=torch.device(device), progress=progress
        )
    return StreamReport(
        out=target,
        modules=len(plan.plan.observed),
        shards=len(plan.shards),
        resumed=resumed,
        bytes_before=plan.bytes_read,
        bytes_after=plan.bytes_written,
        seconds=time.perf_counter() - started,
    )


def run_stream(
    plan: StreamPlan,
    out: Path,
    ranks: Ranks,
    *,
    force: bool,
    device: torch.device,
    progress: Progress | None = None,
) -> int:
    """Do what was planned.

    Args:
        plan: See `plan_stream`; it is used up.
        out: As in `quantize_checkpoint`.
        ranks: Processes that share the files; all of them make this call.
        force: As in `quantize_checkpoint`, and so are the others.
        device: Where to compute.
        progress: Called by what was read.

    Returns:
        How many shards were there already; on ranks but the first, of its own ones.

    Raises:
        CheckpointError: The folder cannot be written, or a module cannot be compressed.
        RankError: Another rank failed or did not come.
    """
    place = out.resolve()
    fingerprint = plan.fingerprint()
    try:
        own = split_by_size(plan.shards, lambda each: each.bytes_read, ranks.size)[ranks.rank]
        if ranks.rank == 0:
            place.parent.mkdir(parents=True, exist_ok=True)
            with resumable(place, fingerprint, force=force) as staging:
                resumed = sum(staging.done(shard.name) for shard in plan.shards)
                write_configs(plan, staging)
                ranks.meet("planning")
                _write_shards(plan, own, staging, device, ranks, progress)
                ranks.meet("writing files of weights")
                _write_index(plan, staging)
        else:
            ranks.meet("planning")
            staging = join_staging(place, fingerprint)
            resumed = sum(staging.done(shard.name) for shard in own)
            _write_shards(plan, own, staging, device, ranks, progress)
            ranks.meet("writing files of weights")
        ranks.meet("completing the folder")
    except (OSError, SafetensorError) as error:
        raise CannotWriteError(f"{out} cannot be written: {error}") from error
    return resumed


def write_configs(plan: StreamPlan, staging: Staging) -> None:
    """Everything but the weights, as `save` writes it."""
    apart = staging.scratch / "configs"  # transformers removes weights from where it writes
    write_files(plan.source.model, apart, {}, plan.dtype)
    for file in apart.iterdir():
        if file.suffix != ".safetensors":
            file.replace(staging.folder / file.name)
    carry_files(plan.source.model, staging.folder, tokenizer=True)


def _write_shards(
    plan: StreamPlan,
    shards: list[Shard],
    staging: Staging,
    device: torch.device,
    ranks: Ranks,
    progress: Progress | None,
) -> None:
    """Read, compute and write at once, but for shards that are there already."""
    total = sum(shard.bytes_read for shard in shards)
    shards = [shard for shard in shards if not staging.done(shard.name)]
    left = {id(unit): shard for shard in shards for unit in shard.units}
    units = [unit for shard in shards for unit in shard.units]
    done = total - sum(unit.bytes_read for unit in units)
    counts = {shard.name: len(shard.units) for shard in shards}
    filling: dict[str, Tensor] = {}
    reader = Reader(plan.source)

    def read(unit: Unit) -> Tensors:
        return {load: reader.read(load) for load in unit.loads}

    def write(filled: tuple[str, dict[str, Tensor]]) -> None:
        name, tensors = filled
        note = {key: value.nbytes for key, value in tensors.items()}
        staging.write(
            name, {name: lambda path: save_file(tensors, path, {"format": "pt"})}, note=note
        )

    def tell() -> None:
        ranks.show_life()
        if progress is not None:
            progress("megabytes", done // _MEGABYTE, total // _MEGABYTE)

    tell()
    kept = 0
    with writing_behind(write) as put:
        for unit, tensors in read_ahead(units, read, lambda unit: unit.bytes_read, _AHEAD):
            filling |= _quantized(plan, unit, tensors, device)
            tensors.clear()
            name = left[id(unit)].name
            counts[name] -= 1
            if not counts[name]:
                put((name, filling))
                filling = {}
            done += unit.bytes_read
            tell()
            kept += unit.bytes_read
            if kept > _AHEAD:
                give_back_memory()
                kept = 0


@torch.no_grad()
def _quantized(
    plan: StreamPlan, unit: Unit, tensors: Tensors, device: torch.device
) -> dict[str, Tensor]:
    """What is written of a unit, by name."""
    with weights_in_place(plan, unit, tensors, device):
        by_name = {each.name: each for each in unit.group}
        for names in find_fused_groups(by_name):
            _freeze(plan, [by_name[name] for name in names])
        model = plan.source.model
        return stored_tensors(model, unit.parts, plan.dtype if are_renamed(model) else None)


def _freeze(plan: StreamPlan, group: list[ObservedModule]) -> None:
    for each in group:
        forget_quantization(each.module)
    plan.freezing.freeze(group, measure=False)
    for each in group:
        each.module.quantization_status = QuantizationStatus.FROZEN
        refuse_unusable_scales(each.name, each.module)


@contextmanager
def weights_in_place(
    plan: StreamPlan, unit: Unit, tensors: Tensors, device: torch.device, *, whole: bool = False
) -> Iterator[None]:
    """A block in which the modules of a unit have their weights; afterwards they are empty.

    Args:
        plan: What is done to the checkpoint.
        unit: The unit.
        tensors: What was read for it.
        device: Where the modules that are quantized are.
        whole: Put the others there as well, on which the model is run.
    """
    made = {load: plan.source.convert(load, own) for load, own in tensors.items()}
    quantized = {id(each.module) for each in unit.group}
    modules = {id(part.module): part.module for part in unit.parts}
    for number, places in unit.places.items():
        module = modules[number]
        for key, place in places.items():
            value = made[place.load][place.name]
            if place.view is not None:
                value = value.as_strided(*place.view)
            if whole or number in quantized:
                value = value.to(device)
            if key in module._buffers:
                module._buffers[key] = value
            else:
                module._parameters[key] = nn.Parameter(value, requires_grad=False)
    made.clear()
    try:
        yield
    finally:
        for module in modules.values():
            for key, full in list(module._parameters.items()):
                if full is not None:
                    empty = nn.Parameter(full.detach().to("meta"), requires_grad=False)
                    module._parameters[key] = empty
            for key in unit.places.get(id(module), {}).keys() & module._buffers.keys():
                module._buffers[key] = module.get_buffer(key).to("meta")


def _write_index(plan: StreamPlan, staging: Staging) -> None:
    if len(plan.shards) == 1:
        return
    sizes = {shard.name: staging.note(shard.name) for shard in plan.shards}
    index = {
        "metadata": {
            "total_parameters": plan.source.model.num_parameters(),
            "total_size": sum(sum(own.values()) for own in sizes.values()),
        },
        "weight_map": {key: name for name, own in sizes.items() for key in own},
    }
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (staging.folder / INDEX).write_text(text, encoding="utf-8")
