"""`calipers plan`: a scheme for each module within a budget of bits; a file for `--scheme`."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.filesize import decimal

from calipers._words import check_choice
from calipers.checkpoint.opening import load_model, load_tokenizer
from calipers.cli import options
from calipers.cli.console import (
    plain_errors,
    print_json,
    print_lines,
    print_table,
    show_progress,
)
from calipers.cli.models import peak_memory_bytes
from calipers.cli.texts import calibration_text
from calipers.demo import MODEL_PATH
from calipers.errors import CalipersError
from calipers.planning import SchemePlan, plan_schemes
from calipers.planning.candidates import read_candidates
from calipers.planning.plan import summarize
from calipers.planning.sensitivity import Sensitivity
from calipers.text.for_model import fitting_length, model_inputs

__all__ = ["plan"]

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def plan(
    model: options.ModelFolder = None,
    candidates: Annotated[
        str, typer.Option(metavar="NAMES", help="Schemes of weights to choose from, with commas.")
    ] = "W4A16,W8A16",
    group_size: options.GroupSize = None,
    bits: Annotated[
        float | None,
        typer.Option(help="Most bits a weight on average, scales and zero points counted."),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            "--bytes", metavar="SIZE", help="Most bytes of all these weights, as 90MB, or --bits."
        ),
    ] = None,
    sensitivity: Annotated[
        str,
        typer.Option(
            help="What weighs errors: kl (logits, each unit quantized alone) or residual (relative "
            "to the residual stream; no further pass)."
        ),
    ] = "kl",
    data: options.DataFile = None,
    samples: options.DataSamples = 128,
    sequence_length: options.SequenceLength = 512,
    ignore: options.Ignore = None,
    only: options.OnlyPart = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where to write the scheme (.yaml).")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE if it exists.")] = False,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    json: options.Json = False,
) -> None:
    """Choose a scheme for each module, so that all fit a budget and harm the model least.

    Layers that engines fuse get one scheme, and so do all experts of a layer.

    Examples:
      calipers plan --bits 6 --group-size 32

      calipers plan ./Llama-3-8B --bits 4.5 --group-size 64 --out scheme.yaml

      calipers plan ./Llama-3-8B --candidates W4A16,W8A16,NVFP4A16 --bytes 4.2GB --out scheme.yaml

      calipers calibrate ./Llama-3-8B --scheme scheme.yaml --out ./Llama-3-8B-mixed
    """
    with plain_errors(), show_progress() as progress:
        started = time.perf_counter()
        path = MODEL_PATH if model is None else model
        check_choice("--sensitivity", sensitivity, Sensitivity)
        read_candidates(candidates, group_size)
        most = None if size is None else read_size(size)
        if (bits is None) == (most is None):
            raise CalipersError("budget: expected one of --bits and --bytes")
        if out is not None and out.exists() and not force:
            raise CalipersError(f"{out} exists: choose another place, or replace it with --force")
        text = calibration_text(data, demo=model is None)
        part = options.known_part(only)
        loaded = load_model(path, device=device, dtype=dtype)
        read = text.read(load_tokenizer(path), fitting_length(loaded, sequence_length), samples)
        name = "demo" if model is None else str(model)
        found = plan_schemes(
            loaded,
            model_inputs(read.batches, loaded),
            candidates,
            bits=bits,
            bytes=most,
            group_size=group_size,
            sensitivity=sensitivity,  # type: ignore[arg-type]  # checked
            ignore=tuple(ignore or ()),
            only=part,
            progress=progress,
            head={"model": name, "data": str(read), "candidates": candidates},
        )
        if out is not None:
            found.write(out, force=force)
        result: dict[str, Any] = {
            "model": name,
            "out": None if out is None else str(out),
            "data": read.to_dict(),
            "candidates": candidates,
            "group_size": group_size,
            **found.to_dict(),
            "seconds": time.perf_counter() - started,
            "peak_memory_bytes": peak_memory_bytes(),
        }
    if json:
        print_json(result)
    else:
        print_plan(result, found, str(read))


def read_size(text: str) -> float:
    """Bytes of "90MB" (of 10^6 bytes), "1.5GB" or "90000000".

    Raises:
        CalipersError: Something else.
    """
    word = text.strip().upper()
    unit = next((each for each in ("KB", "MB", "GB", "TB") if word.endswith(each)), "")
    try:
        value = float(word.removesuffix(unit)) * _UNITS[unit]
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise CalipersError(f"--bytes: expected a size such as 90MB or 1.5GB, got {text!r}")
    return value


def print_plan(result: dict[str, Any], found: SchemePlan, data: str) -> None:
    """Print a plan: kinds of modules by scheme, and figures."""
    print_table(
        f"{result['model']}, {result['candidates']}",
        ("modules", "scheme", "count", "bits", "relative output error", "cost"),
        [
            (kind, scheme, str(count), f"{bits:.3f}", f"{error:.4f}", f"{cost:.3g}")
            for kind, scheme, count, bits, error, cost in summarize(found)
        ],
        right=("count", "bits", "relative output error", "cost"),
    )
    left_out = [each for each in found.choices if each.left_out]
    lines = [
        ("bits", f"{result['bits']:.4f} a weight of at most {result['budget_bits']:.4f}"),
        ("size", decimal(int(result["bytes"]))),
        ("predicted cost", f"{result['cost']:.4g}, by the sensitivity {result['sensitivity']}"),
        ("data", data),
        *(
            ("left out", f"{name} for {each.name}: {why}")
            for each in left_out[:3]
            for name, why in each.left_out.items()
        ),
        ("left out", f"and for {len(left_out) - 3} more" if len(left_out) > 3 else None),
        ("time", f"{result['seconds']:.1f} s"),
        ("peak memory", decimal(result["peak_memory_bytes"])),
        ("scheme", result["out"] or "not written (no --out)"),
    ]
    print_lines((name, text) for name, text in lines if text is not None)
