"""`calipers compare`: one model under several schemes and observers, in one table."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
import typer
from rich.filesize import decimal
from torch import Tensor

from calipers.calibration import calibrate, resolve_config
from calipers.calibration.batches import Progress
from calipers.calibration.config import has_free_group_size
from calipers.calibration.experts import separated_experts
from calipers.calibration.parts import Only
from calipers.calibration.plan import ObserverChoice, plan_observers
from calipers.calibration.shadows import read_options, split_options
from calipers.calibration.targets import schemes_by_target
from calipers.checkpoint import compressed_size
from calipers.checkpoint.replace import recover
from calipers.cli import options
from calipers.cli.calibrate import DEFAULT_SCHEME, choose_group_size, sized
from calipers.cli.console import plain_errors, print_json, print_lines, print_table, show_progress
from calipers.cli.judging import (
    Change,
    Measured,
    change_json,
    common_objective,
    compare_measured,
    figure,
    figure_json,
    figure_text,
    in_words,
    json_number,
    measure,
)
from calipers.cli.models import load_model, load_tokenizer
from calipers.cli.texts import TokenizedText, calibration_text, heldout_text
from calipers.demo import MODEL_PATH
from calipers.errors import CalipersError
from calipers.evaluation import Perplexity
from calipers.observers import Observer
from calipers.text.for_model import fitting_length, model_inputs

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


def compare(
    model: options.ModelFolder = None,
    scheme: Annotated[
        list[str] | None,
        typer.Option(help="A preset or a YAML file; may be repeated. Default: W4A16."),
    ] = None,
    group_size: options.GroupSize = None,
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
    activation_observer: options.ActivationObserver = None,
    plugin: options.Plugins = None,
    data: options.DataFile = None,
    samples: options.DataSamples = 128,
    sequence_length: options.SequenceLength = 512,
    ignore: options.Ignore = None,
    only: options.OnlyPart = None,
    on_unfit: Annotated[
        str,
        typer.Option(help="Modules whose columns the group size does not divide: error, skip."),
    ] = "error",
    eval_file: options.EvalFile = None,
    eval_samples: options.EvalSamples = 128,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    json: options.Json = False,
) -> None:
    """Quantize a model under each scheme with each observer, and compare the results.

    No checkpoint is written. Models without a language head are judged by their output error.

    Examples:
      calipers compare ./model --scheme W4A16 --scheme NVFP4

      calipers compare ./model --observer imatrix_mse --observer optimal --data text.jsonl

      calipers compare ./model --observer imatrix_mse --observer optimal:negative_scales=true
    """
    with plain_errors(), show_progress() as progress:
        # Whatever can be refused is refused before the model is loaded, or at least before it runs.
        path = MODEL_PATH if model is None else model
        recover(path.expanduser().resolve())
        texts = calibration_text(data, demo=model is None)
        judged_texts = heldout_text(eval_file, demo=model is None)
        options.load_plugins(plugin)
        part = options.known_part(only)
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
                group_size, size_note = choose_group_size(loaded, patterns, part)
                runs = plan_runs(schemes, observers, option or [], group_size)
            for run in runs:
                _check(loaded, run, activation_observer, patterns, on_unfit, part)
        tokenizer = load_tokenizer(path)
        length = fitting_length(loaded, sequence_length)
        read = texts.read(tokenizer, length, samples)
        judged = judged_texts.read(tokenizer, length, eval_samples)
        before, size = measure(loaded, judged.batches, progress), loaded.get_memory_footprint()
        # Each run begins with an unquantized model, which is read again rather than copied: two
        # models at once could be too much.
        models = [loaded]
        del loaded
        results = execute(
            lambda: models.pop() if models else load_model(path, device=device, dtype=dtype),
            runs,
            read.batches,
            judged.batches,
            before,
            progress,
            ignore=patterns,
            only=part,
            on_unfit=on_unfit,
            activation_observer=activation_observer,
        )
        verdicts = judge_schemes(results, patterns)
    name = "demo" if model is None else str(model)
    comparison = Comparison(name, read, judged, before, size, results, verdicts, size_note)
    if json:
        print_json(comparison_json(comparison))
    else:
        print_comparison(f"{name}, quantized and judged", comparison)


def _check(
    model: Any,
    run: Run,
    activation_observer: str | None,
    ignore: Sequence[str],
    on_unfit: Any,
    only: Only | None,
) -> None:
    """Refuse what the model cannot take before anything is run."""
    choice = ObserverChoice(run.observer, activation_observer, run.options, has_data=True)
    try:
        plan_observers(model, run.scheme, choice, ignore, on_unfit, run.scheme_options, only=only)
    except CalipersError as error:
        raise CalipersError(f"scheme {run.scheme}, observer {run.name}: {error}") from None


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


def plan_runs(
    schemes: Sequence[str],
    observers: Sequence[str],
    common: list[str],
    group_size: int | None = None,
) -> list[Run]:
    """Every scheme with every observer, whose options of its own stand behind a colon.

    Options "key=value" in `common` go to those observers that have them, and `group_size` to those
    schemes whose groups have no fixed size.

    Raises:
        CalipersError: An unknown observer, an option without a value, a common option that no
            observer has, or a group size that no scheme has.
    """
    given = read_options(common, "--option")
    used: set[str] = set()
    chosen = []
    for each in dict.fromkeys(observers):
        name, own = split_options(each)
        known = Observer.get_value_from_registry(name).Options.names()
        options = {key: value for key, value in given.items() if key in known}
        used |= options.keys()
        options |= read_options(own, "--option")
        chosen.append((name, options))
    if unused := given.keys() - used:
        names = ", ".join(name for name, _ in chosen)
        raise CalipersError(f"--option: none of {names} has an option {min(unused)!r}")
    by_scheme = {each: _scheme_options(each, group_size) for each in schemes}
    if group_size is not None and not any(by_scheme.values()):
        resolve_config(schemes[0], (), {"group_size": group_size})  # says why not
    return [Run(s, name, having, more) for s, more in by_scheme.items() for name, having in chosen]


def _scheme_options(scheme: str, group_size: int | None) -> dict[str, Any]:
    """The group size as an option of a scheme; none where the scheme has no such choice."""
    schemes = schemes_by_target(resolve_config(scheme)).values()
    return sized(group_size) if any(has_free_group_size(each.weights) for each in schemes) else {}


def execute(
    fresh_model: Callable[[], Any],
    runs: Sequence[Run],
    texts: Sequence[Tensor],
    judged: Sequence[Tensor],
    before: Measured,
    progress: Progress,
    *,
    stored: torch.dtype | None = None,
    **others: Any,
) -> list[RunResult]:
    """Quantize a model as each run asks for, and measure what came of it.

    Args:
        fresh_model: Gives an unquantized model for each run, which is let go after it.
        runs: Schemes and observers.
        texts: Token ids to calibrate with, shape (batch, tokens) each.
        judged: Token ids to measure with, likewise.
        before: What the unquantized model did with `judged`.
        progress: Called for each run, and for each batch that is measured.
        stored: The dtype that the checkpoint's size is told for; None for that of the model.
        others: Other arguments of `calibrate`.
    """
    results = []
    for done, run in enumerate(runs):
        progress("runs", done, len(runs))
        model = fresh_model()
        started = time.perf_counter()
        report = calibrate(
            model,
            run.scheme,
            run.observer,
            model_inputs(texts, model),
            observer_options=run.options,
            scheme_options=run.scheme_options,
            **others,
        )
        seconds = time.perf_counter() - started
        errors = [each.weight_error for each in report.modules if each.weight_error is not None]
        after = measure(model, judged, progress)
        if stored is not None:
            model.to(stored)  # after all that is measured
        results.append(
            RunResult(
                run,
                sum(errors) / len(errors) if errors else None,
                after if isinstance(after, Perplexity) else None,
                compare_measured(before, after),
                compressed_size(model) if report.modules else model.get_memory_footprint(),
                seconds,
                common_objective(report),
            )
        )
        del model, report
        gc.collect()  # hooks and the modules that hold them are cycles
    progress("runs", len(runs), len(runs))
    return results


def judge_schemes(results: Sequence[RunResult], ignore: Sequence[str] = ()) -> dict[str, str]:
    """One verdict for each scheme, on the best of its runs."""
    found = {}
    for name in dict.fromkeys(each.run.scheme for each in results):
        tried = [each for each in results if each.run.scheme == name]
        best = min(tried, key=_rank)
        # What was tried and did no better is not advised.
        hessian = any(each.objective == "hessian" for each in tried)
        objective = "hessian" if hessian else best.objective
        words = in_words(resolve_config(name, ignore), best.change, objective)
        found[name] = f"{best.run.name}: {words}"
    return found


def _rank(result: RunResult) -> float:
    """The change of the perplexity, or the output error; a broken run comes last."""
    value, _ = figure(result.change)
    return math.inf if math.isnan(value) else value


def comparison_json(comparison: Comparison) -> dict[str, Any]:
    """A comparison for JSON."""
    return {
        "model": comparison.model,
        "data": comparison.data.to_dict(),
        "eval": comparison.judged.to_dict(),
        "unquantized": {"bytes": comparison.size, "perplexity": figure_json(comparison.before)},
        "runs": [
            {
                "scheme": each.run.scheme,
                "observer": each.run.observer,
                "options": each.run.options,
                "group_size": each.run.scheme_options.get("group_size"),
                "weight_error": json_number(each.weight_error),
                "perplexity": figure_json(each.after),
                **change_json(each.change),
                "bytes": each.bytes,
                "seconds": each.seconds,
            }
            for each in comparison.results
        ],
        "verdicts": comparison.verdicts,
    }


def print_comparison(title: str, comparison: Comparison) -> None:
    """Print the table of a comparison, and the verdicts under it."""
    before, results = comparison.before, comparison.results
    kinds, figures = ["output error"], []
    if isinstance(before, Perplexity):
        kinds, figures = ["perplexity", "change"], [figure_text(before)]
    columns = ["scheme", "observer", "weight error", *kinds, "size", "seconds"]
    rows = [["unquantized", "-", "-", *figures, "-", decimal(comparison.size), "-"]]
    rows += [
        [
            each.run.scheme,
            each.run.name,
            "-" if each.weight_error is None else f"{each.weight_error:.4f}",
            *([] if each.after is None else [figure_text(each.after)]),
            figure_text(each.change),
            decimal(each.bytes),
            f"{each.seconds:.1f}",
        ]
        for each in results
    ]
    print_table(title, columns, rows, right=columns[2:], fold=False)
    lines = [("calibrated with", str(comparison.data)), ("judged by", str(comparison.judged))]
    sizes = {each.run.scheme_options.get("group_size") for each in results} - {None}
    if sizes:
        lines.insert(0, ("group size", comparison.size_note or str(sizes.pop())))
    print_lines([*lines, *comparison.verdicts.items()])
