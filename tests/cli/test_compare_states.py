"""`calipers compare` with a cache, with shadows, and of a model with experts."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli.conftest import Calipers, error_of, succeeded


def texts_of(texts: Path) -> tuple[object, ...]:
    return (
        *("--data", texts / "text.jsonl", "--samples", 3, "--eval", texts / "text.txt"),
        *("--eval-samples", 4, "--sequence-length", 32),
    )


def test_a_cache_beside_schemes_and_alone(calipers: Calipers, llama: Path, texts: Path) -> None:
    schemes = ("--scheme", "FP8_DYNAMIC", "--scheme", "UNQUANTIZED", "--kv-cache", "fp8")
    observers = ("--observer", "memoryless_minmax", "--observer", "optimal")
    given = ("compare", llama, *schemes, *observers, *texts_of(texts))
    result = succeeded(calipers(*given, "--json"))
    runs = result["runs"]
    # without weights there is nothing that observers of weights could differ in
    assert [(run["scheme"], run["observer"]) for run in runs] == [
        ("FP8_DYNAMIC", "memoryless_minmax"),
        ("FP8_DYNAMIC", "optimal"),
        ("UNQUANTIZED", None),
    ]
    assert {run["kv_cache"] for run in runs} == {"FP8"}
    alone = runs[-1]
    assert alone["weight_error"] is None
    # a float32 model, whose logits the cache alone moves
    assert 0 < abs(alone["change"]["value"]) < 0.05
    without = succeeded(calipers("compare", llama, *schemes[:2], *texts_of(texts), "--json"))
    assert without["runs"][0]["kv_cache"] is None
    assert without["runs"][0]["perplexity"] != runs[0]["perplexity"]
    shown = calipers(*given).stdout.splitlines()
    assert ["cache", "FP8"] in [line.split() for line in shown]


def test_shadows_of_every_run(calipers: Calipers, llama: Path, texts: Path) -> None:
    given = ("compare", llama, "--scheme", "FP8", "--scheme", "W4A16", *texts_of(texts))
    given += ("--observer", "optimal", "--observer", "mse")
    given += ("--shadow", "mse,memoryless_minmax", "--activation-shadow", "histogram")
    runs = succeeded(calipers(*given, "--json"))["runs"]
    told = [
        {(row["tensors"], row["observer"]): row["chosen"] for row in run["shadows"]} for run in runs
    ]
    ways = ("optimal", "mse", "memoryless_minmax")
    weights = {("weights", way): 14 * (way == "optimal") for way in ways}
    inputs = {("activations", "static_minmax"): 14, ("activations", "histogram"): 0}
    # a shadow that a run has as its observer, and one of activations without any, are left out
    other = {("weights", "mse"): 14, ("weights", "memoryless_minmax"): 0}
    assert told == [weights | inputs, other | inputs, weights, other]
    best = succeeded(calipers(*given, "--pick", "best", "--json"))["runs"]
    for run, first in zip(best, runs, strict=True):
        assert sum(row["chosen"] for row in run["shadows"] if row["tensors"] == "weights") == 14
        assert [row["error"] for row in run["shadows"]] == [
            pytest.approx(row["error"]) for row in first["shadows"]
        ]
        assert all(row["chosen"] == row["best"] for row in run["shadows"])
    assert best[0]["perplexity"] != runs[0]["perplexity"]
    shown = calipers(*given).stdout
    assert "Observers of the same tensors: FP8, optimal" in shown
    assert shown.count("Observers of the same tensors") == 4


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--shadow", "optimal"), "shadow 'optimal' would look at nothing: weights have that"),
        (("--activation-shadow", "mse"), "the scheme quantizes no static activations"),
        (("--shadow", "mze"), "unknown observer 'mze'"),
        (("--pick", "best"), "pick='best' needs other observers"),
        (("--kv-cache", "fp4"), "kv_cache (--kv-cache): unknown word 'fp4'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_refused_before_any_run(
    calipers: Calipers,
    llama: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    expected: str,
) -> None:
    monkeypatch.setattr("calipers.cli.compare.measure", None)
    message = error_of(calipers("compare", llama, "--observer", "optimal", *options, "--json"))
    assert expected in " ".join(message.split())


def test_coverage_of_every_run(calipers: Calipers, moe: Path, texts: Path) -> None:
    given = ("compare", moe, "--observer", "memoryless_minmax", "--observer", "optimal")
    result = succeeded(calipers(*given, *texts_of(texts), "--json"))
    data, optimal = (run["coverage"] for run in result["runs"])
    assert data == []  # no observer needed any
    assert [each["name"] for each in optimal] == [
        "model.layers.0.mlp.experts",
        "model.layers.1.mlp.experts",
    ]
    for each in optimal:
        assert sum(each["tokens"].values()) == 2 * result["data"]["tokens"]
        assert set(each["few"]) <= set(each["tokens"])
    few = sum(len(each["few"]) for each in optimal)
    assert f"{few} of 8 saw fewer than 256 tokens" in calipers(*given, *texts_of(texts)).stdout
