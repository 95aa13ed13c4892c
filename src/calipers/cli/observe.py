"""`calipers observe`: data runs once, without a scheme; a statistics file comes out."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.filesize import decimal

from calipers.checkpoint.opening import load_model, load_tokenizer
from calipers.checkpoint.source import refuse_source
from calipers.cli import options
from calipers.cli.console import plain_errors, print_json, print_lines, show_progress
from calipers.cli.models import peak_memory_bytes
from calipers.cli.texts import calibration_text
from calipers.demo import MODEL_PATH
from calipers.observing import observe as observe_model
from calipers.observing.observe import EVERY
from calipers.text.for_model import fitting_length, model_inputs

__all__ = ["observe"]


def observe(
    out: Annotated[
        Path, typer.Option(metavar="FILE", help="Where to write the statistics (.safetensors).")
    ],
    model: options.ModelFolder = None,
    data: options.DataFile = None,
    samples: options.DataSamples = 128,
    sequence_length: options.SequenceLength = 512,
    products: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="COLUMNS",
            help="Sum products of inputs too, by which optimal takes hessian in groups of so many "
            "columns; 0: for whole rows.",
        ),
    ] = None,
    histograms: Annotated[
        bool, typer.Option("--histograms", help="Count values too, for the observer histogram.")
    ] = False,
    outputs: Annotated[
        bool, typer.Option("--outputs", help="Watch outputs of layers as well.")
    ] = False,
    kv: Annotated[
        bool, typer.Option("--kv", help="Watch keys and values, for a quantized cache.")
    ] = False,
    queries: Annotated[
        bool, typer.Option("--queries", help="Watch queries as well as keys and values.")
    ] = False,
    ignore: options.Ignore = None,
    include: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Exact name of a layer that is left alone otherwise, as an output head; may be "
            "repeated.",
        ),
    ] = None,
    only: options.OnlyPart = None,
    all_experts: Annotated[
        bool, typer.Option("--all-experts", help="Let every expert see every token.")
    ] = False,
    every: Annotated[
        float,
        typer.Option(min=0, metavar="SECONDS", help="Time between two checkpoints of the run."),
    ] = EVERY,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE if it exists.")] = False,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    json: options.Json = False,
) -> None:
    """Run data once, without a scheme, and keep what any scheme may ask for later.

    What is gathered so far is kept beside FILE: after a run was killed, the same command goes on.

    Examples:
      calipers observe ./Llama-3-8B --data text.jsonl --out stats.safetensors

      calipers observe ./Llama-3-8B --histograms --kv --out stats.safetensors

      calipers calibrate ./Llama-3-8B --statistics stats.safetensors --out ./Llama-3-8B-W4A16
    """
    with plain_errors(), show_progress() as progress:
        started = time.perf_counter()
        path = MODEL_PATH if model is None else model
        refuse_source(out, path)
        text = calibration_text(data, demo=model is None)
        part = options.known_part(only)
        loaded = load_model(path, device=device, dtype=dtype)
        read = text.read(load_tokenizer(path), fitting_length(loaded, sequence_length), samples)
        found = observe_model(
            loaded,
            model_inputs(read.batches, loaded),
            out,
            ignore=tuple(ignore or ()),
            include=tuple(include or ()),
            only=part,
            products=products,
            histograms=histograms,
            outputs=outputs,
            kv=kv,
            queries=queries,
            all_experts=all_experts,
            progress=progress,
            every=every,
            force=force,
            name=read.name,
        )
        unseen = [name for name, each in found.modules.items() if not each.tokens]
        result: dict[str, Any] = {
            "model": "demo" if model is None else str(model),
            "out": str(out),
            "bytes": out.stat().st_size,
            "data": read.to_dict(),
            "modules": len(found.modules),
            "without_tokens": unseen,
            "seconds": time.perf_counter() - started,
            "peak_memory_bytes": peak_memory_bytes(),
        }
    if json:
        print_json(result)
        return
    without = f", {len(unseen)} of them without any token" if unseen else ""
    print_lines(
        [
            ("statistics", f"{out}, {decimal(result['bytes'])}"),
            ("modules", f"{len(found.modules)}{without}"),
            ("gathered with", str(read)),
            ("time", f"{result['seconds']:.1f} s"),
            ("peak memory", decimal(result["peak_memory_bytes"])),
        ]
    )
