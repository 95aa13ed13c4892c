"""The installed command in a process of its own, with pipes for streams."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

RUN = [sys.executable, "-c", "from calipers.cli import app; app(prog_name='calipers')"]


def run(*args: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k not in ("FORCE_COLOR", "COLUMNS")}
    return subprocess.run(
        [*RUN, *map(str, args)],
        cwd=cwd,
        env={**env, "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
        check=False,
    )


def test_json_is_all_of_standard_output(llama: Path, texts: Path, tmp_path: Path) -> None:
    """What libraries print and log meanwhile must go elsewhere."""
    done = run(
        *("calibrate", llama, "--scheme", "NVFP4", "--observer", "memoryless_minmax"),
        *("--data", texts / "text.txt", "--samples", 1, "--out", "out", "--json"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["out"] == "out"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert "Traceback" not in done.stderr
