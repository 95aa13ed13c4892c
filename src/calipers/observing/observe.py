"""`observe`: run data once, without any scheme, and keep what any scheme may ask for later."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from glob import escape
from pathlib import Path
from typing import Any

from loguru import logger
from torch import nn

from calipers._unwrap import unwrap, without_wrappers
from calipers.calibration.batches import Progress, expect_batches
from calipers.calibration.experts import separated_experts
from calipers.calibration.parts import Only
from calipers.calibration.session import Calibration
from calipers.checkpoint.journal import resumable
from calipers.errors import CalipersError, StatisticsError
from calipers.observing.passes import Kept, Pass
from calipers.observing.plan import plan_statistics
from calipers.statistics_files import Options, Statistics
from calipers.text.for_model import batches_for_model

__all__ = ["observe"]

#: Seconds between two checkpoints of a pass: what is lost at most when it is killed.
EVERY = 60.0


def observe(
    model: nn.Module,
    data: str | Path | Iterable[Any],
    out: str | Path | None = None,
    *,
    ignore: str | Iterable[str] = (),
    include: str | Iterable[str] = (),
    only: Only | None = None,
    products: int | None = None,
    histograms: bool = False,
    outputs: bool = False,
    kv: bool = False,
    queries: bool = False,
    tokenizer: Any = None,
    samples: int = 128,
    sequence_length: int = 512,
    use_attention_mask: bool = True,
    all_experts: bool = False,
    progress: Progress | None = None,
    every: float = EVERY,
    force: bool = False,
    name: str | None = None,
) -> Statistics:
    """Run data once, without a scheme, and gather what any scheme may ask for later.

    Of every Linear (experts one by one) the sum of x^2 of each input column and the extremes of
    each input column are gathered; more on demand. The model stays as it is.

    Args:
        model: Any torch model with Linear layers, as `calibrate` takes it.
        data: Batches or text, as `calibrate` takes them.
        out: Where to write the statistics file; None writes none. While data runs, what was
            gathered so far is kept beside it: the same call goes on from there after the process
            was killed, and ends with the same bytes.
        ignore: Modules left alone, as in `calibrate`.
        include: Exact names of layers that are left alone otherwise: output heads, routers.
        only: As in `calibrate`.
        products: Sum products of inputs too, for the objective "hessian", of groups of so many
            columns; 0 for whole rows (strategies channel and tensor). None sums none.
        histograms: Count the values of activations by bit pattern, for the observer "histogram".
        outputs: Watch outputs of layers as well.
        kv: Watch the keys and values of attention, for a quantized cache.
        queries: Watch the queries as well.
        tokenizer: As in `calibrate`.
        samples: As in `calibrate`.
        sequence_length: As in `calibrate`.
        use_attention_mask: As in `calibrate`.
        all_experts: As in `calibrate`.
        progress: Called as `progress("batches", done, total)`.
        every: Seconds between two checkpoints beside `out`.
        force: Replace `out` if it exists.
        name: What the file calls the data; None takes the path where `data` is one.

    Returns:
        The statistics; `calibrate(model, scheme, statistics=...)` takes them in place of data.

    Raises:
        CalipersError: `out` exists and holds something else, or nothing is there to observe.
        SchemeError: Patterns that match nothing, attention that cannot be watched.

    Example:
        >>> import torch
        >>> from calipers import observe
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2))
        >>> statistics = observe(model, [torch.ones(3, 4)])
        >>> statistics.states["0.weight"]["moments"]["input_square_sum"]
        tensor([3., 3., 3., 3.], dtype=torch.float64)
    """
    if not isinstance(model, nn.Module):
        raise CalipersError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    options = Options(
        products=_checked_width(products),
        histograms=histograms,
        outputs=outputs,
        states="qkv" if queries else "kv" * kv,
        use_attention_mask=use_attention_mask,
        all_experts=all_experts,
    )
    if name is None and isinstance(data, (str, Path)):
        name = str(data)
    model = unwrap(model)
    with without_wrappers(model), separated_experts(model):
        plan = plan_statistics(model, options, ignore, include, only)
        batches = batches_for_model(
            data, model, tokenizer, samples=samples, sequence_length=sequence_length
        )
        expect_batches(batches)
        with Calibration(model, plan) as calibration:
            work = Pass(calibration, options, batches, name)
            if out is None:
                work.run(progress)
                return work.statistics()
            return _into_file(work, Path(out), progress, every, force=force)


def _into_file(
    work: Pass, out: Path, progress: Progress | None, every: float, *, force: bool
) -> Statistics:
    """Run a pass, go on where an earlier process stopped, and write its file."""
    out = out.expanduser().resolve()
    if out.exists() and not force:
        return _already_there(work, out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with resumable(out, work.identity, force=force, one_file=True) as staging:
        kept = Kept(staging, work, every)
        if not staging.done(out.name):
            kept.resume()
            work.run(progress, kept)
            staging.write(out.name, {out.name: lambda path: work.statistics().write(path)})
    return Statistics.load(out)


def _already_there(work: Pass, out: Path) -> Statistics:
    """The statistics of this very pass, where its file is there already.

    Raises:
        CalipersError: It holds something else, or that cannot be told.
    """
    with suppress(StatisticsError):
        found = Statistics.load(out)
        if work.is_of(found.manifest):
            logger.info("{} is there already, of the same model, data and options", out)
            _remove_staging(work, out, found)
            return found
    raise CalipersError(f"{out} exists: choose another place, or replace it with force (--force)")


def _remove_staging(work: Pass, out: Path, found: Statistics) -> None:
    """Remove what a process left that was killed when it had just moved its file to `out`."""
    if any(out.parent.glob(f".{escape(out.name)}.*.part")):
        with resumable(out, work.identity, force=True, one_file=True) as staging:
            staging.write(out.name, {out.name: found.write})


def _checked_width(products: int | None) -> int | None:
    if products is not None and (isinstance(products, bool) or products < 0):
        raise CalipersError(
            f"products (--products): expected columns of a group, or 0 for rows, got {products!r}"
        )
    return products
