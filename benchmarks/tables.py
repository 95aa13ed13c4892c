"""Write the measured tables of README.md and docs from the committed result files.

    make doc-tables
    python -m benchmarks.tables [--write]

In a page, the lines from below a mark to the next empty line are those that the mark asks for:

    <!-- table: optimal.json#main -->             a table of a result file
    <!-- table: smollm2.json#main (NVFP4|W4) -->  those of its rows that match
    <!-- source: optimal.json -->                 command, date, commit, machine and versions

Without `--write`, pages that differ from the files are named, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from benchmarks.results import FOLDER, ROOT, Result

__all__ = ["MARK", "main", "pages", "written"]

MARK = re.compile(
    r"<!-- (?P<kind>table|source): (?P<file>[\w.-]+)"
    r"(?:#(?P<name>[\w-]+))?(?: \((?P<only>.+)\))? -->"
)


def pages() -> list[Path]:
    """The pages that may hold tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def written(text: str, folder: Path = FOLDER) -> str:
    """The text of a page with what its marks ask for below each of them.

    Raises:
        ValueError: A mark names a file or a table that does not exist.
    """
    lines, kept = [], True
    for line in text.split("\n"):
        mark = MARK.fullmatch(line)
        if mark is not None:
            lines += [line, *_wanted(mark, folder).split("\n")]
            kept = False
            continue
        kept = kept or not line.strip()
        if kept:
            lines.append(line)
    return "\n".join(lines)


def _wanted(mark: re.Match[str], folder: Path) -> str:
    path = folder / mark["file"]
    if not path.is_file():
        raise ValueError(f"{mark[0]}: there is no {mark['file']} in benchmarks/results")
    result = Result.read(path)
    if mark["kind"] == "source":
        return result.source()
    if mark["name"] not in result.tables:
        names = ", ".join(result.tables)
        raise ValueError(f"{mark[0]}: {mark['file']} has no table {mark['name']!r}, only {names}")
    table = result.tables[mark["name"]]
    only = mark["only"] or ""
    if not table.cells(only):
        raise ValueError(f"{mark[0]}: no row matches {only!r}")
    return table.markdown(only)


def main(argv: Sequence[str] | None = None) -> int:
    """Compare the pages with the files, or write them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the pages")
    options = parser.parse_args(argv)
    status = 0
    for page in pages():
        text = page.read_text(encoding="utf-8")
        wanted = written(text)
        if wanted == text:
            continue
        name = page.relative_to(ROOT).as_posix()
        if options.write:
            page.write_text(wanted, encoding="utf-8")
            print(f"{name}: written")
        else:
            status = 1
            print(f"{name}: differs from benchmarks/results; `make doc-tables` writes it")
    return status


if __name__ == "__main__":
    raise SystemExit(main())
