"""What a terminal of 60 columns shows: whole words, nothing cut, no wider than it is."""

from __future__ import annotations

import os
import sys

import pytest

if sys.platform == "win32":
    pytest.skip("Windows has no pseudo-terminals", allow_module_level=True)

import fcntl
import pty
import re
import struct
import subprocess
import termios
from pathlib import Path

from calipers.cli.console import print_table
from cli.test_pipe import RUN

NAME = "model.layers.*.mixture_of_experts.shared_expert.down_proj"


def in_terminal(args: list[str], columns: int, cwd: Path) -> str:
    """Standard output of a process in a terminal of so many columns, without styles."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    env = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "NO_COLOR", "LINES")}
    process = subprocess.Popen(
        [*RUN, *args], cwd=cwd, env={**env, "TERM": "xterm"}, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    output = b""
    while True:
        try:
            chunk = os.read(ours, 65536)
        except OSError:  # Linux's way to say that the other side is closed
            break
        if not chunk:
            break
        output += chunk
    os.close(ours)
    assert process.wait(timeout=120) == 0, output
    text = output.decode("utf-8").replace("\r\n", "\n")
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


@pytest.mark.slow
def test_calibrate_at_60_columns(llama: Path, tmp_path: Path) -> None:
    text = in_terminal(
        ["calibrate", str(llama), "--scheme", "FP8_DYNAMIC", "--no-data"], 60, tmp_path
    )
    shown = text[text.index("model.layers.*") :]  # the path of the model comes before
    assert max(map(len, shown.splitlines())) <= 60
    words = shown.replace(",", "").split()
    for word in ("model.layers.*.self_attn.q_proj", "memoryless_minmax", "dynamic", "tokens:"):
        assert word in words


@pytest.mark.slow
def test_a_wide_terminal_has_frames(llama: Path, tmp_path: Path) -> None:
    text = in_terminal(["calibrate", str(llama)], 160, tmp_path)
    assert "│ model.layers.*.self_attn.q_proj" in text


@pytest.mark.parametrize(("columns", "framed"), [(60, False), (100, True)])
def test_a_table_is_framed_where_its_words_fit(
    columns: int,
    framed: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("NO_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    print_table(
        "title", ("module", *"xyz"), [(NAME, "a [note]", "-", "2"), ("b", "c" * 20, "4", "")]
    )
    text = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert NAME in text
    assert max(map(len, text.splitlines())) <= columns
    assert ("╭" in text) == framed
    if not framed:
        assert text.splitlines()[1:] == [
            *(NAME, "  x: a [note], z: 2"),
            *("b", f"  x: {'c' * 20}, y: 4"),
        ]
