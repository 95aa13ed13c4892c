"""A terminal of a given width, to see what a command would look like in it."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable

import pytest


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def show(monkeypatch: pytest.MonkeyPatch, width: int | None, print_it: Callable[[], None]) -> str:
    """What is printed to a terminal of that width, without colours; to a pipe where it is None.

    Spaces at the ends of lines are left out.
    """
    stream = io.StringIO() if width is None else _Terminal()
    with monkeypatch.context() as patch:
        for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
            patch.delenv(name, raising=False)
        patch.setenv("TERM", "xterm")
        patch.setenv("COLUMNS", str(width or 80))
        patch.setattr(sys, "stdout", stream)
        print_it()
    plain = re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue())
    return "\n".join(line.rstrip() for line in plain.splitlines())
