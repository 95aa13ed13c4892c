"""Ctrl-C while the command works."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cli.test_pipe import RUN


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for another process")
def test_a_signal_ends_it_with_a_word(llama: Path, tmp_path: Path) -> None:
    plugin = tmp_path / "waiting.py"
    # Imported before the model is loaded: from here on the command works.
    plugin.write_text("import time\nprint('begun', flush=True)\ntime.sleep(100)\n", "utf-8")
    process = subprocess.Popen(
        [*RUN, "calibrate", str(llama), "--plugin", str(plugin)],
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Python takes SIGINT for Ctrl-C only where it is not ignored, as it is for background jobs
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    assert err.splitlines()[-1] == "interrupted"
    assert "Traceback" not in err
