"""`calipers compare`: one model under several schemes and observers, in one table."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from compressed_tensors.quantization import QuantizationScheme
from rich.filesize import decimal
from torch import Tensor

from calipers.calibration import calibrate, resolve_config
from calipers.calibration.config import has_free_group_size
from calipers.calibration.experts import separated_experts
from calipers.calibration.plan import ObserverChoice, plan_observers
from calipers.checkpoint import compressed_size
from calipers.checkpoint.replace import recover
from calipers.cli.calibrate import DEFAULT_SCHEME, choose_group_size, parse_options
from calipers.cli.console import plain_errors, print_json, print_lines, show_progress
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
)
from calipers.cli.models import load_model, load_tokenizer, model_bytes
from calipers.cli.options import (
    ActivationObserver,
    DataFile,
    DataSamples,
    Device,
    Dtype,
    EvalFile,
    EvalSamples,
    GroupSize,
    SequenceLength,
)
from calipers.cli.plugins import Plugins, load_plugins
from calipers.cli.records import print_records
from calipers.cli.texts import TokenizedText, calibration_text, heldout_text
from calipers.demo import MODEL_PATH
from calipers.errors import CalipersError
from calipers.evaluation import OutputError, Perplexity
from calipers.observers import Observer
from calipers.text.for_model import fitting_length, model_inputs
from calipers.verdict import output_verdict, verdict

__all__ = [
    "Comparison",
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
    group_size: GroupSize = None,
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
    plugin: Plugins = None,
    data: DataFile = None,
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
    eval_file: EvalFile = None,
    eval_samples: EvalSamples = 128,
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
        texts = calibration_text(data, demo=model is None)
        judged_texts = heldout_text(eval_file, demo=model is None)
        load_plugins(plugin)
        patterns = tuple(ignore or ())
        schemes = scheme or [DEFAULT_SCHEME]
        observers = observer or list(_OBSERVERS)
        runs = plan_runs(schemes, observers, option or [], group_size)
        for run in runs:
            resolve_config(run.scheme, patterns)
        loaded = load_model(path, device=device, dtype=dtype)
        size_note = None
        with separated_experts(loaded):
            if scheme is None and group_size is None and on_unfit == "error":
                group_size, size_note = choose_group_size(loaded, patterns)
                runs = plan_runs(schemes, observers, option or [], group_size)
            for run in runs:
                _check(loaded, run, activation_observer, patterns, on_unfit)
        tokenizer = load_tokenizer(path)
        length = fitting_length(loaded, sequence_length)
        read = texts.read(tokenizer, sequence_length=length, samples=samples)
        judged = judged_texts.read(tokenizer, sequence_length=length, samples=eval_samples)
        before, size = measure(loaded, judged.batches, progress), model_bytes(loaded)
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
                    read.batches,
                    judged.batches,
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
    comparison = Comparison(name, read, judged, before, size, results, verdicts, size_note)
    if json:
        print_json(comparison_json(comparison))
    else:
        print_comparison(f"{name}, quantized and judged", comparison)


@dataclass(frozen=True)
class Run:
    """One scheme with one observer of weights and its options."""

    scheme: str
    observer: str
    options: dict[str, Any]
    scheme_options: dict[str, Any] = field(default_factory=dict)

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


@dataclass(frozen=True)
class Comparison:
    """All runs of one model, and what they were done with.

    Attributes:
        model: What it is called.
        data: Text that the observers saw.
        judged: Text that all were judged by.
        before: What the unquantized model did with it.
        size: Bytes of the unquantized model.
        results: One for each run.
        verdicts: By scheme, on the best of its runs.
        size_note: Why groups have another size than the scheme's; None where they do not.
    """

    model: str
    data: TokenizedText
    judged: TokenizedText
    before: Measured
    size: int
    results: Sequence[RunResult]
    verdicts: dict[str, str]
    size_note: str | None = None


def _check(
    model: Any, run: Run, activation_observer: str | None, ignore: Sequence[str], on_unfit: str
) -> None:
    """Refuse what the model cannot take before anything is run."""
    choice = ObserverChoice(run.observer, activation_observer, run.options, has_data=True)
    try:
        plan_observers(
            model,
            run.scheme,
            choice,
            ignore,
            on_unfit,  # type: ignore[arg-type]  # checked there
            run.scheme_options,
        )
    except CalipersError as error:
        raise CalipersError(f"scheme {run.scheme}, observer {run.name}: {error}") from None


def plan_runs(
    schemes: Sequence[str],
    observers: Sequence[str],
    common: list[str],
    group_size: int | None = None,
) -> list[Run]:
    """Every scheme with every observer.

    Args:
        schemes: Presets or YAML files.
        observers: Names, with options of their own behind a colon.
        common: Options "key=value", of those observers that have them.
        group_size: Columns of a group, for those schemes whose groups have no fixed size.

    Raises:
        CalipersError: An unknown observer, an option without a value, a common option that no
            observer has, or a group size that no scheme has.
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
    sized = {each: _scheme_options(each, group_size) for each in schemes}
    if group_size is not None and not any(sized.values()):
        resolve_config(schemes[0], (), {"group_size": group_size})  # says why not
    return [Run(s, name, options, more) for s, more in sized.items() for name, options in chosen]


def _scheme_options(scheme: str, group_size: int | None) -> dict[str, Any]:
    """The group size as an option of a scheme; none where the scheme has no such choice."""
    if group_size is None:
        return {}
    groups = resolve_config(scheme).config_groups.values()
    weights = [each.weights for each in groups if isinstance(each, QuantizationScheme)]
    free = any(each is not None and has_free_group_size(each) for each in weights)
    return {"group_size": group_size} if free else {}


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
    started = time.perf_counter()
    report = calibrate(
        model,
        run.scheme,
        run.observer,
        model_inputs(texts, model),
        ignore,
        observer_options=run.options,
        activation_observer=activation_observer,
        on_unfit=on_unfit,  # type: ignore[arg-type]  # checked there
        scheme_options=run.scheme_options,
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


def comparison_json(comparison: Comparison) -> dict[str, Any]:
    """A comparison for JSON."""
    before = comparison.before
    return {
        "model": comparison.model,
        "data": comparison.data.to_dict(),
        "eval": comparison.judged.to_dict(),
        "unquantized": {"bytes": comparison.size, "perplexity": _perplexity_json(before)},
        "runs": [_run_json(each) for each in comparison.results],
        "verdicts": comparison.verdicts,
    }


def _run_json(result: RunResult) -> dict[str, Any]:
    change = result.change
    return {
        "scheme": result.run.scheme,
        "observer": result.run.observer,
        "options": result.run.options,
        "group_size": result.run.scheme_options.get("group_size"),
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


def print_comparison(title: str, comparison: Comparison) -> None:
    """Print the table of a comparison, and the verdicts under it."""
    before, size, results = comparison.before, comparison.size, comparison.results
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
    lines = [("calibrated with", str(comparison.data)), ("judged by", str(comparison.judged))]
    sizes = {each.run.scheme_options.get("group_size") for each in results} - {None}
    if sizes:
        lines.insert(0, ("group size", comparison.size_note or str(sizes.pop())))
    print_lines([*lines, *comparison.verdicts.items()])
