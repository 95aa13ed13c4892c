"""Result files: what was measured, by which command, of which commit, where and with what.

Every benchmark writes this form by `--json FILE`; the files in `results/` are committed, and
`benchmarks.tables` writes the tables of the documentation from them.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

import calipers

__all__ = ["FOLDER", "ROOT", "Result", "Table", "add_json_option", "measured", "peer_is_here"]

Json = dict[str, Any]
ROOT = Path(__file__).resolve().parents[1]
FOLDER = Path(__file__).resolve().parent / "results"
PACKAGES = ("torch", "compressed-tensors", "transformers", "llmcompressor", "triton")
#: What a processor is called, by the first flag that it has.
KINDS = {"amx_tile": "AMX", "avx512f": "AVX-512", "avx2": "AVX2"}


@dataclass(frozen=True)
class Table:
    """Rows of raw values, and how they are shown.

    Attributes:
        columns: Heading, key of the rows, and format of the values (`str.format`) of each column. A
            value that is a list fills several places of its format.
        rows: Values by key; what no column names is kept and not shown. None is shown as nothing.
    """

    columns: Sequence[Sequence[str]]
    rows: Sequence[Mapping[str, Any]]

    def cells(self, only: str = "") -> list[list[str]]:
        """Cells of the rows whose first one matches the regular expression `only`."""
        found = [[_cell(row.get(key), form) for _, key, form in self.columns] for row in self.rows]
        return [cells for cells in found if re.search(only, cells[0])]

    def markdown(self, only: str = "") -> str:
        """The table in Markdown: words to the left, numbers to the right."""
        headings = [heading for heading, _, _ in self.columns]
        words = [
            any(isinstance(row.get(key), str) for row in self.rows) for _, key, _ in self.columns
        ]
        rules = ["---" if each else "---:" for each in words]
        lines = [headings, rules, *self.cells(only)]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: Any, form: str) -> str:
    if value is None:
        return ""
    return form.format(*value) if isinstance(value, list | tuple) else form.format(value)


@dataclass(frozen=True)
class Result:
    """A result file.

    Attributes:
        command: What measured it, without the path of its output.
        commit: Short hash of the code, with a plus sign where the code differed from it; None
            outside of a checkout.
        date: Year, month, day.
        machine: In words.
        versions: Of Python and of the packages that count.
        tables: By name.
        threads: Of torch; None where nothing was timed.
        note: What else a reader must know, such as where figures were copied from.
    """

    command: str
    commit: str | None
    date: str
    machine: str
    versions: Mapping[str, str]
    tables: Mapping[str, Table]
    threads: int | None = None
    note: str | None = None

    @classmethod
    def read(cls, path: Path) -> Result:
        """The content of a file."""
        found = json.loads(path.read_text(encoding="utf-8"))
        tables = {name: Table(**table) for name, table in found.pop("tables").items()}
        return cls(**found, tables=tables)

    def write(self, path: Path) -> None:
        """Write the file, a row of a table a line, floats with six digits."""
        head = asdict(self)
        tables = head.pop("tables")
        for name in ("threads", "note"):
            if head[name] is None:
                del head[name]
        text = json.dumps(head, indent=1)
        parts = []
        for name, table in tables.items():
            listed = {
                key: "[\n" + ",\n".join(f"    {_line(each)}" for each in table[key]) + "\n   ]"
                for key in ("columns", "rows")
            }
            inner = ",\n".join(f'   "{key}": {value}' for key, value in listed.items())
            parts.append(f"  {json.dumps(name)}: {{\n{inner}\n  }}")
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = text.removesuffix("\n}") + ',\n "tables": {\n' + ",\n".join(parts) + "\n }\n}\n"
        path.write_text(whole, encoding="utf-8")

    def source(self) -> str:
        """How it was measured, in one line of Markdown."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        plural = "" if self.threads == 1 else "s"
        threads = "" if self.threads is None else f", {self.threads} thread{plural}"
        note = "" if self.note is None else f" {self.note}"
        return (
            f"Measured by `{self.command}` on {self.date}: commit {self.commit}, "
            f"{self.machine}{threads}, {versions}.{note}"
        )


def _line(value: Any) -> str:
    return json.dumps(_rounded(value), ensure_ascii=False)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, list | tuple):
        return [_rounded(each) for each in value]
    return {k: _rounded(v) for k, v in value.items()} if isinstance(value, dict) else value


def measured(
    script: str,
    arguments: Sequence[str] | None,
    tables: Mapping[str, Table],
    *,
    packages: Sequence[str] = (),
    timed: bool = False,
    gpu: bool = False,
) -> Result:
    """What was measured just now, with this machine, its versions and this commit.

    Args:
        script: Name of the module that was run.
        arguments: Of the command; None takes those of this process.
        tables: What was measured; tables without rows are left out.
        packages: Whose versions count, beyond those that always do.
        timed: Whether the number of threads counts.
        gpu: Whether the GPU was measured rather than the CPU.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    return Result(
        command=_command(script, given),
        commit=_commit(),
        date=date.today().isoformat(),
        machine=_machine(gpu),
        versions=_versions((*PACKAGES, *packages)),
        tables={name: table for name, table in tables.items() if table.rows},
        threads=torch.get_num_threads() if timed else None,
    )


def add_json_option(parser: Any) -> None:
    """`--json FILE`, the same for every benchmark."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write a result file")


def peer_is_here() -> bool:
    """Whether llmcompressor can be imported."""
    try:
        import llmcompressor.observers
    except ImportError:
        return False
    return bool(llmcompressor.observers)


def _command(script: str, arguments: list[str]) -> str:
    """Without `--json FILE`, and without folders that are of this machine."""
    if "--json" in arguments:
        at = arguments.index("--json")
        arguments = arguments[:at] + arguments[at + 2 :]
    named = [Path(a).name if Path(a).is_absolute() else a for a in arguments]
    named = [f'"{a}"' if re.search(r"[^\w./:=,-]", a) else a for a in named]
    return " ".join(["python -m", script, *named])


def _versions(packages: Sequence[str]) -> dict[str, str]:
    found = {"python": platform.python_version(), "calipers": calipers.__version__}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _machine(gpu: bool = False) -> str:
    """Cores and kind of the processor, and the GPU where there is one; no names of hosts."""
    try:
        flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        flags = None
    has = flags[1].split() if flags else []
    kind = next((f" with {name}" for flag, name in KINDS.items() if flag in has), "")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    machine = platform.machine().replace("_", "-")
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    on = f"{name}; host: " if gpu else ""
    cpu = f"{cores} cores of an {machine}{kind}"
    return on + cpu if gpu else f"{cpu}, {name}"


def _commit() -> str | None:
    """Of the code alone: documents and result files may differ."""
    try:
        commit = _git("rev-parse", "--short", "HEAD")
        code = ("src", "benchmarks", ":!benchmarks/results")
        changed = _git("status", "--porcelain", "--", *code)
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}+" if changed else commit


def _git(*arguments: str) -> str:
    command = ["git", "--no-optional-locks", *arguments]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.strip()
