"""`torchrun -m calipers calibrate`: one checkpoint, that of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
#: Fewer samples than ranks: the last one has none.
ARGUMENTS = ["calibrate", "--scheme", "W8A8", "--samples", "5", "--no-eval", "--json"]


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert "Traceback" not in done.stderr or done.returncode
    return done


@pytest.mark.slow
def test_ranks_write_the_checkpoint_of_one_process(tmp_path: Path) -> None:
    alone = run([sys.executable, "-m", "calipers", *ARGUMENTS, "--out", "one"], tmp_path)
    ranks = run(
        [*TORCHRUN, "--nproc-per-node", "3", "-m", "calipers", *ARGUMENTS, "--out", "three"],
        tmp_path,
    )
    assert alone.returncode == 0, alone.stderr
    assert ranks.returncode == 0, ranks.stderr
    told = json.loads(ranks.stdout)  # printed once
    assert told["data"] == json.loads(alone.stdout)["data"]
    for name in ("model.safetensors", "config.json"):
        one, three = ((tmp_path / place / name).read_bytes() for place in ("one", "three"))
        assert one == three
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "three"]


@pytest.mark.slow
def test_an_error_ends_all_ranks(tmp_path: Path) -> None:
    command = [*TORCHRUN, "--nproc-per-node", "2", "-m", "calipers", "calibrate", "--no-eval"]
    done = run([*command, "--option", "no_such=1", "--samples", "2"], tmp_path)
    assert done.returncode != 0
    assert "no_such" in done.stderr


def test_the_package_is_the_command(tmp_path: Path) -> None:
    done = run([sys.executable, "-m", "calipers", "--version"], tmp_path)
    assert done.returncode == 0
    assert done.stdout.startswith("0.")
