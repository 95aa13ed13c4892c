"""`calipers calibrate`: a model in, a compressed-tensors checkpoint and a table out."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.filesize import decimal

from calipers._words import check_choice, first_line
from calipers.agreement import Agreement
from calipers.calibration import CalibrationReport, resolve_config
from calipers.calibration.convergence import expect_limit, refuse_until_stable
from calipers.calibration.few_tokens import ENOUGH_TOKENS, ExpertPolicy
from calipers.calibration.plan import (
    ObserverChoice,
    refuse_beside_statistics,
    refuse_without_data,
)
from calipers.calibration.report import Stability
from calipers.calibration.session import OnMissing
from calipers.calibration.shadows import Shadows, read_options
from calipers.calibration.summaries import (
    measure_table,
    shadow_cells,
    shadow_headings,
    summarize_coverage,
    summarize_left_alone,
    summarize_modules,
    summarize_shadows,
)
from calipers.checkpoint.opening import load_tokenizer
from calipers.checkpoint.replace import recover
from calipers.checkpoint.save import refuse_taken
from calipers.checkpoint.source import refuse_source
from calipers.cli import options
from calipers.cli.console import plain_errors, print_json, print_lines, print_table, show_progress
from calipers.cli.judging import (
    Change,
    agreement_text,
    change_json,
    common_objective,
    compare_measured,
    figure_text,
    in_words,
    measure,
    measures_json,
    reference_for,
)
from calipers.cli.models import find_processor, peak_memory_bytes
from calipers.cli.ranks import RankTimeout, showing_life
from calipers.cli.schemes import (
    DEFAULT_SCHEME,
    choose_group_size,
    group_size_of,
    kv_cache_of,
    sized,
)
from calipers.cli.texts import Text, TokenizedText, calibration_text, heldout_text
from calipers.cli.ways import choose_way
from calipers.demo import MODEL_PATH
from calipers.distributed import joined_ranks, share_of_rank
from calipers.distributed.meeting import TIMEOUT
from calipers.errors import CalipersError, MissingDataError
from calipers.evaluation import Difference, OutputError, Perplexity
from calipers.reports import write_report
from calipers.reports.file import common_observer
from calipers.statistics_files import Statistics
from calipers.text.for_model import fitting_length, model_inputs

__all__ = ["calibrate"]

_NOT_JUDGED = "not: block by block the model is never whole; `calipers evaluate` judges it"


def calibrate(
    model: options.ModelFolder = None,
    scheme: options.Scheme = None,
    group_size: options.GroupSize = None,
    kv_cache: options.KVCache = None,
    observer: Annotated[
        str | None,
        typer.Option(
            help="Observer of weights (see `calipers observers`). "
            "Default: the scheme's, else optimal; memoryless_minmax with --no-data."
        ),
    ] = None,
    option: options.ObserverOption = None,
    activation_observer: options.ActivationObserver = None,
    shadow: options.Shadow = None,
    activation_shadow: options.ActivationShadow = None,
    pick: options.Pick = "first",
    plugin: options.Plugins = None,
    data: options.DataFile = None,
    no_data: Annotated[
        bool, typer.Option("--no-data", help="Calibrate without data: weights by themselves.")
    ] = False,
    statistics: options.StatisticsFile = None,
    samples: options.DataSamples = 128,
    sequence_length: options.SequenceLength = 512,
    ignore: options.Ignore = None,
    only: options.OnlyPart = None,
    on_missing: Annotated[
        str | None,
        typer.Option(
            help="Modules that see no data: error, skip (leave unquantized) or fallback. "
            "Default: error with --data, fallback with the embedded text."
        ),
    ] = None,
    on_few_tokens: options.OnFew = "shrink",
    enough_tokens: options.EnoughTokens = ENOUGH_TOKENS,
    all_experts: Annotated[
        bool,
        typer.Option("--all-experts", help="Let every expert see every token while calibrating."),
    ] = False,
    on_unfit: options.OnUnfit = "error",
    memory: Annotated[
        str,
        typer.Option(
            help="How much of the model is in memory: whole, blocks (one at a time; needs --out), "
            "or auto, which is whole where it fits."
        ),
    ] = "auto",
    propagate: Annotated[
        bool,
        typer.Option(
            "--propagate",
            help="Block by block, let each block see what the quantized ones before it give.",
        ),
    ] = False,
    until_stable: Annotated[
        float | None,
        typer.Option(
            help="End the data once no scale moves by this share or more while the tokens "
            "double: 0.01 is 1%. Default: all of the data."
        ),
    ] = None,
    out: options.Out = None,
    force: options.Force = False,
    no_load_check: options.NoLoadCheck = False,
    eval_file: options.EvalFile = None,
    eval_samples: options.EvalSamples = 128,
    no_eval: Annotated[
        bool, typer.Option("--no-eval", help="Do not judge the model before and after.")
    ] = False,
    worst: Annotated[
        int, typer.Option(min=0, help="How many modules of the largest weight errors to show.")
    ] = 5,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    rank_timeout: RankTimeout = TIMEOUT,
    json: options.Json = False,
) -> None:
    """Quantize a model, judge it, and write a checkpoint that transformers and vLLM load.

    Without a word on text, embedded text is used to calibrate and other embedded text to judge by.

    Examples:
      calipers calibrate

      calipers calibrate ./Llama-3-8B --out ./Llama-3-8B-W4A16

      calipers calibrate ./Llama-3-8B --scheme NVFP4 --data text.jsonl --eval heldout.txt

      calipers calibrate ./Llama-3-8B --scheme FP8_DYNAMIC --kv-cache fp8 --out ./fp8-cache

      calipers calibrate ./Llama-3-8B --option objective=imatrix --samples 256 --json

      calipers calibrate ./Llama-3-8B --shadow imatrix_mse --shadow mse --pick best

      calipers calibrate ./Llama-3-8B --scheme FP8_DYNAMIC --no-data --no-eval --out ./fp8

      calipers calibrate ./gemma-3-4b-it --only language --out ./gemma-3-4b-it-W4A16

      calipers calibrate ./Llama-3-8B --statistics stats.safetensors --out ./Llama-3-8B-W4A16

      calipers calibrate ./Llama-3-70B --memory blocks --out ./Llama-3-70B-W4A16

      calipers calibrate --plugin my_observers.py --observer my_observer

      torchrun --nproc-per-node 8 -m calipers calibrate ./Llama-3-70B --out ./Llama-3-70B-W4A16
    """
    with (
        plain_errors(),
        joined_ranks(rank_timeout) as ranks,
        ranks.telling_failure("calibrating"),
        show_progress() as shown,
    ):
        started = time.perf_counter()
        progress = showing_life(ranks, shown)
        # Whatever can be refused is refused before the model is loaded, or at least before it runs.
        path = MODEL_PATH if model is None else model
        if ranks.rank == 0:
            recover(path.expanduser().resolve())
        ranks.meet("starting")
        if out is not None:
            refuse_source(out, path)
            refuse_taken(out, force=force)
        _refuse_both("--data", data, "--no-data", no_data)
        _refuse_both("--eval", eval_file, "--no-eval", no_eval)
        known = None
        if statistics is not None:
            _refuse_both("--statistics", statistics, "--no-data", no_data)
            known = Statistics.load(statistics)
        without = no_data or known is not None
        texts = None if without else calibration_text(data, demo=model is None)
        judged_texts = None if no_eval else heldout_text(eval_file, demo=model is None)
        missing = on_missing or ("error" if texts is None or texts.given else "fallback")
        check_choice("on_missing", missing, OnMissing)
        policy = ExpertPolicy(
            on_few_tokens,  # type: ignore[arg-type]  # checked there
            enough_tokens,
            all_experts,
        )
        part = options.known_part(only)
        options.load_plugins(plugin)
        chosen = read_options(option or [], "--option")
        patterns = tuple(ignore or ())
        resolve_config(scheme or DEFAULT_SCHEME, patterns, sized(group_size), kv_cache)
        shadows = Shadows.read(shadow or (), activation_shadow or (), pick)
        if known is not None:
            refuse_beside_statistics(data is not None, shadows, all_experts)
        expect_limit(until_stable)
        has_data = texts is not None or known is not None
        choice = ObserverChoice(observer, activation_observer, chosen, has_data, shadows)
        choice.check()
        way = choose_way(
            path,
            memory,
            propagate=propagate,
            out=out,
            force=force,
            statistics=known is not None,
            judged=eval_file is not None,
            tokens=samples * sequence_length if texts is not None else 0,
            device=device,
            dtype=dtype,
            ranks=ranks,
        )
        loaded = way.model
        if until_stable is not None:
            refuse_until_stable(blocks=not way.runs_whole, statistics=known is not None)
        if not way.runs_whole:
            judged_texts = None
        if known is not None:
            known.refuse_other_model(loaded)
        tokenizer, no_text = find_tokenizer(path, texts, judged_texts)
        if no_text is not None:
            texts = judged_texts = None
            choice = replace(choice, has_data=known is not None)
        size_note = None
        if scheme is None and group_size is None and on_unfit == "error":
            group_size, size_note = choose_group_size(loaded, patterns, part)
        plan = way.plan(
            scheme or DEFAULT_SCHEME,
            choice,
            patterns,
            on_unfit,
            sized(group_size),
            kv_cache,
            part,
            load_check=out is not None and not no_load_check,
        )
        if texts is None and known is None:
            try:
                refuse_without_data(plan)
            except MissingDataError as error:
                raise error if no_text is None else CalipersError(f"{path}: {no_text}") from None
        length = fitting_length(loaded, sequence_length)
        media = find_processor(path), loaded.dtype
        read = None if texts is None else texts.read(tokenizer, length, samples, *media)
        # the first rank alone judges and writes
        judged = None
        if judged_texts is not None and ranks.rank == 0:
            judged = judged_texts.read(tokenizer, length, eval_samples)
        before = agreement = None
        if judged is not None:
            reference = reference_for(judged.batches)
            before = measure(loaded, judged.batches, progress, reference.keep)
        batches = None
        if read is not None:
            batches = model_inputs(share_of_rank(read.batches, ranks), loaded)
        report = way.run(
            plan,
            batches,
            statistics=known,
            on_missing=missing,
            progress=progress,
            experts=policy,
            **({} if until_stable is None else {"until_stable": until_stable}),
        )
        if ranks.rank:
            return
        after = None
        if judged is not None:
            after = measure(loaded, judged.batches, progress, reference.compare)
            agreement = reference.agreement()
        change = None if before is None or after is None else compare_measured(before, after)
        measures = measures_json(before, after, change, agreement)
        bytes_after = way.write(report)
        if out is not None:
            write_report(
                report,
                out.expanduser(),
                model="demo" if model is None else model,
                scheme=scheme or DEFAULT_SCHEME,
                observer=observer or common_observer(report),
                options=chosen,
                measures=measures,
            )
        used = read if report.batches else None
        result = {
            "model": "demo" if model is None else str(model),
            "scheme": scheme or DEFAULT_SCHEME,
            "group_size": group_size_of(plan.config),
            "kv_cache": kv_cache_of(plan.config),
            "out": None if out is None else str(out),
            "data": None if used is None else used.to_dict(),
            "statistics": None if statistics is None else str(statistics),
            "memory": "whole" if way.runs_whole else "blocks",
            "propagate": propagate,
            "eval": None if judged is None else judged.to_dict(),
            "no_text": no_text,
            "perplexity_before": before.value if isinstance(before, Perplexity) else None,
            "perplexity_after": after.value if isinstance(after, Perplexity) else None,
            **change_json(change),
            "measures": measures,
            "verdict": change and in_words(plan.config, change, common_objective(report)),
            "bytes_before": way.bytes_before,
            "bytes_after": bytes_after,
            "seconds": time.perf_counter() - started,
            "peak_memory_bytes": peak_memory_bytes(),
            "calibration": report.to_dict(),
        }
    if json:
        print_json(result)
    else:
        print_result(result, report, worst, size_note, used, judged, change, agreement)


def _settled(found: Stability) -> str:
    moved = "nothing was looked at" if found.moved is None else f"{found.moved:.2%} moved at last"
    if found.reached:
        return f"after {found.batches} batches, {found.tokens:,} tokens a module; {moved}"
    return f"no; {moved}" + (f", {found.slowest}" if found.slowest else "")


def _refuse_both(name: str, given: Path | None, other: str, refused: bool) -> None:
    if given is not None and refused:
        raise CalipersError(f"{name} {given} and {other} exclude each other")


def find_tokenizer(path: Path, *texts: Text | None) -> tuple[Any, str | None]:
    """The model's tokenizer or None, and what is wrong with it or None.

    A model without a tokenizer is calibrated all the same where nobody named a text.
    """
    wanted = [each for each in texts if each is not None]
    if not wanted:
        return None, None
    try:
        return load_tokenizer(path), None
    except Exception as error:  # whatever transformers and its plug-ins raise
        told = f"its tokenizer does not load: {first_line(error)}"
    if any(each.given for each in wanted):
        raise CalipersError(f"{path}: text needs a tokenizer, and {told}")
    return None, told


def print_result(
    result: dict[str, Any],
    report: CalibrationReport,
    worst: int,
    size_note: str | None,
    data: TokenizedText | None,
    judged: TokenizedText | None,
    change: Change | None,
    agreement: Agreement | None = None,
) -> None:
    """Print the tables of a calibration: kinds of modules, the worst of them, and figures."""
    error = "relative weight error"
    print_table(
        f"{result['model']}, scheme {result['scheme']}",
        ("modules", "count", "observer", "bits", error, "activations", "tokens"),
        [
            (
                kind.name,
                str(kind.count),
                kind.observer or "-",
                str(kind.bits or "-"),
                "-"
                if kind.mean_error is None
                else f"{kind.mean_error:.4f} (at most {kind.max_error:.4f})",
                kind.activations or "-",
                str(kind.tokens),
            )
            for kind in summarize_modules(report.modules)
        ],
        right=("count", "bits", "tokens"),
    )
    shadows = shadow_cells(summarize_shadows(report.modules))
    if shadows:
        heads = shadow_headings(report.modules)
        print_table("Observers of the same tensors", heads, shadows, right=heads[2:])
    heads, *rows = measure_table(report.worst(worst)) or [[]]
    if rows and len(report.modules) > 1:
        print_table("The largest weight errors", heads, rows, right=heads[1:])
    size = result["group_size"]
    figures = None if change is None else figure_text(change)
    kind = "output error" if isinstance(change, OutputError) else "perplexity"
    if isinstance(change, Difference):
        ends = f"{result['perplexity_before']:.3f} -> {result['perplexity_after']:.3f}"
        figures = f"{ends} ({figures})"
    before, after = result["bytes_before"], result["bytes_after"]
    lines = [
        ("group size", size and (size_note or str(size))),
        ("cache", result["kv_cache"]),
        ("calibrated with", str(data) if data else result.get("statistics")),
        ("no text", result["no_text"]),
        ("judged by", judged and str(judged)),
        ("judged", None if result["memory"] == "whole" else _NOT_JUDGED),
        (kind, figures),
        *zip(("KL divergence", "top-1 agreement"), agreement_text(agreement) or (), strict=False),
        ("verdict", change and result["verdict"]),
        ("size", f"{decimal(before)} -> {decimal(after)} ({after / before:.0%})"),
        ("settled", None if report.stability is None else _settled(report.stability)),
        ("time", f"{result['seconds']:.1f} s, of it {report.seconds:.1f} s calibration"),
        ("peak memory", decimal(result["peak_memory_bytes"])),
        ("quantized", f"{report.quantized_share:.1%} of the projection weights"),
        *(("experts", text) for text in summarize_coverage(report.coverage)),
        *(("left unquantized", text) for text in summarize_left_alone(report.left_alone)),
        ("checkpoint", result["out"] or "not written (no --out)"),
    ]
    print_lines((name, text) for name, text in lines if text is not None)
