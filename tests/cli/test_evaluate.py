"""`calipers evaluate`: perplexity, size and loading of checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from calipers.cli.evaluate import print_evaluation
from calipers.evaluation import Difference, OutputError, Perplexity
from cli.conftest import Calipers, error_of, succeeded
from cli.terminal import show

FIELDS = {
    "path",
    "loads",
    "problem",
    "note",
    "bytes",
    "sequences",
    "tokens",
    "perplexity",
    "change",
    "output_error",
    "measures",
}


@pytest.fixture(scope="module")
def quantized(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from calipers import calibrate, save
    from calipers.checkpoint.opening import load_model

    out = tmp_path_factory.mktemp("quantized") / "llama-W4A16"
    model = load_model(llama, device="cpu", dtype="auto")
    calibrate(model, "W4A16", "memoryless_minmax")
    save(model, out, tokenizer=AutoTokenizer.from_pretrained(llama))
    return out


def options(texts: Path) -> tuple[object, ...]:
    return ("--eval", texts / "text.txt", "--samples", 4, "--sequence-length", 32)


def test_a_checkpoint_is_compared_with_the_first(
    calipers: Calipers, llama: Path, quantized: Path, texts: Path
) -> None:
    given = ("evaluate", llama, quantized, *options(texts), "--json")
    result = succeeded(calipers(*given))
    assert result.keys() == {"eval", "models"}
    assert result["eval"] == str(texts / "text.txt")
    first, second = result["models"]
    assert first.keys() == second.keys() == FIELDS
    assert [first["path"], second["path"]] == [str(llama), str(quantized)]
    for row in (first, second):
        assert row["loads"] is True
        assert row["problem"] is row["note"] is row["output_error"] is None
        assert (row["sequences"], row["tokens"]) == (4, 128)
        assert 1 < row["perplexity"]["value"] < 1000
        assert row["perplexity"]["standard_error"] > 0
    assert first["bytes"] == (llama / "model.safetensors").stat().st_size
    assert second["bytes"] == (quantized / "model.safetensors").stat().st_size
    assert first["change"] is first["measures"] is None
    measures = second["measures"]["perplexity"]
    assert 0 < measures["kl"] < 0.5
    assert measures["kl_error"] > 0
    assert 0.3 < measures["top1"] < 1
    assert measures["relative"] == second["change"]["value"]
    assert measures["relative_low"] < measures["relative"] < measures["relative_high"]
    ratio = second["perplexity"]["value"] / first["perplexity"]["value"] - 1
    assert ratio != 0
    assert second["change"]["value"] == pytest.approx(ratio, rel=1e-6)
    # Paired: less than half of what the two perplexities' own errors would make it.
    apart = first["perplexity"]["standard_error"] / first["perplexity"]["value"]
    assert 0 < second["change"]["standard_error"] < apart


def test_what_calibrate_says_is_what_evaluate_finds(
    calipers: Calipers, llama: Path, quantized: Path, texts: Path
) -> None:
    """The checkpoint holds what was judged before it was written."""
    rows = succeeded(calipers("evaluate", quantized, *options(texts), "--json"))["models"]
    text = ("--eval", texts / "text.txt", "--sequence-length", 32)
    fast = ("--observer", "memoryless_minmax")
    told = succeeded(calipers("calibrate", llama, *fast, *text, "--json"))
    all_of_it = succeeded(calipers("evaluate", quantized, *text, "--json"))["models"]
    assert all_of_it[0]["perplexity"]["value"] == pytest.approx(told["perplexity_after"], rel=1e-4)
    assert rows[0]["sequences"] < all_of_it[0]["sequences"]


def test_what_does_not_load_is_a_row(
    calipers: Calipers, llama: Path, texts: Path, tmp_path: Path
) -> None:
    torn, empty = tmp_path / "torn", tmp_path / "empty"
    shutil.copytree(llama, torn)
    weights = load_file(torn / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, torn / "model.safetensors", metadata={"format": "pt"})
    empty.mkdir()
    shutil.copy(llama / "config.json", empty)
    given = ("evaluate", tmp_path / "none", torn, empty, llama, *options(texts))
    result = calipers(*given, "--json")
    assert result.exit_code == 1
    assert "Traceback" not in result.output
    none, torn_row, empty_row, fine = json.loads(result.stdout)["models"]
    assert [row["loads"] for row in (none, torn_row, empty_row, fine)] == [False] * 3 + [True]
    assert none["problem"] == (
        f"{tmp_path / 'none'}: expected a local transformers directory with a config.json"
    )
    assert "lacks weights" in torn_row["problem"]
    assert "model.layers.1.mlp.up_proj.weight" in torn_row["problem"]
    assert empty_row["problem"]
    assert "\n" not in empty_row["problem"]
    assert fine["problem"] is None
    assert fine["perplexity"]["value"] > 1
    # What did not run is no first one to compare with.
    assert fine["change"] is None

    text = calipers(*given)
    assert text.exit_code == 1
    lines = text.stdout.splitlines()
    assert [line.split()[1] for line in lines[2:6]] == ["no", "no", "no", "yes"]
    assert sum(line.startswith("problem") for line in lines) == 3


def test_a_checkpoint_without_tokenizer_takes_the_first_ones(
    calipers: Calipers, llama: Path, texts: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(llama / name, bare)
    _, row = succeeded(calipers("evaluate", llama, bare, *options(texts), "--json"))["models"]
    assert row["change"] == {"value": 0.0, "standard_error": 0.0}
    alone = calipers("evaluate", bare, *options(texts), "--json")
    assert alone.exit_code == 1
    (row,) = json.loads(alone.stdout)["models"]
    assert row["loads"] is True
    assert "tokenizer does not load" in row["problem"]


def test_other_tokens_make_no_difference(
    calipers: Calipers, llama: Path, texts: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(llama, other)
    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.add_tokens(["quick brown"])
    tokenizer.save_pretrained(other)
    _, row = succeeded(calipers("evaluate", llama, other, *options(texts), "--json"))["models"]
    assert row["change"] is None
    assert row["note"] == "other tokens than the first one's: no difference"


def test_models_without_a_head_have_an_output_error(
    calipers: Calipers, bert: Path, texts: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(bert, moved)
    weights = load_file(moved / "model.safetensors")
    # The last norm scales the output: a tenth more of it is an error of a tenth (its bias is 0).
    weights["encoder.layer.0.output.LayerNorm.weight"] *= 1.1
    save_file(weights, moved / "model.safetensors", metadata={"format": "pt"})
    first, second = succeeded(calipers("evaluate", bert, moved, *options(texts), "--json"))[
        "models"
    ]
    assert first["perplexity"] is second["perplexity"] is None
    assert first["output_error"] is None
    assert second["output_error"]["value"] == pytest.approx(0.1, rel=1e-4)
    assert second["output_error"]["standard_error"] >= 0
    text = calipers("evaluate", bert, moved, *options(texts))
    assert text.stdout.splitlines()[1].split()[-2:] == ["output", "error"]


def test_the_text_is_checked_before_any_model(
    calipers: Calipers, llama: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def must_not_load(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the model was loaded before --eval was checked")

    with monkeypatch.context() as patch:
        patch.setattr("calipers.cli.evaluate.load_model", must_not_load)
        assert "no such file" in error_of(calipers("evaluate", llama, "--eval", texts / "none.txt"))
    message = error_of(calipers("evaluate", llama, "--eval", texts / "empty.txt"))
    assert "holds no sequence" in message


# -- what it looks like ----------------------------------------------------------------------

ROWS: list[dict[str, Any]] = [
    {
        "path": "./SmolLM2-135M",
        "loads": True,
        "problem": None,
        "bytes": 269_000_000,
        "sequences": 2,
        "tokens": 1024,
        "perplexity": Perplexity((1300.0, 1400.0), (511, 511)),
    },
    {
        "path": "./SmolLM2-135M-W4A16",
        "loads": True,
        "problem": None,
        "bytes": 112_000_000,
        "sequences": 2,
        "tokens": 1024,
        "perplexity": Perplexity((1340.0, 1430.0), (511, 511)),
        "change": Difference(0.0685, 0.0049),
    },
    {"path": "./broken", "loads": False, "problem": "no weights"},
]

NARROW = """\
Judged by the embedded held-out text
./SmolLM2-135M
  loads: yes, size: 269.0 MB, perplexity: 14.040 ± 1.374
