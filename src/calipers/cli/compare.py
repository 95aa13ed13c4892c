"""`calipers compare`: one model under several schemes and observers, in one table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.filesize import decimal

from calipers._files import replacing
from calipers.calibration import resolve_config
from calipers.calibration.experts import separated_experts
from calipers.calibration.shadows import Shadows
from calipers.calibration.summaries import (
    shadow_cells,
    shadow_headings,
    summarize_coverage,
    summarize_shadows,
)
from calipers.calibration.targets import has_global_scale, schemes_by_target
from calipers.checkpoint.opening import load_model, load_tokenizer
from calipers.checkpoint.replace import recover
from calipers.cli import options
from calipers.cli.console import plain_errors, print_json, print_lines, print_table, show_progress
from calipers.cli.judging import (
    Measured,
    change_json,
    figure_json,
    figure_text,
    json_number,
    measure,
    measures_json,
    reference_for,
)
from calipers.cli.merge import refuse_existing
from calipers.cli.models import find_processor
from calipers.cli.runs import RunResult, check_runs, execute, judge_schemes, plan_runs
from calipers.cli.schemes import DEFAULT_SCHEME, choose_group_size
from calipers.cli.texts import TokenizedText, calibration_text, heldout_text
from calipers.demo import MODEL_PATH
from calipers.errors import CalipersError
from calipers.evaluation import Perplexity
from calipers.observers import Observer
from calipers.reports.file import tell_report
from calipers.reports.page import render_page
from calipers.reports.plot import new_figure
from calipers.text.for_model import fitting_length

__all__ = ["Comparison", "compare", "comparison_json", "print_comparison"]

_OBSERVERS = ("memoryless_minmax", "optimal:objective=imatrix", "optimal")
#: What `--observers all` means: of observers that find the same scale for a weight, one.
_ALL = (
    *("optimal", "optimal:objective=imatrix", "imatrix_mse", "memoryless_mse"),
    "memoryless_minmax",
)
_ALL_OF_NVFP4 = ("nvfp4_headroom", "nvfp4_expanded_mse", "nvfp4_expanded_imatrix")


def compare(
    model: options.ModelFolder = None,
    scheme: Annotated[
        list[str] | None,
        typer.Option(help="A preset or a YAML file; may be repeated. Default: W4A16."),
    ] = None,
    group_size: options.GroupSize = None,
    kv_cache: options.KVCache = None,
    observer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[:KEY=VALUE,...]",
            help="Observer of weights, with options of its own; may be repeated. "
            "Default: memoryless_minmax, optimal:objective=imatrix and optimal.",
        ),
    ] = None,
    observers: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Names with commas, or all: observers of weights that are compared in one pass "
            "over the data. The first quantizes, the others are its shadows.",
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE", help="An option of all observers that have it; may be repeated."
        ),
    ] = None,
    activation_observer: options.ActivationObserver = None,
    shadow: options.Shadow = None,
    activation_shadow: options.ActivationShadow = None,
    pick: options.Pick = "first",
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
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write a page about the runs here; see calipers report."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE if it exists.")] = False,
    json: options.Json = False,
) -> None:
    """Quantize a model under each scheme with each observer, and compare the results.

    No checkpoint is written. Models without a language head are judged by their output error.

    Examples:
      calipers compare ./model --scheme W4A16 --scheme NVFP4

      calipers compare ./model --observer imatrix_mse --observer optimal --data text.jsonl

      calipers compare ./model --observer imatrix_mse --observer optimal:negative_scales=true

      calipers compare ./model --scheme FP8_DYNAMIC --scheme UNQUANTIZED --kv-cache fp8

      calipers compare ./model --observer optimal --shadow mse --shadow imatrix_mse --pick best

      calipers compare ./model --observers all --out page.html
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
        if out is not None:
            refuse_existing(out, force=force)
            new_figure(1, 1)  # says at once where there is no matplotlib
        chosen = observer or list(_OBSERVERS)
        if observers is not None:
            if observer or shadow:
                raise CalipersError("--observers: expected alone, without --observer and --shadow")
            chosen, shadow = _in_one_pass(observers, schemes)
        shadows = Shadows.read(shadow or (), activation_shadow or (), pick)
        plan = partial(plan_runs, schemes, chosen, option or [])
        runs = plan(group_size, kv_cache, shadows)
        for run in runs:
            resolve_config(run.scheme, patterns)
        loaded = load_model(path, device=device, dtype=dtype)
        size_note = None
        with separated_experts(loaded):
            if scheme is None and group_size is None and on_unfit == "error":
                group_size, size_note = choose_group_size(loaded, patterns, part)
                runs = plan(group_size, kv_cache, shadows)
            runs = check_runs(loaded, runs, activation_observer, patterns, on_unfit, part)
        tokenizer = load_tokenizer(path)
        length = fitting_length(loaded, sequence_length)
        read = texts.read(tokenizer, length, samples, find_processor(path), loaded.dtype)
        judged = judged_texts.read(tokenizer, length, eval_samples)
        reference = reference_for(judged.batches)
        before = measure(loaded, judged.batches, progress, reference.keep)
        size = loaded.get_memory_footprint()
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
            reference,
            progress,
            ignore=patterns,
            only=part,
            on_unfit=on_unfit,
            activation_observer=activation_observer,
        )
        verdicts = judge_schemes(results, patterns)
    name = "demo" if model is None else str(model)
    comparison = Comparison(name, read, judged, before, size, results, verdicts, size_note)
    if out is not None:
        with replacing(out) as beside:
            beside.write_text(render_page(_told(comparison)), encoding="utf-8")
    if json:
        print_json(comparison_json(comparison))
    else:
        print_comparison(f"{name}, quantized and judged", comparison)


