"""`calipers compare`: schemes and observers side by side."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from calipers.cli.compare import Comparison, _in_one_pass, print_comparison
from calipers.cli.runs import Run, RunResult, judge_schemes, plan_runs
from calipers.cli.texts import TokenizedText
from calipers.errors import CalipersError
from calipers.evaluation import Difference, OutputError, Perplexity
from cli.conftest import Calipers, error_of, succeeded
from cli.terminal import show

RUN_FIELDS = {
    "scheme",
    "observer",
    "options",
    "group_size",
    "kv_cache",
    "weight_error",
    "measures",
    "perplexity",
    "change",
    "output_error",
    "bytes",
    "seconds",
    "shadows",
    "coverage",
}


def texts_of(texts: Path) -> tuple[object, ...]:
    return (
        *("--data", texts / "text.txt", "--samples", 2, "--eval", texts / "text.txt"),
        *("--eval-samples", 4, "--sequence-length", 32),
    )


def test_schemes_times_observers(calipers: Calipers, llama: Path, texts: Path) -> None:
    result = succeeded(
        calipers(
            *("compare", llama, "--scheme", "W4A16", "--scheme", "FP8", *texts_of(texts)),
            *("--observer", "memoryless_minmax", "--observer", "imatrix_mse:grid=4"),
            *("--option", "norm=2", "--json"),
        )
    )
    assert result.keys() == {"model", "data", "eval", "unquantized", "runs", "verdicts"}
    assert result["model"] == str(llama)
    text = str(texts / "text.txt")
    assert result["data"] == {"text": text, "sequences": 2, "tokens": 64, "with_media": 0}
    assert result["eval"] == {"text": text, "sequences": 4, "tokens": 128, "with_media": 0}
    before = result["unquantized"]
    assert [(run["scheme"], run["observer"], run["options"]) for run in result["runs"]] == [
        (scheme, *chosen)
        for scheme in ("W4A16", "FP8")
        for chosen in (("memoryless_minmax", {}), ("imatrix_mse", {"norm": 2, "grid": 4}))
    ]
    for run in result["runs"]:
        assert run.keys() == RUN_FIELDS
        assert 0 < run["weight_error"] < 0.2
        assert run["bytes"] < before["bytes"]
        assert run["seconds"] > 0
        assert run["output_error"] is None
        ratio = run["perplexity"]["value"] / before["perplexity"]["value"] - 1
        # Each run began with the unquantized model, not with what the one before left.
        assert run["change"]["value"] == pytest.approx(ratio, rel=1e-6, abs=1e-9)
        assert run["change"]["standard_error"] > 0
        measures = run["measures"]["perplexity"]
        assert measures["after"] == run["perplexity"]["value"]
        assert measures["kl"] > 0
        assert 0 < measures["top1"] <= 1
    one, other = result["runs"][:2]
    assert one["weight_error"] != other["weight_error"]
    assert result["verdicts"].keys() == {"W4A16", "FP8"}


def test_a_run_is_what_calibrate_does(calipers: Calipers, llama: Path, texts: Path) -> None:
    """The second run as well, which begins with the model read once more."""
    given = ("--data", texts / "text.txt", "--samples", 2, "--sequence-length", 32)
    observers = ("--observer", "memoryless_minmax", "--observer", "optimal")
    runs = succeeded(
        calipers("compare", llama, *observers, *given, "--eval", texts / "text.txt", "--json")
    )["runs"]
    for run in runs:
        told = succeeded(
            calipers(
                *("calibrate", llama, "--observer", run["observer"], *given),
                *("--eval", texts / "text.txt", "--json"),
            )
        )
        assert run["perplexity"]["value"] == pytest.approx(told["perplexity_after"], rel=1e-6)
        assert run["bytes"] == told["bytes_after"]


def test_as_text(calipers: Calipers, llama: Path, texts: Path) -> None:
    result = calipers("compare", llama, "--observer", "memoryless_minmax", *texts_of(texts))
    assert result.exit_code == 0, result.output
    assert "\x1b" not in result.stdout
    lines = result.stdout.splitlines()
    heading = "scheme observer weight error perplexity change size seconds"
    assert lines[1].split() == heading.split()
    assert [line.split()[0] for line in lines[2:4]] == ["unquantized", "W4A16"]
    tail = {line.split("  ")[0]: line.partition("  ")[2].strip() for line in lines[4:]}
    assert tail.keys() == {"calibrated with", "judged by", "W4A16"}
    assert tail["judged by"] == f"{texts / 'text.txt'}: 4 sequences, 128 tokens"
    assert tail["W4A16"].startswith("memoryless_minmax: ")


def test_models_without_a_head_are_judged_by_their_outputs(
    calipers: Calipers, bert: Path, texts: Path
) -> None:
    given = ("compare", bert, "--observer", "memoryless_minmax", *texts_of(texts))
    result = succeeded(calipers(*given, "--json"))
    assert result["unquantized"]["perplexity"] is None
    (run,) = result["runs"]
    assert run["perplexity"] is run["change"] is None
    assert 0.001 < run["output_error"]["value"] < 1
    assert run["output_error"]["standard_error"] > 0
    assert "output error" in result["verdicts"]["W4A16"]
    heading = calipers(*given).stdout.splitlines()[1].split()
    assert heading == [
        "scheme",
        "observer",
        "weight",
        "error",
        "output",
        "error",
        "size",
        "seconds",
    ]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--scheme", "W4A61"), "unknown scheme 'W4A61'"),
        (("--observer", "optimall"), "unknown observer 'optimall'"),
        (("--option", "norm=2"), "none of memoryless_minmax, optimal, optimal has an option"),
        (("--observer", "optimal:objectiv=mse"), "unknown option 'objectiv'"),
        (("--observer", "optimal:objective"), "expected key=value, got 'objective'"),
        (("--data", "missing.txt"), "missing.txt: no such file"),
        (("--eval", "missing.txt"), "missing.txt: no such file"),
        (("--on-unfit", "maybe"), "on_unfit"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_errors_over_the_input_come_before_any_run(
    calipers: Calipers,
    llama: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    expected: str,
) -> None:
    def must_not_run(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the model was run before the input was checked")

    monkeypatch.setattr("calipers.cli.compare.measure", must_not_run)
    message = error_of(calipers("compare", llama, *options, "--json"))
    assert expected in " ".join(message.split())


def test_a_scheme_that_does_not_fit_is_named(
    calipers: Calipers, llama: Path, texts: Path, tmp_path: Path
) -> None:
    scheme = tmp_path / "odd.yaml"
    scheme.write_text(
        "weights: {num_bits: 4, type: int, strategy: group, group_size: 48}\n", encoding="utf-8"
    )
    message = error_of(
        calipers("compare", llama, "--scheme", "W4A16", "--scheme", scheme, *texts_of(texts))
    )
    assert message.startswith(f"error: scheme {scheme}, observer memoryless_minmax: ")
    assert "48" in message


def test_common_options_go_to_the_observers_that_have_them() -> None:
    runs = plan_runs(
        ["W4A16", "NVFP4", "W4A16"],
        ["memoryless-minmax", "imatrix_mse", "optimal:objective=hessian,negative_scales=true"],
        ["norm=2", "negative_scales=false"],
    )
    assert [run.name for run in runs[:3]] == [
        "memoryless_minmax",
        "imatrix_mse norm=2",
        "optimal negative_scales=True objective=hessian",
    ]
    assert [run.scheme for run in runs] == ["W4A16"] * 3 + ["NVFP4"] * 3
    with pytest.raises(CalipersError, match="none of memoryless_minmax has an option 'norm'"):
        plan_runs(["W4A16"], ["memoryless_minmax"], ["norm=2"])


# -- what it looks like ----------------------------------------------------------------------


def result_of(observer: str, change: Difference | OutputError) -> RunResult:
    after = Perplexity((1340.0, 1430.0), (511, 511))
    return RunResult(
        Run("W4A16", observer, {}),
        0.1015,
        after if isinstance(change, Difference) else None,
        change,
        112_000_000,
        12.34,
        None,
    )


BEFORE = Perplexity((1300.0, 1400.0), (511, 511))
RESULTS = [
    result_of("memoryless_minmax", Difference(0.0685, 0.0049)),
    result_of("optimal", Difference(0.0185, None)),
]

NARROW = """\
./model
unquantized
  perplexity: 14.040 ± 1.374, size: 269.0 MB
