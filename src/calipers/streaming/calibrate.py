"""`calibrate_stream`: a checkpoint calibrated and quantized with one block in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from calipers.calibration.batches import Progress
from calipers.calibration.blocks import OUTSIDE, calibrate_blocks
from calipers.calibration.experts import separate_experts
from calipers.calibration.few_tokens import ExpertPolicy
from calipers.calibration.lockstep import find_blocks
from calipers.calibration.plan import refuse_without_data
from calipers.calibration.report import CalibrationReport
from calipers.calibration.session import OnMissing
from calipers.calibration.write import forget_quantization
from calipers.checkpoint.journal import Staging, join_staging, resumable
from calipers.checkpoint.save import CannotWriteError, refuse_taken
from calipers.checkpoint.source import refuse_source
from calipers.distributed import Ranks
from calipers.distributed.collectives import gather_objects
from calipers.streaming.assemble import assemble
from calipers.streaming.blocks import CheckpointStore, fill_buffers
from calipers.streaming.plan import StreamPlan
from calipers.streaming.quantize import write_configs

__all__ = ["calibrate_stream"]


def calibrate_stream(
    plan: StreamPlan,
    out: Path,
    batches: Iterable[Any] | None,
    *,
    on_missing: OnMissing = "error",
    progress: Progress | None = None,
    use_attention_mask: bool = True,
    experts: ExpertPolicy | None = None,
    propagate: bool = False,
    ranks: Ranks | None = None,
    force: bool = False,
    device: str | torch.device = "cpu",
) -> CalibrationReport:
    """Run data through a checkpoint block by block, and write the quantized one.

    Where the process is killed, the blocks that were written stay beside `out`; the same call goes
    on after them: their forward passes are run again, their scales are not searched again.

    Args:
        plan: Made by `plan_stream`; it is used up.
        out: Folder to write.
        batches: As in `calibrate_blocks`, and so are the next five.
        on_missing: What to do about modules without data.
        progress: Called by blocks.
        use_attention_mask: Leave padding out.
        experts: What is done about few tokens.
        propagate: Let each block see what the quantized ones before it give.
        ranks: As in `calibrate`; the first one alone writes.
        force: Replace an existing folder.
        device: Where the model runs.

    Raises:
        CheckpointError: The folder cannot be written, or a module cannot be compressed.
        CalipersError: The model has no blocks.
        Exception: As `calibrate_blocks`.
    """
    model, place = plan.source.model, torch.device(device)
    refuse_source(out, plan.source.path)
    refuse_taken(out, force=force)
    if batches is None:
        refuse_without_data(plan.plan)
    held = None if batches is None else list(batches)
    policy = experts or ExpertPolicy()
    ranks = ranks or Ranks()
    fingerprint = plan.fingerprint() | {
        "blocks": {
            "data": gather_objects(ranks, _digest(held), "digests of the data"),
            "on_missing": on_missing,
            "mask": use_attention_mask,
            "experts": asdict(policy),
            "propagate": propagate,
            "device": place.type,
            "shadows": repr(plan.plan.choice.shadows),
            "threads": torch.get_num_threads(),
        }
    }
    plan.attention.remove()
    for each in plan.plan.observed:
        forget_quantization(each.module)
    separate_experts(model)
    blocks = find_blocks(model)
    fill_buffers(model, place)
    out = out.resolve()

    def run(staging: Staging) -> CalibrationReport:
        store = CheckpointStore(plan, blocks, staging, place, writes=ranks.rank == 0)
        with store.bring(OUTSIDE):
            report = calibrate_blocks(
                model,
                plan.plan,
                held,
                store,
                on_missing,
                progress,
                use_attention_mask=use_attention_mask,
                experts=policy,
                propagate=propagate,
                ranks=ranks,
            )
            if ranks.rank == 0:
                write_configs(plan, staging)
        if ranks.rank == 0:
            assemble(store.files, staging.folder, model)
        return report

    try:
        if ranks.rank:
            ranks.meet("the staging folder")
            return run(join_staging(out, fingerprint))
        out.parent.mkdir(parents=True, exist_ok=True)
        with resumable(out, fingerprint, force=force) as staging:
            ranks.meet("the staging folder")
            return run(staging)
    except (OSError, SafetensorError) as error:
        raise CannotWriteError(f"{out} cannot be written: {error}") from error
    raise AssertionError  # the staging lets no exception vanish


def _digest(batches: list[Any] | None) -> str | None:
    """What tells this data from other data."""
    if batches is None:
        return None
    digest = hashlib.sha256()
    for batch in batches:
        _add(digest, batch)
    return digest.hexdigest()


def _add(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
        raw = value.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(raw.numpy().tobytes())
    elif isinstance(value, Mapping):
        for key, each in value.items():
            digest.update(f"{key}:".encode())
            _add(digest, each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            _add(digest, each)
    else:
        digest.update(repr(value).encode())
