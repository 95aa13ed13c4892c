"""`calipers quantize`: a checkpoint in, a quantized one out, without a model in memory."""

from __future__ import annotations

import time
from collections import Counter
from typing import Annotated, Any

import torch
import typer
from compressed_tensors.quantization import DynamicType, QuantizationArgs
from rich.filesize import decimal

from calipers._words import check_choice
from calipers.calibration import resolve_config
from calipers.calibration.experts import separated_experts
from calipers.calibration.few_tokens import ENOUGH_TOKENS, ExpertPolicy
from calipers.calibration.missing import OnMissing
from calipers.calibration.plan import ObserverChoice
from calipers.calibration.shadows import read_options
from calipers.calibration.summaries import summarize_left_alone
from calipers.calibration.targets import gather_experts, kind_of
from calipers.checkpoint.replace import recover
from calipers.checkpoint.save import refuse_taken
from calipers.checkpoint.source import refuse_source
from calipers.cli import options
from calipers.cli.console import plain_errors, print_json, print_lines, print_table, show_progress
from calipers.cli.models import peak_memory_bytes
from calipers.cli.ranks import RankTimeout, showing_life
from calipers.cli.schemes import (
    DEFAULT_SCHEME,
    choose_group_size,
    group_size_of,
    kv_cache_of,
    sized,
)
from calipers.demo import MODEL_PATH
from calipers.distributed import joined_ranks
from calipers.distributed.meeting import TIMEOUT
from calipers.errors import CalipersError
from calipers.statistics_files import Statistics
from calipers.streaming.plan import StreamPlan, plan_stream
from calipers.streaming.quantize import SHARD_BYTES, run_stream
from calipers.streaming.source import SourceCheckpoint
from calipers.streaming.statistics import Known

__all__ = ["quantize"]

_MEGABYTE = 10**6


def quantize(
    model: options.ModelFolder = None,
    scheme: options.Scheme = None,
    group_size: options.GroupSize = None,
    observer: Annotated[
        str | None,
        typer.Option(
            help="Observer of weights (see `calipers observers`). Default: the scheme's, else "
            "memoryless_minmax, with --statistics optimal."
        ),
    ] = None,
    option: options.ObserverOption = None,
    activation_observer: options.ActivationObserver = None,
    plugin: options.Plugins = None,
    statistics: options.StatisticsFile = None,
    kv_cache: options.KVCache = None,
    on_missing: Annotated[
        str,
        typer.Option(help="Modules that saw no data: error, skip (leave unquantized) or fallback."),
    ] = "error",
    on_few_tokens: options.OnFew = "shrink",
    enough_tokens: options.EnoughTokens = ENOUGH_TOKENS,
    ignore: options.Ignore = None,
    only: options.OnlyPart = None,
    on_unfit: options.OnUnfit = "error",
    out: options.Out = None,
    force: options.Force = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Say what would be done, with sizes, and write nothing."),
    ] = False,
    no_load_check: options.NoLoadCheck = False,
    shard_size: Annotated[
        int,
        typer.Option(min=1, metavar="MB", help="Most megabytes of a file of weights of DIR."),
    ] = SHARD_BYTES // _MEGABYTE,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    rank_timeout: RankTimeout = TIMEOUT,
    json: options.Json = False,
) -> None:
    """Quantize a checkpoint shard by shard; the model is never in memory, and no data is run.

    The tensors are those that calibrating writes without data, or with the same statistics. Killed
    or interrupted, the same command goes on after the shards that are complete. Under torchrun
    ranks share the work.

    Examples:
      calipers quantize ./Llama-3-70B --scheme FP8_DYNAMIC --out ./Llama-3-70B-FP8

      calipers quantize ./Llama-3-70B --observer optimal --option objective=mse --out ./int4

      calipers quantize ./Llama-3-70B --scheme FP8 --statistics stats.safetensors --out ./static

      calipers quantize ./Qwen3-235B-A22B --scheme NVFP4A16 --dry-run

      torchrun --nproc-per-node 8 --no-python calipers quantize ./Kimi-K2 --out ./Kimi-K2-int4
    """
    with (
        plain_errors(),
        show_progress() as shown,
        joined_ranks(rank_timeout) as ranks,
        ranks.telling_failure("quantizing a checkpoint"),
    ):
        started = time.perf_counter()
        progress = showing_life(ranks, shown)
        path = MODEL_PATH if model is None else model
        if out is None and not dry_run:
            raise CalipersError("--out DIR says where to write; --dry-run writes nothing")
        if ranks.rank == 0:
            recover(path.expanduser().resolve())
        ranks.meet("starting")
        if out is not None:
            refuse_source(out, path)
            refuse_taken(out, force=force)
        part = options.known_part(only)
        options.load_plugins(plugin)
        patterns = tuple(ignore or ())
        resolve_config(scheme or DEFAULT_SCHEME, patterns, sized(group_size), kv_cache)
        chosen = read_options(option or [], "--option")
        choice = ObserverChoice(observer, activation_observer, chosen, statistics is not None)
        choice.check()
        check_choice("--on-missing", on_missing, OnMissing)
        policy = ExpertPolicy(on_few_tokens, enough_tokens)  # type: ignore[arg-type]  # checked there
        known = None
        if statistics is not None:
            known = Known(Statistics.load(statistics), on_missing, policy)  # type: ignore[arg-type]
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        source = SourceCheckpoint(path, dtype)
        size_note = None
        if scheme is None and group_size is None and on_unfit == "error":
            with separated_experts(source.model):
                group_size, size_note = choose_group_size(source.model, patterns, part)
        plan = plan_stream(
            source,
            scheme or DEFAULT_SCHEME,
            choice,
            patterns,
            on_unfit,  # type: ignore[arg-type]  # checked there
            sized(group_size),
            kv_cache,
            part,
            known=known,
            load_check=not no_load_check,
            shard_bytes=shard_size * _MEGABYTE,
            ranks=ranks,
        )
        known = None  # the observers know
        resumed = None
        if out is not None and not dry_run:
            resumed = run_stream(plan, out, ranks, force=force, device=place, progress=progress)
        if ranks.rank:
            return
        result = {
            "model": "demo" if model is None else str(model),
            "scheme": scheme or DEFAULT_SCHEME,
            "group_size": group_size_of(plan.plan.config),
            "kv_cache": kv_cache_of(plan.plan.config),
            "statistics": None if statistics is None else str(statistics),
            "modules": _kinds(plan),
            "left_alone": summarize_left_alone(
                gather_experts(source.model, plan.plan.resolution.left_alone)
            ),
            "shards": [
                {"file": each.name, "bytes_read": each.bytes_read, "bytes": each.bytes_written}
                for each in plan.shards
            ],
            "bytes_before": plan.bytes_read,
            "bytes_after": plan.bytes_written,
            "out": None if resumed is None else str(out),
            "resumed": resumed,
            "seconds": time.perf_counter() - started,
            "peak_memory_bytes": peak_memory_bytes(),
        }
    if json:
        print_json(result)
    else:
        _print(result, size_note)


