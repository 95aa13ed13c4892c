"""Ranks under torchrun write one checkpoint, the same as one process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from calipers.distributed import split_by_size
from calipers.streaming import quantize_checkpoint
from streaming.conftest import expect_same
from streaming.test_statistics import observe

SCRIPT = """
import sys, os
from calipers.streaming import quantize_checkpoint

if sys.argv[3] == os.environ["RANK"]:
    sys.exit(0)  # a rank that is lost
if sys.argv[3] == "broken " + os.environ["RANK"]:
    def full(*_):
        raise OSError("disk full")
    sys.modules["calipers.streaming.quantize"].save_file = full
statistics = sys.argv[5] if len(sys.argv) > 5 else None
report = quantize_checkpoint(
    sys.argv[1], sys.argv[2], "NVFP4" if statistics else "NVFP4A16", load_check=False,
    shard_bytes=50_000, statistics=statistics, rank_timeout=float(sys.argv[4]),
)
done = ("done", os.environ["RANK"], report.shards, (report.out / "config.json").is_file())
os.write(1, (" ".join(map(str, done)) + "\\n").encode())  # in one go: ranks share the pipe
"""


def torchrun(
    ranks: int,
    folder: Path,
    source: Path,
    *more: Path,
    lost: int | str = -1,
    timeout: float = 120,
) -> subprocess.CompletedProcess[str]:
    script = folder / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={ranks}", str(script)]
    return subprocess.run(
        [*command, str(source), str(folder / "out"), str(lost), str(timeout), *map(str, more)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_write_what_one_process_writes(checkpoints: Any, tmp_path: Path, ranks: int) -> None:
    source = checkpoints("qwen3_moe")
    done = torchrun(ranks, tmp_path, source)
    assert done.returncode == 0, done.stderr
    told = sorted(re.findall(r"done (\d) \d+ True", done.stdout))
    assert told == [str(rank) for rank in range(ranks)], done.stdout
    options: dict[str, Any] = {"load_check": False, "shard_bytes": 50_000}
    quantize_checkpoint(source, tmp_path / "alone", "NVFP4A16", **options)
    expect_same(tmp_path / "alone", tmp_path / "out")
    names = {path.name for path in (tmp_path / "alone").iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.slow
def test_ranks_share_statistics(checkpoints: Any, tmp_path: Path) -> None:
    source = checkpoints("qwen3_moe")
    file = observe(source, tmp_path / "stats.safetensors")
    done = torchrun(2, tmp_path, source, file)
    assert done.returncode == 0, done.stderr
    options: dict[str, Any] = {"load_check": False, "statistics": file}
    quantize_checkpoint(source, tmp_path / "alone", "NVFP4", **options)
    expect_same(tmp_path / "alone", tmp_path / "out")


@pytest.mark.parametrize("broken", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_rank_that_fails_is_told_to_the_other(
    checkpoints: Any, tmp_path: Path, broken: int
) -> None:
    done = torchrun(2, tmp_path, checkpoints("tied_llama"), lost=f"broken {broken}")
    assert done.returncode != 0
    assert "cannot be written: disk full" in done.stderr
    told = f"rank {broken} failed at 'quantizing a checkpoint': CannotWriteError"
    assert told in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_rank_that_does_not_come_is_named(checkpoints: Any, tmp_path: Path, lost: int) -> None:
    done = torchrun(2, tmp_path, checkpoints("tied_llama"), lost=lost, timeout=5)
    assert done.returncode != 0
    assert f"rank {1 - lost} of 2" in done.stderr
    assert "5 s" in done.stderr
    assert not (tmp_path / "out").exists()


def test_shares_are_about_equal() -> None:
    shares = split_by_size(list(range(1, 21)), lambda item: item, 3)
    assert sorted(item for share in shares for item in share) == list(range(1, 21))
    assert all(share == sorted(share) for share in shares)
    assert max(map(sum, shares)) - min(map(sum, shares)) <= 5
    assert split_by_size([7], lambda item: item, 3) == [[7], [], []]
