"""`calipers compare`: one model under several schemes and observers, in one table."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.filesize import decimal
from torch import Tensor

from calipers.calibration import calibrate, resolve_config
from calipers.calibration.choice import ObserverChoice
from calipers.calibration.plan import plan_observers
from calipers.checkpoint import compressed_size
from calipers.checkpoint.replace import recover
from calipers.cli.calibrate import parse_options
from calipers.cli.console import plain_errors, print_json, print_lines, show_progress
from calipers.cli.default_texts import calibration_text, heldout_text
from calipers.cli.judging import (
    Change,
    Measured,
    change_json,
    change_text,
    compare_measured,
    json_number,
    measure,
    measured_json,
    plus_minus,
    writes_text,
)
from calipers.cli.models import load_model, load_tokenizer, model_bytes
from calipers.cli.options import ActivationObserver, DataSamples, Device, Dtype, SequenceLength
from calipers.cli.records import print_records
from calipers.demo import MODEL_PATH
from calipers.errors import CalipersError
from calipers.evaluation import OutputError, Perplexity
from calipers.observers import Observer
from calipers.text import read_batches
from calipers.text.for_model import fitting_length
from calipers.verdict import output_verdict, verdict

__all__ = [
    "Run",
    "RunResult",
    "compare",
    "comparison_json",
    "execute",
    "judge_schemes",
    "plan_runs",
    "print_comparison",
]

_OBSERVERS = ("memoryless_minmax", "optimal", "optimal:objective=hessian")

_Progress = Callable[[str, int, int | None], object]


def compare(
    model: Annotated[
        Path | None,
        typer.Argument(help="A local transformers directory; left out: the embedded demo model."),
    ] = None,
    scheme: Annotated[
        list[str] | None,
        typer.Option(help="A preset or a YAML file; may be repeated. Default: W4A16."),
    ] = None,
    observer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[:KEY=VALUE,...]",
            help="Observer of weights, with options of its own; may be repeated. "
            "Default: memoryless_minmax, optimal and optimal:objective=hessian.",
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE", help="An option of all observers that have it; may be repeated."
        ),
    ] = None,
    activation_observer: ActivationObserver = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Calibration data. Default: the embedded calibration text."
        ),
    ] = None,
    samples: DataSamples = 128,
    sequence_length: SequenceLength = 512,
    ignore: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Module name, class name or re:REGEX to leave alone; may be repeated.",
        ),
    ] = None,
    on_unfit: Annotated[
        str,
        typer.Option(help="Modules whose columns the group size does not divide: error, skip."),
    ] = "error",
    eval_file: Annotated[
        Path | None,
        typer.Option(
            "--eval", metavar="FILE", help="Text to judge by. Default: the embedded held-out text."
        ),
    ] = None,
    eval_samples: Annotated[int, typer.Option(min=1, help="Most sequences to judge by.")] = 128,
    device: Device = None,
    dtype: Dtype = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Quantize a model under each scheme with each observer, and compare the results.

    No checkpoint is written. Models without a language head are judged by their output error.

    Examples:
      calipers compare ./model --scheme W4A16 --scheme NVFP4

      calipers compare ./model --observer imatrix_mse --observer optimal --data text.jsonl

      calipers compare ./model --observer optimal --observer optimal:objective=hessian,signed=true
    """
    with plain_errors(), show_progress() as progress:
        # Whatever can be refused is refused before the model is loaded, or at least before it runs.
        path = MODEL_PATH if model is None else model
        recover(path.expanduser().resolve())
        patterns = tuple(ignore or ())
        runs = plan_runs(scheme or ["W4A16"], observer or list(_OBSERVERS), option or [])
        for run in runs:
            resolve_config(run.scheme, patterns)
        loaded = load_model(path, device=device, dtype=dtype)
        for run in runs:
            _check(loaded, run, activation_observer, patterns, on_unfit)
        tokenizer = load_tokenizer(path)
        length = fitting_length(loaded, sequence_length)
        texts = read_batches(
            data or calibration_text(), tokenizer, sequence_length=length, samples=samples
        )
        judged = read_batches(
            eval_file or heldout_text(), tokenizer, sequence_length=length, samples=eval_samples
        )
        before, size = measure(loaded, judged, progress), model_bytes(loaded)
        results: list[RunResult] = []
        for done, run in enumerate(runs):
            progress("runs", done, len(runs))
            if loaded is None:
                # Read again rather than copied: two models at once could be too much.
                loaded = load_model(path, device=device, dtype=dtype)
            results.append(
                execute(
                    loaded,
                    run,
                    texts,
                    judged,
                    before,
                    progress,
                    ignore=patterns,
                    on_unfit=on_unfit,
                    activation_observer=activation_observer,
                )
            )
            loaded = None
            gc.collect()  # hooks and the modules that hold them are cycles
        progress("runs", len(runs), len(runs))
        verdicts = judge_schemes(results, patterns)
    name = "demo" if model is None else str(model)
    if json:
        print_json(comparison_json(name, judged, before, size, results, verdicts))
    else:
        print_comparison(f"{name}, quantized and judged", before, size, results, verdicts)