def _in_one_pass(observers: str, schemes: Sequence[str]) -> tuple[list[str], list[str]]:
    """The observer that quantizes, and those that look at the same tensors."""
    names = [each.strip() for each in observers.split(",") if each.strip()]
    if names == ["all"]:
        names = list(_ALL)
        groups = (schemes_by_target(resolve_config(each)).values() for each in schemes)
        if any(each.weights and has_global_scale(each.weights) for own in groups for each in own):
            names += _ALL_OF_NVFP4
        names += [each for each in Observer.registered_names() if _is_of_a_plugin(each)]
    if len(names) < 2:
        raise CalipersError(f"--observers: expected 'all', or several names, got {observers!r}")
    return names[:1], names[1:]


def _is_of_a_plugin(name: str) -> bool:
    return not Observer.get_value_from_registry(name).__module__.startswith("calipers.")


def _told(comparison: Comparison) -> dict[str, dict[str, Any]]:
    """The reports of all runs by their labels, for a page."""
    return {
        f"{each.run.scheme}, {each.run.name}": tell_report(
            each.report,
            model=comparison.model,
            scheme=each.run.scheme,
            observer=each.run.observer,
            options=each.run.options,
            measures=_measures(comparison, each),
        )
        for each in comparison.results
    }


def _measures(comparison: Comparison, result: RunResult) -> dict[str, Any] | None:
    return measures_json(comparison.before, result.after, result.change, result.agreement)


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
                "kv_cache": each.run.cache,
                "weight_error": json_number(each.weight_error),
                "perplexity": figure_json(each.after),
                **change_json(each.change),
                "measures": _measures(comparison, each),
                "bytes": each.bytes,
                "seconds": each.seconds,
                "shadows": [asdict(row) for row in summarize_shadows(each.report)],
                "coverage": [layer.to_dict() for layer in each.report.coverage],
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
    for each in results:
        if shadows := shadow_cells(summarize_shadows(each.report)):
            heads = shadow_headings(each.report)
            whose = f"Observers of the same tensors: {each.run.scheme}, {each.run.name}"
            print_table(whose, heads, shadows, right=heads[2:])
    lines = [("calibrated with", str(comparison.data)), ("judged by", str(comparison.judged))]
    sizes = {each.run.scheme_options.get("group_size") for each in results} - {None}
    if sizes:
        lines.insert(0, ("group size", comparison.size_note or str(sizes.pop())))
    caches = dict.fromkeys(each.run.cache for each in results)
    lines += [("cache", word) for word in caches if word]
    experts = dict.fromkeys(text for r in results for text in summarize_coverage(r.report.coverage))
    lines += [("experts", text) for text in experts]
    print_lines([*lines, *comparison.verdicts.items()])