W4A16
  observer: memoryless_minmax, weight error: 0.1015
  perplexity: 15.035 ± 1.324, change: +7.09% ± 0.52%
  size: 112.0 MB, seconds: 12.3
W4A16
  observer: optimal, weight error: 0.1015
  perplexity: 15.035 ± 1.324, change: +1.87%, size: 112.0 MB
  seconds: 12.3
calibrated with  embedded calibration text: 2 sequences, 16
                 tokens
judged by        embedded held-out text: 1 sequences, 8
                 tokens
W4A16            optimal: a verdict of some length that
                 takes more than one line"""

WIDE = """\
./model
╭─────────────┬───────────────────┬──────────────┬────────────────┬────────────────┬──────────┬─────────╮
│ scheme      │ observer          │ weight error │     perplexity │         change │     size │ seconds │
├─────────────┼───────────────────┼──────────────┼────────────────┼────────────────┼──────────┼─────────┤
│ unquantized │ -                 │            - │ 14.040 ± 1.374 │              - │ 269.0 MB │       - │
│ W4A16       │ memoryless_minmax │       0.1015 │ 15.035 ± 1.324 │ +7.09% ± 0.52% │ 112.0 MB │    12.3 │
│ W4A16       │ optimal           │       0.1015 │ 15.035 ± 1.324 │         +1.87% │ 112.0 MB │    12.3 │
╰─────────────┴───────────────────┴──────────────┴────────────────┴────────────────┴──────────┴─────────╯
calibrated with  embedded calibration text: 2 sequences, 16 tokens
judged by        embedded held-out text: 1 sequences, 8 tokens
W4A16            optimal: a verdict of some length that takes more than one line"""  # noqa: E501

PIPE = """\
./model
 scheme       observer           weight error      perplexity          change      size  seconds
 unquantized  -                             -  14.040 ± 1.374               -  269.0 MB        -
 W4A16        memoryless_minmax        0.1015  15.035 ± 1.324  +7.09% ± 0.52%  112.0 MB     12.3
 W4A16        optimal                  0.1015  15.035 ± 1.324          +1.87%  112.0 MB     12.3