@dataclass(frozen=True)
class Run:
    """One scheme with one observer of weights and its options."""

    scheme: str
    observer: str
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """The observer with its options, as a table shows it."""
        return " ".join([self.observer, *(f"{k}={v}" for k, v in self.options.items())])


@dataclass(frozen=True)
class RunResult:
    """What came of a run.

    Attributes:
        run: What was asked for.
        weight_error: Mean relative error of the weights over modules; None where none changed.
        after: Perplexity; None for a model without a language head.
        change: Of the perplexity, or the output error.
        bytes: Of the tensors of the checkpoint that it would make.
        seconds: Wall-clock time of the calibration.
        objective: What the observer minimised, where it has a choice.
    """

    run: Run
    weight_error: float | None
    after: Perplexity | None
    change: Change
    bytes: int
    seconds: float
    objective: str | None


def _check(
    model: Any, run: Run, activation_observer: str | None, ignore: Sequence[str], on_unfit: str
) -> None:
    """Refuse what the model cannot take before anything is run."""
    choice = ObserverChoice(run.observer, activation_observer, run.options, has_data=True)
    try:
        plan_observers(model, run.scheme, choice, ignore, on_unfit)  # type: ignore[arg-type]
    except CalipersError as error:
        raise CalipersError(f"scheme {run.scheme}, observer {run.name}: {error}") from None


def plan_runs(schemes: Sequence[str], observers: Sequence[str], common: list[str]) -> list[Run]:
    """Every scheme with every observer.

    Raises:
        CalipersError: An unknown observer, an option without a value, or a common option that no
            observer has.
    """
    given = parse_options(common)
    used: set[str] = set()
    chosen = []
    for each in dict.fromkeys(observers):
        name, _, own = each.partition(":")
        name = name.strip().lower().replace("-", "_")
        known = Observer.get_value_from_registry(name).Options.model_fields
        options = {key: value for key, value in given.items() if key in known}
        used |= options.keys()
        options |= parse_options(own.split(",")) if own else {}
        chosen.append((name, options))
    if unused := given.keys() - used:
        names = ", ".join(name for name, _ in chosen)
        raise CalipersError(f"--option: none of {names} has an option {min(unused)!r}")
    return [Run(s, name, options) for s in dict.fromkeys(schemes) for name, options in chosen]


def execute(
    model: Any,
    run: Run,
    texts: Sequence[Tensor],
    judged: Sequence[Tensor],
    before: Measured,
    progress: _Progress | None = None,
    *,
    ignore: Sequence[str] = (),
    on_unfit: str = "error",
    activation_observer: str | None = None,
    stored: torch.dtype | None = None,
) -> RunResult:
    """Quantize a model in place and judge it.

    Args:
        model: The unquantized model.
        run: What to do.
        texts: Token ids to calibrate with.
        judged: Token ids to judge by.
        before: What the unquantized model did with `judged`.
        progress: As for `measure`; the calibration itself shows none.
        ignore: Modules left alone, as for `calibrate`.
        on_unfit: As for `calibrate`.
        activation_observer: As for `calibrate`.
        stored: Dtype that a checkpoint would have, which its size is told for; None for that of the
            model.
    """
    more = {"use_cache": False} if writes_text(model) else {}
    started = time.perf_counter()
    report = calibrate(
        model,
        run.scheme,
        run.observer,
        [{"input_ids": ids, **more} for ids in texts],
        ignore,
        observer_options=run.options,
        activation_observer=activation_observer,
        on_unfit=on_unfit,  # type: ignore[arg-type]  # checked there
    )
    seconds = time.perf_counter() - started
    errors = [each.weight_error for each in report.modules if each.weight_error is not None]
    objectives = {each.objective for each in report.modules}
    after = measure(model, judged, progress)
    if stored is not None:
        model.to(stored)  # after all that is measured
    return RunResult(
        run,
        sum(errors) / len(errors) if errors else None,
        after if isinstance(after, Perplexity) else None,
        compare_measured(before, after),
        compressed_size(model) if report.modules else model_bytes(model),
        seconds,
        objectives.pop() if len(objectives) == 1 else None,
    )


