"""`calipers demo`: the comparison on the embedded model."""

from __future__ import annotations

from typing import Any

import pytest

from cli.conftest import Calipers, succeeded

SCHEMES = ("W4A16", "NVFP4", "FP8")
OBSERVERS = ("memoryless_minmax", "imatrix_mse")


def check(result: dict[str, Any], observers: tuple[str, ...]) -> None:
    assert result.keys() == {"perplexity", "bytes", "runs"}
    # An untrained model of 1024 tokens has a perplexity of about 1024.
    assert 1 < result["perplexity"] < 100
    runs = result["runs"]
    assert [(run["scheme"], run["observer"]) for run in runs] == [
        (scheme, observer) for scheme in SCHEMES for observer in observers
    ]
    for run in runs:
        assert 0 < run["weight_error"] < 0.2
        assert 1 < run["perplexity"] < 1.5 * result["perplexity"]
        assert run["bytes"] < result["bytes"]
        assert run["seconds"] > 0


@pytest.mark.slow
def test_demo_as_json(calipers: Calipers) -> None:
    check(succeeded(calipers("demo", "--json")), OBSERVERS)


@pytest.mark.slow
def test_demo_as_table(calipers: Calipers) -> None:
    result = calipers("demo")
    assert result.exit_code == 0, result.output
    assert "\x1b" not in result.stdout
    lines = [line.split() for line in result.stdout.splitlines()]
    assert [line[0] for line in lines[2:]] == [
        "unquantized",
        *(scheme for scheme in SCHEMES for _ in OBSERVERS),
    ]
