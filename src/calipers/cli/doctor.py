"""`calipers doctor`: what calipers finds on this machine, and what it will use."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from calipers.cli.console import plain_errors, print_json, print_lines, print_table
from calipers.cli.options import Json
from calipers.engines.dispatch import (
    ENVIRONMENT,
    WORTH_BUILDING,
    choose_engine,
    explain_engines,
)
from calipers.engines.native.build import where

__all__ = ["doctor"]

_PACKAGES = ("calipers", "torch", "compressed-tensors", "transformers", "llmcompressor", "triton")


def doctor(json: Json = False) -> None:
    """Say which search engines there are, which one is chosen, and why.

    The native library is compiled where it is not there yet, so that the answer is not a guess.

    Examples:
      calipers doctor

      CALIPERS_ENGINE=eager calipers doctor

      calipers doctor --json
    """
    with plain_errors():
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        engines = explain_engines(trial=True)
        chosen = choose_engine(device, values=WORTH_BUILDING)
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


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
