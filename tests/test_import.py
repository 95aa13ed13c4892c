"""Importing calipers changes nothing that belongs to the user."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import calipers

PACKAGE = str(Path(calipers.__file__).parent)
PROBE = """
import json, sys
import torch
from loguru import logger

class Importers:
    # notes which file imports which module; finds none itself
    files = {}

    def find_spec(self, name, path=None, target=None):
        frame = sys._getframe(1)
        while "importlib" in frame.f_code.co_filename:
            frame = frame.f_back
        self.files.setdefault(name, frame.f_code.co_filename)

sys.meta_path.insert(0, Importers())

seen = []
sink = logger.add(seen.append, format="{message}")
logger.disable("compressed_tensors.switched_off_by_the_user")
logger.disable("calipers.switched_off_by_the_user")

def settings():
    return {
        "default dtype": str(torch.get_default_dtype()),
        "default device": str(torch.get_default_device()),
        "threads": torch.get_num_threads(),
        "interop threads": torch.get_num_interop_threads(),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "anomaly mode": torch.is_anomaly_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "cudnn deterministic": torch.backends.cudnn.deterministic,
        "cudnn benchmark": torch.backends.cudnn.benchmark,
        "matmul precision": torch.get_float32_matmul_precision(),
        "rng": torch.random.get_rng_state().sum().item(),
        "seed": torch.initial_seed(),
    }

def handlers():
    return {number: id(handler) for number, handler in logger._core.handlers.items()}

torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)
torch.set_grad_enabled(False)
torch.use_deterministic_algorithms(True, warn_only=True)
sinks, before = handlers(), settings()
methods = {name: getattr(logger, name).__func__ for name in ("add", "remove", "enable", "disable")}

import calipers
import calipers.calibration, calipers.checkpoint, calipers.evaluation, calipers.text, calipers.demo

logger.info("still here")
def from_module(name):
    namespace = {"__name__": name, "logger": logger}
    exec("logger.info('from ' + __name__)", namespace)
from_module("compressed_tensors.switched_off_by_the_user")
from_module("calipers.switched_off_by_the_user")

after = settings()
json.dump(
    {
        "messages": [str(message).strip() for message in seen],
        "same sinks": handlers() == sinks,
        "same methods": all(getattr(logger, n).__func__ is f for n, f in methods.items()),
        "changed": {name: (before[name], after[name]) for name in before
                    if before[name] != after[name]},
        "importers": Importers.files,
    },
    sys.stderr,
)
"""


@cache
def probe(clear_loggers: str | None) -> dict[str, Any]:
    env = {k: v for k, v in os.environ.items() if k != "COMPRESSED_TENSORS_CLEAR_LOGGERS"}
    if clear_loggers is not None:
        env["COMPRESSED_TENSORS_CLEAR_LOGGERS"] = clear_loggers
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROBE],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # The user's own default sink is on standard error too: the report is the last line.
    return {"stdout": done.stdout, **json.loads(done.stderr.splitlines()[-1])}


@pytest.fixture(
    params=[None, pytest.param("1", marks=pytest.mark.slow)], ids=["plain", "clear-loggers"]
)
def seen(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What a fresh process saw while it imported calipers."""
    return probe(request.param)


def test_sinks_of_the_user_stay(seen: dict[str, Any]) -> None:
    assert seen["same sinks"]
    assert seen["messages"] == ["still here"]


def test_loguru_is_left_as_it_was(seen: dict[str, Any]) -> None:
    assert seen["same methods"]


def test_no_torch_setting_changes(seen: dict[str, Any]) -> None:
    assert seen["changed"] == {}


def test_nothing_is_printed(seen: dict[str, Any]) -> None:
    assert seen["stdout"] == ""


def test_the_library_does_without_the_command(seen: dict[str, Any]) -> None:
    importers = seen["importers"]
    assert importers["calipers.checkpoint"].startswith(PACKAGE)
    assert not importers.get("rich", "").startswith(PACKAGE)  # transformers imports it, by httpx
    assert {"typer", "llmcompressor", "calipers.cli"}.isdisjoint(importers)


@pytest.mark.parametrize("package", ["datasets", "pyarrow", "pandas", "matplotlib"])
def test_packages_of_extras_are_imported_where_used(seen: dict[str, Any], package: str) -> None:
    # others may import them: transformers does, where it finds them
    assert not seen["importers"].get(package, "").startswith(PACKAGE)


def test_version_is_that_of_the_package() -> None:
    assert calipers.__version__ == importlib.metadata.version("calipers")
