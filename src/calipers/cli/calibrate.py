"""`calipers calibrate`: a model in, a compressed-tensors checkpoint and a table out."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from compressed_tensors.quantization import QuantizationConfig
from rich.filesize import decimal

from calipers.calibration import (
    Calibration,
    CalibrationReport,
    resolve_config,
)
from calipers.calibration.calibrate import refuse_without_data
from calipers.calibration.choice import ObserverChoice
from calipers.calibration.group_sizes import suggest_group_size
from calipers.calibration.kinds import list_kinds
from calipers.calibration.module_checks import find_shape_problems
from calipers.calibration.plan import plan_observers, without_modules, without_never_called
from calipers.calibration.report_text import summarize_left_alone, summarize_modules
from calipers.calibration.session import check_on_missing
from calipers.calibration.targets import resolve_modules
from calipers.checkpoint import compressed_size, save
from calipers.checkpoint.load_check import refuse_unloadable
from calipers.checkpoint.replace import recover
from calipers.checkpoint.save import refuse_taken
from calipers.checkpoint.source import refuse_source
from calipers.cli.console import plain_errors, print_json, print_lines, print_table, show_progress
from calipers.cli.judging import Change, change_json, change_text, compare_measured, measure
from calipers.cli.models import load_model, load_tokenizer, model_bytes, peak_memory_bytes
from calipers.cli.options import ActivationObserver, DataSamples, Device, Dtype, SequenceLength
from calipers.cli.plugins import Plugins, load_plugins
from calipers.demo import CALIBRATION_TEXT, HELDOUT_TEXT, MODEL_PATH
from calipers.errors import CalipersError
from calipers.evaluation import OutputError, Perplexity
from calipers.text import read_batches
from calipers.text.for_model import batches_for_model, fitting_length
from calipers.verdict import output_verdict, verdict

__all__ = ["calibrate"]

_DEFAULT_SCHEME = "W4A16"


def calibrate(
    model: Annotated[
        Path | None,
        typer.Argument(help="A local transformers directory; left out: the embedded demo model."),
    ] = None,
    scheme: Annotated[
        str | None,
        typer.Option(
            help="A preset (see `calipers schemes`) or a YAML file. Default: W4A16, in a group "
            "size that divides the columns of all modules."
        ),
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(
            min=1, help="Columns of a group of weights. Default: the scheme's (W4A16: 128)."
        ),
    ] = None,
    observer: Annotated[
        str | None,
        typer.Option(
            help="Observer of weights (see `calipers observers`). "
            "Default: the scheme's, else optimal with data, memoryless_minmax without."
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="An option of the observer; may be repeated."),
    ] = None,
    activation_observer: ActivationObserver = None,
    plugin: Plugins = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Calibration data: .txt, .jsonl, .json, .csv, .parquet or a folder saved by "
            "datasets (FOLDER:SPLIT). Default for the demo model: its own text.",
        ),
    ] = None,
    samples: DataSamples = 128,
    sequence_length: SequenceLength = 512,
    ignore: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Module name, class name or re:REGEX to leave alone, with all it contains; "
            "may be repeated. Output heads and routers are left alone in any case.",
        ),
    ] = None,
    on_missing: Annotated[
        str,
        typer.Option(help="Modules that see no data: error, skip (leave unquantized) or fallback."),
    ] = "error",
    on_unfit: Annotated[
        str,
        typer.Option(
            help="Modules whose columns the group size does not divide, or that --out could not "
            "be loaded back with: error, skip."
        ),
    ] = "error",
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where to write the checkpoint.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace DIR if it exists.")] = False,
    no_load_check: Annotated[
        bool,
        typer.Option(
            "--no-load-check",
            help="Do not try first, on a small twin of the model, whether DIR would load back.",
        ),
    ] = False,
    eval_file: Annotated[
        Path | None,
        typer.Option(
            "--eval",
            metavar="FILE",
            help="Text to judge by, before and after. "
            "Default for the demo model: its held-out text.",
        ),
    ] = None,
    worst: Annotated[
        int, typer.Option(min=0, help="How many modules of the largest weight errors to show.")
    ] = 5,
    device: Device = None,
    dtype: Dtype = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Quantize a model and write a checkpoint that transformers and vLLM load.

    Examples:
      calipers calibrate

      calipers calibrate ./Llama-3-8B --scheme W4A16 --out ./Llama-3-8B-W4A16

      calipers calibrate ./Llama-3-8B --observer imatrix_mse --data text.jsonl --eval heldout.txt

      calipers calibrate ./Llama-3-8B --scheme FP8 --data text.txt --samples 256 --json

      calipers calibrate --observer memoryless_mse --option norm=2 --option maxshrink=0.3

      calipers calibrate --plugin my_observers.py --observer my_observer
    """
    with plain_errors(), show_progress() as progress:
        started = time.perf_counter()
        # Whatever can be refused is refused before the model is loaded, or at least before it runs.
        path = MODEL_PATH if model is None else model
        recover(path.expanduser().resolve())
        if out is not None:
            refuse_source(out, path)
            refuse_taken(out, force=force)
        check_on_missing(on_missing)
        load_plugins(plugin)
        options = parse_options(option or [])
        patterns = tuple(ignore or ())
        scheme_options = {} if group_size is None else {"group_size": group_size}
        resolve_config(scheme or _DEFAULT_SCHEME, patterns, scheme_options)
        if model is None:
            data, eval_file = data or CALIBRATION_TEXT, eval_file or HELDOUT_TEXT
        choice = ObserverChoice(observer, activation_observer, options, data is not None)
        choice.check()
        loaded, tokenizer = load_model(path, device=device, dtype=dtype), None
        size_note = None
        if scheme is None and group_size is None and on_unfit == "error":
            group_size, size_note = choose_group_size(loaded, patterns)
            scheme_options = {} if group_size is None else {"group_size": group_size}
        plan = plan_observers(
            loaded,
            scheme or _DEFAULT_SCHEME,
            choice,
            patterns,
            on_unfit,  # type: ignore[arg-type]  # checked there
            scheme_options,
        )
        if out is not None and not no_load_check:
            schemes = {each.name: each.scheme for each in plan.resolution.targets}
            unloadable = refuse_unloadable(loaded, schemes, skip=on_unfit == "skip")
            plan = without_modules(plan, unloadable, "cannot be loaded back")
        length = fitting_length(loaded, sequence_length)
        if data is not None or eval_file is not None:
            tokenizer = load_tokenizer(path)
        batches = None
        if data is not None:
            batches = batches_for_model(
                data, loaded, tokenizer, samples=samples, sequence_length=sequence_length
            )
        else:
            refuse_without_data(plan.observed)
            plan = without_never_called(loaded, plan)
        judged = None
        if eval_file is not None:
            judged = read_batches(eval_file, tokenizer, sequence_length=length)
        size_before = model_bytes(loaded)
        before = None if judged is None else measure(loaded, judged, progress)
        with Calibration(loaded, plan) as calibration:
            if batches is not None:
                calibration.run(batches, progress)
            report = calibration.freeze(on_missing, progress)  # type: ignore[arg-type]  # checked
        after = None if judged is None else measure(loaded, judged, progress)
        change = None
        if before is not None and after is not None:
            change = compare_measured(before, after)
        if out is not None:
            save(loaded, out, tokenizer=tokenizer, force=force, load_check=False)
        result = {
            "model": "demo" if model is None else str(model),
            "scheme": scheme or _DEFAULT_SCHEME,
            "group_size": group_size,
            "out": None if out is None else str(out),
            "perplexity_before": before.value if isinstance(before, Perplexity) else None,
            "perplexity_after": after.value if isinstance(after, Perplexity) else None,
            **change_json(change),
            "verdict": None if change is None else in_words(plan.config, change, report),
            "bytes_before": size_before,
            "bytes_after": compressed_size(loaded) if report.modules else size_before,
            "seconds": time.perf_counter() - started,
            "peak_memory_bytes": peak_memory_bytes(),
            "calibration": report.to_dict(),
        }
    if json:
        print_json(result)
    else:
        print_result(result, report, worst, size_note, change)


