"""After SIGKILL at any moment the same command goes on, loses nothing and ends with the bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import killed_commands

pytestmark = pytest.mark.skipif(os.name != "posix", reason="forks, and sends SIGKILL")


def kill(command: str, folder: Path, kills: int, seed: int) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, killed_commands.__file__, command, folder, str(kills), str(seed)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert found["killed"] == kills
    return found


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name != "calibrate"))
        for name in killed_commands.COMMANDS
    ],
)
def test_killed_once(command: str, tmp_path: Path) -> None:
    kill(command, tmp_path, 1, seed=3)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("command", killed_commands.COMMANDS)
def test_killed_at_random_moments(command: str, tmp_path: Path, seed: int) -> None:
    found = kill(command, tmp_path, 25, seed)
    assert found["with steps"] > 3  # not all of them before the first step
