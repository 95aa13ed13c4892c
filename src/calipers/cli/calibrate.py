"""`calipers calibrate`: a model in, a compressed-tensors checkpoint and a table out."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from rich.filesize import decimal

from calipers._words import check_choice, first_line
from calipers.calibration import CalibrationReport, resolve_config
from calipers.calibration.calibrate import run_plan
from calipers.calibration.checks import suggest_group_size
from calipers.calibration.config import has_free_group_size
from calipers.calibration.experts import separate_experts
from calipers.calibration.few_tokens import ENOUGH_TOKENS, ExpertPolicy
from calipers.calibration.module_checks import find_shape_problems
from calipers.calibration.plan import (
    ObserverChoice,
    plan_observers,
    refuse_without_data,
    without_modules,
)
from calipers.calibration.report import (
    summarize_coverage,
    summarize_left_alone,
    summarize_modules,
)
from calipers.calibration.session import OnMissing
from calipers.calibration.targets import resolve_modules
from calipers.checkpoint import compressed_size, save
from calipers.checkpoint.load_check import refuse_unloadable
from calipers.checkpoint.replace import recover
from calipers.checkpoint.save import refuse_taken
from calipers.checkpoint.source import refuse_source
from calipers.cli.console import plain_errors, print_json, print_lines, print_table, show_progress
from calipers.cli.judging import Change, change_json, change_text, compare_measured, measure
from calipers.cli.models import load_model, load_tokenizer, model_bytes, peak_memory_bytes
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
from calipers.cli.texts import Text, TokenizedText, calibration_text, heldout_text
from calipers.demo import MODEL_PATH
from calipers.errors import CalipersError, MissingDataError
from calipers.evaluation import OutputError, Perplexity
from calipers.text.for_model import fitting_length, model_inputs
from calipers.verdict import output_verdict, verdict

__all__ = ["DEFAULT_SCHEME", "calibrate", "choose_group_size", "parse_options"]

DEFAULT_SCHEME = "W4A16"


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
    group_size: GroupSize = None,
    observer: Annotated[
        str | None,
        typer.Option(
            help="Observer of weights (see `calipers observers`). "
            "Default: the scheme's, else optimal; memoryless_minmax with --no-data."
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="An option of the observer; may be repeated."),
    ] = None,
    activation_observer: ActivationObserver = None,
    plugin: Plugins = None,
    data: DataFile = None,
    no_data: Annotated[
        bool, typer.Option("--no-data", help="Calibrate without data: weights by themselves.")
    ] = False,
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
        str | None,
        typer.Option(
            help="Modules that see no data: error, skip (leave unquantized) or fallback. "
            "Default: error with --data, fallback with the embedded text."
        ),
    ] = None,
    on_few_tokens: Annotated[
        str,
        typer.Option(
            help="Experts that see few tokens: shrink (mix their statistics with those of all "
            "experts of the layer), pooled (take those), own or error."
        ),
    ] = "shrink",
    enough_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens from which an expert stands alone.")
    ] = ENOUGH_TOKENS,
    all_experts: Annotated[
        bool,
        typer.Option("--all-experts", help="Let every expert see every token while calibrating."),
    ] = False,
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
    eval_file: EvalFile = None,
    eval_samples: EvalSamples = 128,
    no_eval: Annotated[
        bool, typer.Option("--no-eval", help="Do not judge the model before and after.")
    ] = False,
    worst: Annotated[
        int, typer.Option(min=0, help="How many modules of the largest weight errors to show.")
    ] = 5,
    device: Device = None,
    dtype: Dtype = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Quantize a model, judge it, and write a checkpoint that transformers and vLLM load.

    Without a word on text, embedded text is used to calibrate and other embedded text to judge by.

    Examples:
      calipers calibrate

      calipers calibrate ./Llama-3-8B --out ./Llama-3-8B-W4A16

      calipers calibrate ./Llama-3-8B --scheme NVFP4 --data text.jsonl --eval heldout.txt

      calipers calibrate ./Llama-3-8B --option objective=hessian --samples 256 --json

      calipers calibrate ./Llama-3-8B --scheme FP8_DYNAMIC --no-data --no-eval --out ./fp8

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
        _refuse_both("--data", data, "--no-data", no_data)
        _refuse_both("--eval", eval_file, "--no-eval", no_eval)
        texts = None if no_data else calibration_text(data, demo=model is None)
        judged_texts = None if no_eval else heldout_text(eval_file, demo=model is None)
        missing = on_missing or ("error" if texts is None or texts.given else "fallback")
        check_choice("on_missing", missing, OnMissing)
        policy = ExpertPolicy(
            on_few_tokens,  # type: ignore[arg-type]  # checked there
            enough_tokens,
            all_experts,
        )
        load_plugins(plugin)
        options = parse_options(option or [])
        patterns = tuple(ignore or ())
        scheme_options = {} if group_size is None else {"group_size": group_size}
        resolve_config(scheme or DEFAULT_SCHEME, patterns, scheme_options)
        choice = ObserverChoice(observer, activation_observer, options, texts is not None)
        choice.check()
        loaded = load_model(path, device=device, dtype=dtype)
        put_experts_back = separate_experts(loaded)
        tokenizer, no_text = find_tokenizer(path, texts, judged_texts)
        if no_text is not None:
            texts = judged_texts = None
            choice = replace(choice, has_data=False)
        size_note = None
        if scheme is None and group_size is None and on_unfit == "error":
            group_size, size_note = choose_group_size(loaded, patterns)
            scheme_options = {} if group_size is None else {"group_size": group_size}
        plan = plan_observers(
            loaded,
            scheme or DEFAULT_SCHEME,
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
        read: TokenizedText | None = None
        if texts is not None:
            read = texts.read(tokenizer, sequence_length=length, samples=samples)
        else:
            try:
                refuse_without_data(plan)
            except MissingDataError as error:
                raise error if no_text is None else CalipersError(f"{path}: {no_text}") from None
        judged = None
        if judged_texts is not None:
            judged = judged_texts.read(tokenizer, sequence_length=length, samples=eval_samples)
        size_before = model_bytes(loaded)
        before = None if judged is None else measure(loaded, judged.batches, progress)
        batches = None if read is None else model_inputs(read.batches, loaded)
        report = run_plan(
            loaded,
            plan,
            batches,
            missing,  # type: ignore[arg-type]  # checked above
            progress,
            experts=policy,
        )
        put_experts_back()
        after = None if judged is None else measure(loaded, judged.batches, progress)
        change = None
        if before is not None and after is not None:
            change = compare_measured(before, after)
        if out is not None:
            save(loaded, out, force=force, load_check=False)
        used = read if report.batches else None
        result = {
            "model": "demo" if model is None else str(model),
            "scheme": scheme or DEFAULT_SCHEME,
            "group_size": group_size_of(plan.config),
            "out": None if out is None else str(out),
            "data": None if used is None else used.to_dict(),
            "eval": None if judged is None else judged.to_dict(),
            "no_text": no_text,
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
        print_result(result, report, worst, size_note, used, judged, change)


def _refuse_both(name: str, given: Path | None, other: str, refused: bool) -> None:
    if given is not None and refused:
        raise CalipersError(f"{name} {given} and {other} exclude each other")


def find_tokenizer(path: Path, *texts: Text | None) -> tuple[Any, str | None]:
    """The model's tokenizer where there is text to read, and why there is none.

    A model without a tokenizer is calibrated all the same where nobody named a text.

    Returns:
        The tokenizer or None; what is wrong with it or None.
    """
    wanted = [each for each in texts if each is not None]
    if not wanted:
        return None, None
    try:
        return load_tokenizer(path), None
    except Exception as error:  # whatever transformers and its plug-ins raise
        if any(each.given for each in wanted):
            raise CalipersError(
                f"{path}: text needs a tokenizer, and its own does not load: {first_line(error)}"
            ) from None
        return None, f"its tokenizer does not load: {first_line(error)}"


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
    targets = resolve_modules(model, resolve_config(DEFAULT_SCHEME, patterns)).targets
    unfit = [each.name for each in targets if any(find_shape_problems(each))]
    size = suggest_group_size(targets) if unfit else None
    if size is None:
        return None, None
    return size, (
        f"{size}, since 128 does not divide the columns of {len(unfit)} of {len(targets)} modules"
    )


def group_size_of(config: QuantizationConfig) -> int | None:
    """The size of the groups that weights are quantized in; None without groups, or with several.

    That of a format which fixes it (NVFP4, MXFP4) is not told: nobody chooses it.
    """
    weights = [
        each.weights
        for each in config.config_groups.values()
        if isinstance(each, QuantizationScheme) and each.weights is not None
    ]
    sizes = {each.group_size for each in weights if has_free_group_size(each)}
    return sizes.pop() if len(sizes) == 1 else None


def print_result(
    result: dict[str, Any],
    report: CalibrationReport,
    worst: int,
    size_note: str | None,
    data: TokenizedText | None,
    judged: TokenizedText | None,
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
    if data is not None:
        lines.append(("calibrated with", str(data)))
    if result["no_text"] is not None:
        lines.append(("no text", result["no_text"]))
    if judged is not None:
        lines.append(("judged by", str(judged)))
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
    lines += [("experts", text) for text in summarize_coverage(report.coverage)]
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
