"""Real processes that run one function each as the ranks of a gloo group."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

#: What the ranks import before they start: once, in the process that they are forked from.
_PRELOADED = ["calipers", "calipers.calibration", "transformers", "torch.distributed.tensor"]
_CONTEXT = multiprocessing.get_context("forkserver")


def run_ranks(
    work: Callable[..., Any], world: int, folder: Path, *args: Any, timeout: float = 240
) -> list[Any]:
    """What `work(rank, world, *args)` gave on each rank, or the exception that it raised.

    `work` is a function of a module that can be imported. Ranks that are not done after `timeout`
    seconds are killed, and fail the test.
    """
    _CONTEXT.set_forkserver_preload(_PRELOADED)
    folder.mkdir(exist_ok=True)
    processes = [
        _CONTEXT.Process(target=_run, args=(work, rank, world, folder, args))
        for rank in range(world)
    ]
    for each in processes:
        each.start()
    deadline = time.monotonic() + timeout
    try:
        for each in processes:
            each.join(max(0.0, deadline - time.monotonic()))
        hanging = [rank for rank, each in enumerate(processes) if each.is_alive()]
        assert not hanging, f"ranks {hanging} of {world} hang"
    finally:
        for each in processes:
            each.kill()
            each.join()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _run(work: Callable[..., Any], rank: int, world: int, folder: Path, args: Any) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("CALIPERS_ENGINE", "native")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    try:
        found: Any = work(rank, world, *args)
    except Exception as error:
        found = error
    torch.save(found, folder / f"{rank}.pt")
    # not destroyed: a rank that is lost would be waited for
    os._exit(0)
