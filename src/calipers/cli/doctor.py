"""`calipers doctor`: what calipers finds on this machine, and what it will use."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.filesize import decimal

from calipers.cli.console import plain_errors, print_json, print_lines, print_table
from calipers.cli.options import DataSamples, Device, Dtype, Json, SequenceLength
from calipers.engines.dispatch import (
    ENVIRONMENT,
    WORTH_BUILDING,
    choose_engine,
    explain_engines,
)
from calipers.engines.native.build import where
from calipers.streaming.sizes import Sizes, measure_sizes
from calipers.streaming.source import SourceCheckpoint

__all__ = ["doctor"]

_PACKAGES = ("calipers", "torch", "compressed-tensors", "transformers", "llmcompressor", "triton")


def doctor(
    model: Annotated[
        Path | None,
        typer.Argument(help="A local transformers directory, to say how it would be calibrated."),
    ] = None,
    samples: DataSamples = 128,
    sequence_length: SequenceLength = 512,
    dtype: Dtype = "auto",
    device: Device = None,
    json: Json = False,
) -> None:
    """Say which search engines there are, which one is chosen, and why.

    The native library is compiled where it is not there yet, so that the answer is not a guess. Of
    a model: which way `calipers calibrate --memory auto` takes, and the sizes that decide it.

    Examples:
      calipers doctor

      calipers doctor ./Llama-3-70B

      CALIPERS_ENGINE=eager calipers doctor

      calipers doctor --json
    """
    with plain_errors():
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        sizes = None
        if model is not None:
            sizes = measure_sizes(
                SourceCheckpoint(model, dtype).model, samples * sequence_length, place
            )
        engines = explain_engines(trial=True)
        chosen = choose_engine(place, values=WORTH_BUILDING)
        asked = os.environ.get(ENVIRONMENT)
        reason = f"{ENVIRONMENT}={asked}" if asked else "the fastest one that works here"
        folder, no_cache = where()
        packages = {name: _version(name) for name in _PACKAGES}
        devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if json:
        print_json(
            {
                "engine": chosen,
                "reason": reason,
                "engines": [
                    {"name": name, "usable": usable, "why": why} for name, usable, why in engines
                ],
                "cache": {"folder": folder, "problem": no_cache},
                "packages": packages,
                "python": platform.python_version(),
                "threads": torch.get_num_threads(),
                "gpus": devices,
                "model": None if sizes is None else sizes.to_dict(),
            }
        )
        return
    print_table(
        "Search engines",
        ("engine", "usable", "why"),
        [(name, "yes" if usable else "no", why) for name, usable, why in engines],
    )
    print_lines(
        [
            ("chosen", f"{chosen}: {reason}"),
            (
                "small work",
                f"eager on the CPU until {WORTH_BUILDING:,} values are searched or native built",
            ),
            ("native library", folder if no_cache is None else f"{folder}, since {no_cache}"),
            ("packages", ", ".join(f"{name} {found or '-'}" for name, found in packages.items())),
            ("python", platform.python_version()),
            ("threads", str(torch.get_num_threads())),
            ("GPUs", ", ".join(devices) or "none"),
        ]
    )
    if model is not None and sizes is not None:
        print_lines(_size_lines(model, sizes))


def _size_lines(model: Path, sizes: Sizes) -> list[tuple[str, str]]:
    return [
        ("model", str(model)),
        ("weights", decimal(sizes.model)),
        ("blocks", f"{sizes.blocks}, of at most {decimal(sizes.block)}"),
        ("outside of them", decimal(sizes.outside)),
        ("hidden states", f"{decimal(sizes.hidden)}, of all tokens, in front of a block"),
        ("free memory", decimal(sizes.free)),
        ("whole takes", f"about {decimal(sizes.whole)}"),
        ("blocks take", f"about {decimal(sizes.in_blocks)}"),
        ("memory auto", f"{sizes.way}: {sizes.reason}"),
    ]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
