"""Everything that README.md and docs/*.md show is run."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from calipers import Statistics
from calipers.cli import app
from calipers.demo import HELDOUT_TEXT
from docs.pages import PAGES, ROOT, read_blocks, read_commands, run_page

WITH_PYTHON = [page for page in PAGES if any(b.language == "python" for b in read_blocks(page))]
COMMANDS = sorted({command for page in PAGES for command in read_commands(page)})


def page_name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", WITH_PYTHON, ids=page_name)
def test_python(page: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert run_page(page)


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_blocks_say_what_they_are(page: Path) -> None:
    """A misspelt language would take a block out of these tests without a word."""
    # "py" is for fragments and "sh" for other programs: neither is run.
    known = {"python", "py", "yaml", "toml", "json", "console", "sh", "text"}
    assert {block.language for block in read_blocks(page)} <= known


def test_the_main_pages_show_python() -> None:
    assert {page_name(page) for page in WITH_PYTHON} >= {
        "README.md",
        "docs/index.md",
        "docs/tutorial.md",
        "docs/write-your-own-observer.md",
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_shell_commands_parse(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every option exists and takes its value: only the work itself is left out."""
    words = shlex.split(command)
    assert words[0] in ("calipers", "torchrun")
    args = words[words.index("calipers") + 1 :]
    given = []
    for name in ("ways", "evaluate", "compare", "demo", "observe", "convert", "plan"):
        monkeypatch.setattr(f"calipers.cli.{name}.load_model", lambda *a, **k: _stop(given))
    for name in ("ways", "quantize", "doctor"):
        monkeypatch.setattr(f"calipers.cli.{name}.SourceCheckpoint", lambda *a, **k: _stop(given))
    monkeypatch.setattr(Statistics, "load", lambda *a, **k: _stop(given))
    monkeypatch.setattr("calipers.cli.report.read_report", lambda *a, **k: _stop(given))
    monkeypatch.chdir(tmp_path)
    for file in ("heldout.txt", "text.txt", "text.jsonl", "images.jsonl"):
        Path(file).touch()  # text is looked for first
    if "--scheme scheme.yaml" in command:  # what `calipers plan` writes
        Path("scheme.yaml").write_text("targets: [Linear]\nweights: {num_bits: 4}\n", "utf-8")
    layer = {"name": "mlp.experts", "tokens": {"mlp.experts.0": 3}, "enough": 256}
    Path("report.json").write_text(json.dumps({"coverage": [layer]}), encoding="utf-8")
    # the file that commands name as a plugin is what this page shows
    own = ROOT / "docs" / "write-your-own-observer.md"
    monkeypatch.setattr("calipers.cli.options.load_plugin", lambda plugin: run_page(own))
    result = CliRunner().invoke(app, args)
    reads_no_model = args[0] in ("coverage", "observers", "schemes")
    if args[0] == "doctor":
        reads_no_model = not any(arg.startswith("./") for arg in args)
    if not reads_no_model:
        assert result.exit_code == 1, result.output
        assert set(given) == {"called"}
    else:
        assert result.exit_code == 0, result.output


def _stop(given: list[str]) -> None:
    given.append("called")
    raise OSError("no model is loaded in this test")


def test_the_tutorial_command_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    command = next(c for c in read_commands(ROOT / "docs" / "tutorial.md") if "--out" in c)
    # All of the held-out text would take half a minute.
    (tmp_path / "short.txt").write_text(HELDOUT_TEXT.read_text("utf-8")[:4000], "utf-8")
    args = [*shlex.split(command)[1:], "--eval", "short.txt"]
    result = CliRunner().invoke(app, args, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "demo-FP8" / "model.safetensors").is_file()
