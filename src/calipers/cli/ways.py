"""The two ways in which `calipers calibrate` goes through a model: whole, or block by block."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch

from calipers._words import check_choice
from calipers.calibration.experts import separate_experts
from calipers.calibration.plan import ObserverChoice, Plan, plan_observers, without_modules
from calipers.calibration.report import CalibrationReport
from calipers.calibration.run_plan import run_plan
from calipers.checkpoint import save
from calipers.checkpoint.load_check import refuse_unloadable
from calipers.checkpoint.opening import load_model
from calipers.checkpoint.save import compressed_size
from calipers.distributed import Ranks
from calipers.distributed.collectives import first_alone
from calipers.errors import CalipersError
from calipers.statistics_files import Statistics
from calipers.streaming.calibrate import calibrate_stream
from calipers.streaming.plan import StreamPlan, plan_stream
from calipers.streaming.quantize import SHARD_BYTES
from calipers.streaming.sizes import Memory, open_in_blocks
from calipers.streaming.source import SourceCheckpoint

__all__ = ["Way", "choose_way"]


class Way(Protocol):
    """How a model is opened, planned for, calibrated and written."""

    model: Any
    #: Bytes of all weights before anything is done.
    bytes_before: int
    #: Whether the model can be run as a whole, before and after.
    runs_whole: bool

    def plan(
        self,
        scheme: str,
        choice: ObserverChoice,
        ignore: Any,
        on_unfit: Any,
        *more: Any,
        load_check: bool,
    ) -> Plan:
        """What `plan_observers` gives for its arguments after the model.

        With `load_check` what would not load back is refused.
        """

    def run(
        self,
        plan: Plan,
        batches: Iterable[Any] | None,
        *,
        statistics: Statistics | None,
        **how: Any,
    ) -> CalibrationReport:
        """What `run_plan` gives for its arguments after the model, by name."""

    def write(self, report: CalibrationReport) -> int:
        """Write the checkpoint where one was asked for; its bytes."""


class Whole:
    """All weights in memory."""

    runs_whole = True

    def __init__(
        self,
        path: Path,
        device: str | None,
        dtype: str,
        out: Path | None,
        force: bool,
        ranks: Ranks,
    ) -> None:
        self.model = load_model(path, device=device, dtype=dtype)
        self._put_experts_back = separate_experts(self.model)
        self._out, self._force, self._ranks = out, force, ranks
        self.bytes_before = int(self.model.get_memory_footprint())

    def plan(
        self,
        scheme: str,
        choice: ObserverChoice,
        ignore: Any,
        on_unfit: Any,
        *more: Any,
        load_check: bool,
    ) -> Plan:
        """See `Way`."""
        plan = plan_observers(self.model, scheme, choice, ignore, on_unfit, *more)
        if not load_check:
            return plan
        schemes = {each.name: each.scheme for each in plan.resolution.targets}
        skip = on_unfit == "skip"
        check = functools.partial(refuse_unloadable, self.model, schemes, skip=skip)
        unloadable = first_alone(self._ranks, check, "trying to load back")
        return without_modules(plan, unloadable, "cannot be loaded back")

    def run(
        self,
        plan: Plan,
        batches: Iterable[Any] | None,
        *,
        statistics: Statistics | None,
        **how: Any,
    ) -> CalibrationReport:
        """See `Way`."""
        report = run_plan(
            self.model, plan, batches, ranks=self._ranks, statistics=statistics, **how
        )
        self._put_experts_back()
        return report

    def write(self, report: CalibrationReport) -> int:
        """See `Way`."""
        if self._out is not None:
            save(self.model, self._out, force=self._force, load_check=False)
        return compressed_size(self.model) if report.modules else self.bytes_before


class Blocks:
    """The weights of one block in memory; the checkpoint is written on the way."""

    runs_whole = False

    def __init__(
        self,
        source: SourceCheckpoint,
        out: Path,
        force: bool,
        ranks: Ranks,
        device: str,
        propagate: bool,
    ) -> None:
        self.model = source.model
        self.bytes_before = source.nbytes
        self._source, self._out, self._force, self._ranks = source, out, force, ranks
        self._device, self._propagate = device, propagate
        self._plan: StreamPlan | None = None

    def plan(
        self,
        scheme: str,
        choice: ObserverChoice,
        ignore: Any,
        on_unfit: Any,
        *more: Any,
        load_check: bool,
    ) -> Plan:
        """See `Way`."""
        self._plan = plan_stream(
            self._source,
            scheme,
            choice,
            ignore,
            on_unfit,
            *more,
            runs_data=True,
            load_check=load_check,
            shard_bytes=SHARD_BYTES,
        )
        return self._plan.plan

    def run(
        self,
        plan: Plan,
        batches: Iterable[Any] | None,
        *,
        statistics: Statistics | None,
        **how: Any,
    ) -> CalibrationReport:
        """See `Way`; `choose_way` refuses statistics here."""
        assert self._plan is not None
        return calibrate_stream(
            self._plan,
            self._out,
            batches,
            propagate=self._propagate,
            ranks=self._ranks,
            force=self._force,
            device=self._device,
            **how,
        )

    def write(self, report: CalibrationReport) -> int:
        """See `Way`; it is written already."""
        return sum(file.stat().st_size for file in self._out.glob("*.safetensors"))


def choose_way(
    path: Path,
    memory: str,
    *,
    propagate: bool,
    out: Path | None,
    force: bool,
    statistics: bool,
    judged: bool,
    tokens: int,
    device: str | None,
    dtype: str,
    ranks: Ranks,
) -> Way:
    """Open a model in the way that was asked for, or that fits into memory.

    Args:
        path: A local transformers folder.
        memory: "auto", "whole" or "blocks".
        propagate: Whether blocks shall see what quantized ones give.
        out: Folder to write; None for none.
        force: Whether it may be replaced.
        statistics: Whether there are statistics in place of data.
        judged: Whether the user gave a text to judge by.
        tokens: Most tokens of the data.
        device: Where to run; None takes a GPU if there is one.
        dtype: "auto", or the name of a torch dtype.
        ranks: Processes that do the same.

    Raises:
        CalipersError: As `load_model` and `SourceCheckpoint`; what block by block cannot be done.
    """
    check_choice("memory", memory, Memory)
    if propagate and memory == "whole":
        raise CalipersError("--propagate: only --memory blocks runs a block once it is quantized")
    if propagate:
        memory = "blocks"
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    source = open_in_blocks(path, dtype, tokens, place) if memory == "auto" else None
    if memory != "blocks" and source is None:
        return Whole(path, device, dtype, out, force, ranks)
    if out is None:
        raise CalipersError("--memory blocks: expected --out DIR, to which blocks are written")
    if statistics:
        raise CalipersError(
            "--statistics and --memory blocks exclude each other: nothing has to be run, and "
            "`calipers quantize --statistics` has few tensors in memory"
        )
    if judged:
        raise CalipersError(
            "--eval: block by block the model is never whole, so that it cannot be judged; give "
            "--no-eval, and use `calipers evaluate` on a machine that holds it"
        )
    source = source or SourceCheckpoint(path, dtype)
    return Blocks(source, out, force, ranks, place, propagate)