def in_words(config: QuantizationConfig, change: Change, report: CalibrationReport) -> str:
    """The verdict on a calibration."""
    objectives = {each.objective for each in report.modules}
    objective = objectives.pop() if len(objectives) == 1 else None
    if isinstance(change, OutputError):
        return output_verdict(config, change.value, change.standard_error, objective=objective)
    return verdict(config, change.relative, change.relative_error, objective=objective)


def choose_group_size(model: Any, patterns: tuple[str, ...]) -> tuple[int | None, str | None]:
    """A group size for the default scheme, where its own does not fit all modules.

    Returns:
        The size, and what to say about it; None and None where the scheme's own fits, or none does.
    """
    targets = resolve_modules(model, resolve_config(_DEFAULT_SCHEME, patterns)).targets
    unfit = [each.name for each in targets if any(find_shape_problems(each))]
    size = suggest_group_size(targets) if unfit else None
    if size is None:
        return None, None
    kinds = list_kinds(unfit)
    return size, f"{size}, since 128 does not divide the columns of {kinds}"


def print_result(
    result: dict[str, Any],
    report: CalibrationReport,
    worst: int,
    size_note: str | None,
    change: Change | None,
) -> None:
    """Print the tables of a calibration."""
    print_table(
        f"{result['model']}, scheme {result['scheme']}",
        ("modules", "count", "observer", "bits", "relative weight error", "activations", "tokens"),
        module_rows(report),
        right=("count", "bits", "tokens"),
    )
    print_worst(report, worst)
    lines = []
    if result["group_size"] is not None:
        lines.append(("group size", size_note or str(result["group_size"])))
    if isinstance(change, OutputError):
        lines.append(("output error", change_text(change)))
    elif change is not None:
        figures = f"{result['perplexity_before']:.3f} -> {result['perplexity_after']:.3f}"
        lines.append(("perplexity", f"{figures} ({change_text(change)})"))
    if change is not None:
        lines.append(("verdict", result["verdict"]))
    before, after = result["bytes_before"], result["bytes_after"]
    lines += [
        ("size", f"{decimal(before)} -> {decimal(after)} ({after / before:.0%})"),
        ("time", f"{result['seconds']:.1f} s, of it {report.seconds:.1f} s calibration"),
        ("peak memory", decimal(result["peak_memory_bytes"])),
    ]
    lines.append(("quantized", f"{report.quantized_share:.1%} of the projection weights"))
    lines += [("left unquantized", text) for text in summarize_left_alone(report.left_alone)]
    lines.append(("checkpoint", result["out"] or "not written (no --out)"))
    print_lines(lines)