def _kinds(plan: StreamPlan) -> list[dict[str, Any]]:
    """Quantized modules by the pattern of their names."""
    kinds: Counter[tuple[str, str, str, str]] = Counter()
    for each in plan.plan.observed:
        weight = each.weight_observer
        chosen = "-" if weight is None else str(weight.args.observer)
        weights, inputs = _said(each.scheme.weights), _said(each.scheme.input_activations)
        kinds[(kind_of(each.name), chosen, weights, inputs)] += 1
    keys = ("pattern", "observer", "weights", "inputs")
    return [{**dict(zip(keys, kind, strict=True)), "count": count} for kind, count in kinds.items()]


def _said(args: QuantizationArgs | None) -> str:
    if args is None:
        return "-"
    kind, strategy = (getattr(each, "value", each) for each in (args.type, args.strategy))
    size = f" of {args.group_size}" if args.group_size else ""
    how = ""
    if args.dynamic:
        how = "local " if args.dynamic == DynamicType.LOCAL else "dynamic "
    return f"{kind}{args.num_bits}, {how}{strategy}{size}"


def _print(result: dict[str, Any], size_note: str | None) -> None:
    print_table(
        f"{result['model']}, scheme {result['scheme']}",
        ("modules", "count", "observer", "weights", "inputs"),
        [
            (each["pattern"], str(each["count"]), each["observer"], each["weights"], each["inputs"])
            for each in result["modules"]
        ],
        right=("count",),
    )
    if result["out"] is None:
        print_table(
            "Files of weights",
            ("file", "read", "written"),
            [
                (each["file"], decimal(each["bytes_read"]), decimal(each["bytes"]))
                for each in result["shards"]
            ],
            right=("read", "written"),
        )
    before, after = result["bytes_before"], result["bytes_after"]
    size = result["group_size"]
    resumed = result["resumed"]
    lines = [
        ("statistics", result["statistics"]),
        ("group size", size and (size_note or str(size))),
        ("size", f"{decimal(before)} -> {decimal(after)} ({after / max(1, before):.0%})"),
        ("time", f"{result['seconds']:.1f} s"),
        ("peak memory", decimal(result["peak_memory_bytes"])),
        ("went on after", f"{resumed} of {len(result['shards'])} files" if resumed else None),
        *(("left unquantized", text) for text in result["left_alone"]),
        ("checkpoint", result["out"] or "not written (--dry-run)"),
    ]
    print_lines((name, text) for name, text in lines if text is not None)
