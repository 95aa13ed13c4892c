"""`calipers demo`: the comparison on the embedded model."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from calipers.cli.texts import Text, TokenizedText
from cli.conftest import Calipers, succeeded

SCHEMES = ("W4A16", "NVFP4", "FP8")
OBSERVERS = ("memoryless_minmax", "imatrix_mse", "optimal objective=imatrix", "optimal")


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few sequences alone: all of them under all schemes take a minute."""
    whole = Text.read

    def read(self: Text, tokenizer: Any, sequence_length: int, samples: Any) -> TokenizedText:
        return whole(self, tokenizer, sequence_length, 2)

    monkeypatch.setattr(Text, "read", read)


@pytest.mark.usefixtures("short")
def test_demo_as_table(calipers: Calipers) -> None:
    result = calipers("demo")
    assert result.exit_code == 0, result.output
    assert "\x1b" not in result.stdout
    lines = result.stdout.splitlines()
    runs = list(itertools.product(SCHEMES, OBSERVERS))
    assert lines[2].split()[0] == "unquantized"
    for line, (scheme, observer) in zip(lines[3:], runs, strict=False):
        assert line.split()[0] == scheme
        assert f" {observer}  " in line
    tail = [line.split("  ")[0] for line in lines[3 + len(runs) :]]
    assert tail == ["calibrated with", "judged by", *SCHEMES]


@pytest.mark.slow
def test_demo_as_json(calipers: Calipers) -> None:
    result = succeeded(calipers("demo", "--json"))
    assert result["model"] == "demo"
    before = result["unquantized"]
    # An untrained model of 1024 tokens has a perplexity of about 1024.
    assert 1 < before["perplexity"]["value"] < 100
    runs = {
        (
            run["scheme"],
            " ".join([run["observer"], *(f"{k}={v}" for k, v in run["options"].items())]),
        ): run
        for run in result["runs"]
    }
    assert list(runs) == list(itertools.product(SCHEMES, OBSERVERS))
    for run in runs.values():
        assert 0 < run["weight_error"] < 0.2
        assert 1 < run["perplexity"]["value"] < 1.5 * before["perplexity"]["value"]
        assert run["bytes"] < before["bytes"]
        assert run["seconds"] > 0
    for scheme in ("W4A16", "NVFP4"):
        change = {observer: runs[scheme, observer]["change"]["value"] for observer in OBSERVERS}
        assert change["optimal"] < change["memoryless_minmax"]
    assert result["verdicts"].keys() == set(SCHEMES)
