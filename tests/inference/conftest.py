"""Prints what was measured, as the table of docs/presets.md."""

from __future__ import annotations

import pytest

Rows = list[tuple[str, str, float]]
_ROWS = pytest.StashKey[Rows]()


@pytest.fixture
def rows(request: pytest.FixtureRequest) -> Rows:
    """Of each checkpoint its name, its model, and the mean difference that was found."""
    return request.config.stash.setdefault(_ROWS, [])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    rows = terminalreporter.config.stash.get(_ROWS, [])
    if not rows:
        return
    terminalreporter.section("vLLM against transformers")
    terminalreporter.line("| scheme | model | mean difference |")
    terminalreporter.line("|---|---|---|")
    for name, model, difference in rows:
        terminalreporter.line(f"| {name} | {model} | {difference:.6f} |")
