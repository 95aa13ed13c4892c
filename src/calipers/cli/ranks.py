"""The command as one of several ranks, started by torchrun."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Annotated, TypeAlias

import torch
import torch.distributed as dist
import typer

from calipers.calibration.batches import Progress
from calipers.distributed import Ranks

__all__ = ["RankTimeout", "joined_ranks", "showing_life"]

RankTimeout: TypeAlias = Annotated[
    float,
    typer.Option(
        min=1,
        help="Under torchrun: seconds to wait for a rank that shows no sign of life.",
    ),
]


@contextmanager
def joined_ranks(timeout: float) -> Iterator[Ranks]:
    """The ranks that torchrun started this command as, until the end of the block.

    A GPU each where there are enough, by NCCL; else the CPU, by gloo. Started without torchrun the
    command is one alone.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or dist.is_initialized():
        yield Ranks(timeout=timeout)
        return
    local = int(os.environ["LOCAL_RANK"])
    own_gpu = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    if own_gpu:
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if own_gpu else "gloo", timeout=timedelta(seconds=timeout))
    try:
        yield Ranks(timeout=timeout)
    finally:
        dist.destroy_process_group()


def showing_life(ranks: Ranks, progress: Progress) -> Progress:
    """Progress that is a sign of life for ranks which wait; shown by the first one alone."""

    def advance(stage: str, done: int, total: int | None) -> None:
        ranks.show_life()
        if ranks.rank == 0:
            progress(stage, done, total)

    return advance
