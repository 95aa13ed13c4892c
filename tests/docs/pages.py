"""The pages of the documentation, their code blocks, and a way to run them."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[2]
API = ROOT / "docs" / "api"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

_FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
_TITLE = re.compile(r'title="(?P<title>[^"]+)"')


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its title (a file name) if any, and the line it starts at."""

    language: str
    title: str | None
    code: str
    line: int


def read_blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    blocks = []
    for match in _FENCE.finditer(text):
        info = match["info"].strip()
        title = _TITLE.search(info)
        line = text.count("\n", 0, match.start("code"))
        language = info.split(maxsplit=1)[0] if info else ""
        blocks.append(Block(language, title and title["title"], match["code"], line))
    return blocks


def read_commands(page: Path) -> list[str]:
    """The lines of the console blocks of a page, without their prompts."""
    return [
        line.removeprefix("$ ")
        for block in read_blocks(page)
        if block.language == "console"
        for line in block.code.splitlines()
    ]


def read_table(text: str, heading: str) -> list[list[str]]:
    """The rows of the first table whose first column is called `heading`, below its head."""
    lines = iter(text.splitlines())
    for line in lines:
        if line.startswith(f"| {heading} |".replace("|  |", "| |")):
            break
    else:
        raise AssertionError(f"there is no table with a first column {heading!r}")
    next(lines)
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


@contextmanager
def _working_directory(folder: str) -> Iterator[None]:
    """`contextlib.chdir`, which Python 3.10 lacks."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@cache
def run_page(page: Path) -> dict[str, Any]:
    """Run the Python blocks of a page one after the other, in an empty folder.

    Blocks with a title are written to a file of that name in the folder instead.
    """
    module = ModuleType(f"docs_{page.stem.replace('-', '_')}")
    sys.modules[module.__name__] = module  # pickle finds classes there
    with tempfile.TemporaryDirectory() as folder, _working_directory(folder):
        for block in read_blocks(page):
            if block.title is not None:
                Path(block.title).write_text(block.code, encoding="utf-8")
            elif block.language == "python":
                # Tracebacks show the line of the page.
                code = compile("\n" * block.line + block.code, page, "exec")
                exec(code, vars(module))
    return vars(module)
