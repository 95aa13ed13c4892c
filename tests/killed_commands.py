"""Runs `calibrate`, `observe` or `quantize`, kills it at random moments, and runs it to its end.

    python tests/killed_commands.py COMMAND FOLDER KILLS SEED

One process that has imported everything forks the runs, so that the moments lie in the work and not
in the imports. It prints as JSON how many runs were killed and what they had done.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from loguru import logger

import architectures
import calipers
from calipers.checkpoint.opening import load_model
from calipers.streaming import quantize_checkpoint

#: Kills in a row before a run may end.
_IN_A_ROW = 4


def make_source(folder: Path) -> Path:
    """A random Llama of six layers and some megabytes."""
    sizes = {**architectures.GROUPED, "hidden_size": 256, "intermediate_size": 512}
    model = architectures.tiny(
        "LlamaForCausalLM", "LlamaConfig", **{**sizes, "num_hidden_layers": 6}
    )
    model.bfloat16().save_pretrained(folder, max_shard_size="2MB")
    return folder


def batches() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, 128, (4, 64), generator=generator)} for _ in range(6)]


def calibrate(source: Path, out: Path) -> None:
    calipers.calibrate(source, "W4A16", data=batches(), memory="blocks", out=out, load_check=False)


def observe(source: Path, out: Path) -> None:
    calipers.observe(load_model(source), batches(), out, every=0, products=128, histograms=True)


def quantize(source: Path, out: Path) -> None:
    quantize_checkpoint(
        source, out, "W4A16", statistics=source.parent / "statistics.safetensors",
        shard_bytes=200_000, load_check=False,
    )  # fmt: skip


COMMANDS = {each.__name__: each for each in (calibrate, observe, quantize)}


def start(command: str, source: Path, out: Path) -> int:
    """The id of a process that runs a command."""
    pid = os.fork()
    if pid:
        return pid
    try:
        with (out.parent / "log").open("w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        COMMANDS[command](source, out)
        os._exit(0)
    except BaseException as error:
        logger.exception(error)
        os._exit(1)


def end(pid: int) -> int:
    """How a process ended: 0, an exit code, or less than 0 for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def digests(out: Path) -> dict[str, str]:
    files = [out] if out.is_file() else sorted(each for each in out.rglob("*") if each.is_file())
    files = [each for each in files if each.name != "calipers-report.json"]  # has times in it
    return {
        str(each.relative_to(out.parent)): hashlib.sha256(each.read_bytes()).hexdigest()
        for each in files
    }


def steps(out: Path) -> set[str]:
    """Steps in the journal of the runs so far."""
    return {each.name for each in out.parent.glob(f".{out.name}.*.part/journal/*.json")
            if not each.name.startswith(".")}  # fmt: skip


def rounds(command: str, source: Path, folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """Kill so many runs, let one in a few end, and expect what an undisturbed one gives."""
    name = "out.safetensors" if command == "observe" else "out"
    whole, out = folder / "whole" / name, folder / "killed" / name
    for each in (whole, out):
        each.parent.mkdir(parents=True)
    began = time.monotonic()
    code = end(start(command, source, whole))
    assert code == 0, (whole.parent / "log").read_text()
    seconds = time.monotonic() - began
    generator = random.Random(seed)
    found: dict[str, Any] = {"killed": 0, "with steps": 0, "ended": 0, "moved": 0}
    while True:
        known: set[str] = set()
        for _ in range(min(_IN_A_ROW, kills - found["killed"])):
            pid = start(command, source, out)
            time.sleep(generator.uniform(0, seconds))
            os.kill(pid, signal.SIGKILL)
            if end(pid) == 0:  # it was faster
                break
            found["killed"] += 1
            if out.exists():  # all was done but for what is removed
                found["moved"] += 1
                break
            assert known <= steps(out), f"lost {known - steps(out)}"
            known = steps(out)
            found["with steps"] += bool(known)
        if not out.exists():
            code = end(start(command, source, out))
            assert code == 0, (out.parent / "log").read_text()
            found["ended"] += 1
            left = sorted(each.name for each in out.parent.iterdir())
            assert left == ["log", name], left
        assert digests(out) == digests(whole)
        shutil.rmtree(out.parent)
        out.parent.mkdir()
        if found["killed"] >= kills:
            return found


def main() -> None:
    torch.set_num_threads(1)
    logger.remove()
    command, place, kills, seed = sys.argv[1:]
    folder = Path(place)
    source = make_source(folder / "source")
    if command == "quantize":
        model = load_model(source)
        calipers.observe(model, batches(), folder / "statistics.safetensors")
        del model
    found = rounds(command, source, folder, int(kills), int(seed))
    sys.stdout.write(f"{json.dumps(found)}\n")


if __name__ == "__main__":
    main()