calibrated with  embedded calibration text: 2 sequences, 16 tokens
judged by        embedded held-out text: 1 sequences, 8 tokens
W4A16            optimal: a verdict of some length that takes more than one line"""


@pytest.mark.parametrize(("width", "text"), [(60, NARROW), (120, WIDE), (None, PIPE)])
def test_layout(monkeypatch: pytest.MonkeyPatch, width: int | None, text: str) -> None:
    comparison = Comparison(
        "./model",
        TokenizedText("embedded calibration text", [torch.zeros(2, 8)]),
        TokenizedText("embedded held-out text", [torch.zeros(1, 8)]),
        BEFORE,
        269_000_000,
        RESULTS,
        {"W4A16": "optimal: a verdict of some length that takes more than one line"},
    )
    shown = show(monkeypatch, width, lambda: print_comparison("./model", comparison))
    assert shown == text


def test_what_was_tried_already_is_not_advised() -> None:
    hessian = replace(RESULTS[0], objective="hessian")
    imatrix = [replace(each, objective="imatrix") for each in RESULTS]
    assert "hessian" in judge_schemes(imatrix)["W4A16"]
    verdict = judge_schemes([RESULTS[1], hessian])["W4A16"]
    assert verdict.startswith("optimal: ")
    assert "hessian" not in verdict


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_broken_run_is_never_the_best_one(broken: float) -> None:
    bad, good = result_of("mse", Difference(broken, broken)), RESULTS[1]
    for results in ([bad, good], [good, bad]):
        assert judge_schemes(results)["W4A16"].startswith("optimal: ")
    assert judge_schemes([bad])["W4A16"].startswith("mse: broken")


# -- group sizes and plug-ins ----------------------------------------------------------------


def test_a_size_that_fits_is_chosen_without_a_scheme(
    calipers: Calipers, narrow: Path, texts: Path
) -> None:
    given = ("compare", narrow, "--observer", "memoryless_minmax", *texts_of(texts))
    (run,) = succeeded(calipers(*given, "--json"))["runs"]
    assert run["group_size"] == 64
    assert "64, since 128 does not divide the columns of 12 of 14" in calipers(*given).stdout


def test_a_group_size_goes_to_the_schemes_that_have_one(
    calipers: Calipers, narrow: Path, texts: Path
) -> None:
    schemes = ("--scheme", "W4A16", "--scheme", "NVFP4A16", "--group-size", 32)
    given = ("compare", narrow, "--observer", "memoryless_minmax", *schemes, *texts_of(texts))
    assert [run["group_size"] for run in succeeded(calipers(*given, "--json"))["runs"]] == [
        32,
        None,
    ]
    none = ("--scheme", "FP8_DYNAMIC", "--group-size", 32)
    assert "no weights in groups" in error_of(calipers("compare", narrow, *none))


def test_an_observer_of_ones_own(
    calipers: Calipers, llama: Path, texts: Path, tmp_path: Path
) -> None:
    plugin = tmp_path / "compared_observers.py"
    plugin.write_text(
        "from calipers.observers import MemorylessMinMaxObserver, Observer\n\n\n"
        "@Observer.register('compared_own')\n"
        "class Own(MemorylessMinMaxObserver):\n    pass\n",
        encoding="utf-8",
    )
    given = ("compare", llama, "--plugin", plugin, "--observer", "compared_own", *texts_of(texts))
    assert [run["observer"] for run in succeeded(calipers(*given, "--json"))["runs"]] == [
        "compared_own"
    ]


def test_all_observers_in_one_pass_and_a_page_of_them(
    calipers: Calipers, llama: Path, texts: Path, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    given = (*("compare", llama, "--scheme", "W4A16", "--group-size", 32), *texts_of(texts))
    result = succeeded(calipers(*given, "--observers", "all", "--out", page, "--json"))
    (run,) = result["runs"]
    assert run["observer"] == "optimal"
    names = {row["observer"] for row in run["shadows"]}
    assert {"optimal", "optimal:objective=imatrix", "memoryless_minmax"} <= names
    assert all(row["judged"] for row in run["shadows"])
    text = page.read_text(encoding="utf-8")
    assert "Observers side by side" in text
    assert "imatrix_mse" in text
    assert "exists" in error_of(calipers(*given, "--out", page))
    told = error_of(calipers(*given, "--observers", "optimal"))
    assert "--observers: expected 'all', or several names, got 'optimal'" in told
    told = error_of(calipers(*given, "--observers", "all", "--observer", "optimal"))
    assert "--observers: expected alone" in told


def test_observers_of_nvfp4_are_among_all_where_it_is(calipers: Calipers) -> None:
    assert "nvfp4_headroom" not in _in_one_pass("all", ["W4A16"])[1]
    assert "nvfp4_headroom" in _in_one_pass("all", ["W4A16", "NVFP4A16"])[1]
    assert _in_one_pass("mse, optimal", ["W4A16"]) == (["mse"], ["optimal"])