def print_worst(report: CalibrationReport, count: int) -> None:
    """Print the modules of the largest weight errors, where there are more than these."""
    found = report.worst(count)
    if found and len(report.modules) > 1:
        print_table(
            "The largest weight errors",
            ("module", "relative weight error"),
            [(row.name, f"{row.weight_error:.4f}") for row in found],
            right=("relative weight error",),
        )


def module_rows(report: CalibrationReport) -> list[tuple[str, ...]]:
    """One row for all modules whose names differ by numbers alone and that were treated alike."""
    rows: list[tuple[str, ...]] = []
    for kind in summarize_modules(report.modules):
        spread = "-"
        if kind.mean_error is not None:
            spread = f"{kind.mean_error:.4f} (at most {kind.max_error:.4f})"
        rows.append(
            (
                kind.name,
                str(kind.count),
                kind.observer or "-",
                "-" if kind.bits is None else str(kind.bits),
                spread,
                kind.activations or "-",
                str(kind.tokens),
            )
        )
    return rows


def parse_options(given: list[str]) -> dict[str, Any]:
    """Options of the form key=value; values are read as YAML scalars.

    Raises:
        CalipersError: One without a key or an equals sign, or of a value that is no scalar.
    """
    options = {}
    for item in given:
        key, equals, value = item.partition("=")
        if not key or not equals:
            raise CalipersError(f"--option: expected key=value, got {item!r}")
        try:
            options[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise CalipersError(f"--option: cannot read the value of {item!r}") from None
    return options