./SmolLM2-135M-W4A16
  loads: yes, size: 112.0 MB, perplexity: 15.035 ± 1.324
  change: +7.09% ± 0.52%
./broken
  loads: no
sequences  2, 1,024 tokens
problem    ./broken: no weights"""

WIDE = """\
Judged by the embedded held-out text
╭──────────────────────┬───────┬──────────┬────────────────┬────────────────╮
│ model                │ loads │     size │     perplexity │         change │
├──────────────────────┼───────┼──────────┼────────────────┼────────────────┤
│ ./SmolLM2-135M       │ yes   │ 269.0 MB │ 14.040 ± 1.374 │              - │
│ ./SmolLM2-135M-W4A16 │ yes   │ 112.0 MB │ 15.035 ± 1.324 │ +7.09% ± 0.52% │
│ ./broken             │ no    │        - │              - │              - │
╰──────────────────────┴───────┴──────────┴────────────────┴────────────────╯
sequences  2, 1,024 tokens
problem    ./broken: no weights"""

PIPE = """\
Judged by the embedded held-out text
 model                 loads      size      perplexity          change
 ./SmolLM2-135M        yes    269.0 MB  14.040 ± 1.374               -
 ./SmolLM2-135M-W4A16  yes    112.0 MB  15.035 ± 1.324  +7.09% ± 0.52%
 ./broken              no            -               -               -
sequences  2, 1,024 tokens
problem    ./broken: no weights"""


@pytest.mark.parametrize(("width", "text"), [(60, NARROW), (120, WIDE), (None, PIPE)])
def test_layout(monkeypatch: pytest.MonkeyPatch, width: int | None, text: str) -> None:
    shown = show(monkeypatch, width, lambda: print_evaluation("the embedded held-out text", ROWS))
    assert shown == text


def test_output_errors_have_a_heading_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"path": "a", "loads": True, "problem": None, "bytes": 9, "sequences": 1, "tokens": 8},
        {
            "path": "b",
            "loads": True,
            "problem": None,
            "bytes": 9,
            "sequences": 1,
            "tokens": 8,
            "change": OutputError(0.1, None, 1, 8),
        },
    ]
    shown = show(monkeypatch, None, lambda: print_evaluation("x.txt", rows)).splitlines()
    assert shown[1].split() == ["model", "loads", "size", "perplexity", "output", "error"]
    assert shown[3].split() == ["b", "yes", "9", "bytes", "-", "0.1000"]