def judge_schemes(results: Sequence[RunResult], ignore: Sequence[str] = ()) -> dict[str, str]:
    """One verdict for each scheme, on the best of its runs."""
    best: dict[str, RunResult] = {}
    for each in results:
        kept = best.get(each.run.scheme)
        if kept is None or _figure(each) < _figure(kept):
            best[each.run.scheme] = each
    found = {}
    for name, each in best.items():
        config = resolve_config(name, ignore)
        # What was tried and did no better is not advised.
        tried = {other.objective for other in results if other.run.scheme == name}
        objective = "hessian" if "hessian" in tried else each.objective
        if isinstance(each.change, OutputError):
            words = output_verdict(
                config, each.change.value, each.change.standard_error, objective=objective
            )
        else:
            words = verdict(
                config,
                each.change.relative,
                each.change.relative_error,
                objective=objective,
            )
        found[name] = f"{each.run.name}: {words}"
    return found


def _figure(result: RunResult) -> float:
    """What a run is ranked by; a broken one comes last."""
    change = result.change
    figure = change.value if isinstance(change, OutputError) else change.relative
    return math.inf if math.isnan(figure) else figure


def comparison_json(
    model: str,
    judged: Sequence[Tensor],
    before: Measured,
    size: int,
    results: Sequence[RunResult],
    verdicts: dict[str, str],
) -> dict[str, Any]:
    """A comparison for JSON."""
    return {
        "model": model,
        "sequences": sum(len(each) for each in judged),
        "tokens": sum(each.numel() for each in judged),
        "unquantized": {"bytes": size, "perplexity": _perplexity_json(before)},
        "runs": [_run_json(each) for each in results],
        "verdicts": verdicts,
    }


def _run_json(result: RunResult) -> dict[str, Any]:
    change = result.change
    return {
        "scheme": result.run.scheme,
        "observer": result.run.observer,
        "options": result.run.options,
        "weight_error": json_number(result.weight_error),
        "perplexity": None if result.after is None else _perplexity_json(result.after),
        **change_json(change),
        "bytes": result.bytes,
        "seconds": result.seconds,
    }


def _perplexity_json(measured: Measured) -> dict[str, float | None] | None:
    if isinstance(measured, Perplexity):
        return measured_json(measured.value, measured.standard_error)
    return None


def print_comparison(
    title: str,
    before: Measured,
    size: int,
    results: Sequence[RunResult],
    verdicts: dict[str, str],
) -> None:
    """Print the table of a comparison, and the verdicts under it."""
    columns = ["scheme", "observer", "weight error", "perplexity", "change", "size", "seconds"]
    float_row = ["unquantized", "-", "-", "-", "-", decimal(size), "-"]
    if isinstance(before, Perplexity):
        float_row[3] = plus_minus(before.value, before.standard_error, ".3f")
    else:
        columns[4] = "output error"
    rows = [float_row]
    for each in results:
        after = each.after
        rows.append(
            [
                each.run.scheme,
                each.run.name,
                "-" if each.weight_error is None else f"{each.weight_error:.4f}",
                "-" if after is None else plus_minus(after.value, after.standard_error, ".3f"),
                change_text(each.change),
                decimal(each.bytes),
                f"{each.seconds:.1f}",
            ]
        )
    if not isinstance(before, Perplexity):
        rows = [[cell for i, cell in enumerate(row) if i != 3] for row in rows]
        del columns[3]
    print_records(title, columns, rows, right=columns[2:])
    print_lines(list(verdicts.items()))
