"""`calipers calibrate` end to end, on a tiny random Llama."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, MambaForCausalLM

import architectures
from calipers.calibration import CalibrationReport, ModuleReport
from calipers.checkpoint import opening
from calipers.demo import HELDOUT_TEXT
from cli.conftest import SENTENCES, Calipers, error_of, succeeded

FIELDS = {
    "model",
    "scheme",
    "group_size",
    "kv_cache",
    "out",
    "data",
    "statistics",
    "eval",
    "memory",
    "propagate",
    "no_text",
    "perplexity_before",
    "perplexity_after",
    "change",
    "output_error",
    "measures",
    "verdict",
    "bytes_before",
    "bytes_after",
    "seconds",
    "peak_memory_bytes",
    "calibration",
}
LAYER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def modules(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in result["calibration"]["modules"]}


def quantization_of(checkpoint: Path) -> dict[str, Any]:
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    return config["quantization_config"]


def test_text_to_checkpoint_with_most_options(
    calipers: Calipers, llama: Path, texts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "deep" / "out"
    result = succeeded(
        calipers(
            *("calibrate", llama, "--scheme", "W4A16", "--observer", "imatrix_mse"),
            *("--option", "norm=2", "--option", "grid=10", "--option", "strict=true"),
            *("--data", texts / "text.txt", "--samples", 3, "--sequence-length", 16),
            *("--ignore", "lm_head", "--ignore", "re:.*down_proj$", "--eval", texts / "text.txt"),
            *("--on-missing", "skip", "--device", "cpu", "--dtype", "float32"),
            *("--out", out, "--json"),
        )
    )
    assert result.keys() == FIELDS
    assert result["model"] == str(llama)
    assert result["scheme"] == "W4A16"
    assert result["out"] == str(out)
    text = str(texts / "text.txt")
    assert result["data"] == {"text": text, "sequences": 3, "tokens": 48, "with_media": 0}
    assert result["eval"]["text"] == text
    assert result["no_text"] is None
    assert 1 < result["perplexity_before"] < 1000
    assert result["perplexity_after"] != result["perplexity_before"]
    relative = result["perplexity_after"] / result["perplexity_before"] - 1
    assert result["change"]["value"] == pytest.approx(relative)
    assert result["change"]["standard_error"] > 0
    assert "perplexity" in result["verdict"] or "difference" in result["verdict"]
    assert result["output_error"] is None
    assert 0 < result["bytes_after"] < result["bytes_before"]
    assert 0 < result["calibration"]["seconds"] <= result["seconds"]
    assert result["peak_memory_bytes"] > result["bytes_before"]

    assert set(result["calibration"]) == set(CalibrationReport.__dataclass_fields__)
    assert result["calibration"]["batches"] == 1
    assert result["calibration"]["skipped"] == []
    rows = modules(result)
    assert {name.rpartition(".")[2] for name in rows} == {*LAYER} - {"down_proj"}
    for row in rows.values():
        assert set(row) == set(ModuleReport.__dataclass_fields__)
        assert row["weight_observer"] == "imatrix_mse"
        assert row["weight_bits"] == 4
        assert 0 < row["weight_error"] < 0.2
        assert row["activation_observer"] is None
        assert row["tokens"] == 3 * 16
        assert row["fallback"] == []

    weights = quantization_of(out)["config_groups"]["group_0"]["weights"]
    assert weights["observer"] == "imatrix_mse"
    assert weights["observer_kwargs"] == {"norm": 2, "grid": 10, "strict": True}
    assert {path.name for path in out.parent.iterdir()} == {"out"}

    loaded = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer(SENTENCES, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = loaded(input_ids=ids).logits
        plain = AutoModelForCausalLM.from_pretrained(llama)(input_ids=ids).logits
    assert bool(logits.isfinite().all())
    # Weights that are 10% off move the logits, and by no more than a part of their range.
    difference = (logits - plain).abs().max() / plain.abs().max()
    assert 1e-4 < difference < 0.5


def test_shadows(calipers: Calipers, llama: Path, texts: Path) -> None:
    given = ("--scheme", "FP8", "--samples", 3, "--sequence-length", 16, "--no-eval")
    given += ("--data", texts / "text.txt", "--observer", "memoryless_minmax", "--pick", "best")
    given += ("--shadow", "optimal:objective=hessian", "--shadow", "Imatrix-MSE:norm=2,grid=10")
    given += ("--activation-shadow", "histogram")
    result = succeeded(calipers("calibrate", llama, *given, "--json"))
    assert result["calibration"]["held_out"] == 0  # one batch
    for row in modules(result).values():
        weights, inputs = row["shadows"]["weight"], row["shadows"]["input"]
        assert [each["observer"] for each in weights] == [
            "memoryless_minmax",
            "optimal:objective=hessian",
            "imatrix_mse:norm=2,grid=10",
        ]
        assert [each["observer"] for each in inputs] == ["static_minmax", "histogram"]
        for rows in (weights, inputs):
            best = min(rows, key=lambda each: each["error"])
            assert [each for each in rows if each["chosen"]] == [best]
            assert best["judged_by"] == "in-sample"
    shown = calipers("calibrate", llama, *given)
    assert shown.exit_code == 0
    assert "in-sample error" in shown.stdout
    assert "optimal:objective=hessian" in shown.stdout


def test_defaults(calipers: Calipers, llama: Path) -> None:
    """Nothing but a model: text of our own, the observer `optimal`, and a verdict."""
    result = succeeded(calipers("calibrate", llama, "--json"))
    assert result["scheme"] == "W4A16"
    assert result["group_size"] == 128
    assert result["out"] is None
    # 64 is what the model's config allows.
    text = {"text": "embedded calibration text", "sequences": 128, "tokens": 128 * 64}
    assert result["data"] == {**text, "with_media": 0}
    assert result["eval"]["text"] == "embedded held-out text"
    assert result["eval"]["sequences"] > 70
    assert result["no_text"] is None
    assert result["change"]["value"] != 0
    assert result["change"]["standard_error"] > 0
    assert "perplexity" in result["verdict"] or "no difference" in result["verdict"]
    assert result["calibration"]["batches"] == 128
    rows = modules(result)
    assert len(rows) == 2 * len(LAYER)
    assert not any("lm_head" in name for name in rows)
    assert {(row["weight_observer"], row["objective"]) for row in rows.values()} == {
        ("optimal", "hessian")
    }


def test_without_data_and_judgement(calipers: Calipers, llama: Path) -> None:
    result = succeeded(calipers("calibrate", llama, "--no-data", "--no-eval", "--json"))
    assert result["data"] is result["eval"] is result["verdict"] is result["change"] is None
    assert result["perplexity_before"] is result["perplexity_after"] is None
    assert result["calibration"]["batches"] == 0
    assert {row["weight_observer"] for row in modules(result).values()} == {"memoryless_minmax"}


def test_models_without_a_head_are_judged_by_their_outputs(calipers: Calipers, bert: Path) -> None:
    given = ("calibrate", bert, "--samples", 8, "--eval-samples", 8)
    result = succeeded(calipers(*given, "--json"))
    assert result["perplexity_before"] is result["change"] is None
    assert 0.001 < result["output_error"]["value"] < 1
    assert result["output_error"]["standard_error"] > 0
    assert "output error" in result["verdict"]
    text = calipers(*given).stdout
    assert re.search(r"^output error +0\.\d{4} ± 0\.\d{4}$", text, re.MULTILINE)


@pytest.mark.parametrize("option", ["--data", "--eval"])
def test_text_and_none_exclude_each_other(
    calipers: Calipers, llama: Path, texts: Path, option: str
) -> None:
    both = (option, texts / "text.txt", option.replace("--", "--no-"))
    assert "exclude each other" in error_of(calipers("calibrate", llama, *both))


@pytest.mark.parametrize(
    ("file", "options", "tokens"),
    [
        ("text.txt", ("--samples", 2, "--sequence-length", 8), 16),
        # max_position_embeddings is 64
        ("text.txt", ("--samples", 2), 128),
        ("text.jsonl", ("--sequence-length", 8), 24),
        ("text.jsonl", ("--samples", 2, "--sequence-length", 8), 16),
        ("chat.jsonl", ("--sequence-length", 8), 16),
    ],
)
def test_data_files(
    calipers: Calipers,
    llama: Path,
    texts: Path,
    file: str,
    options: tuple[object, ...],
    tokens: int,
) -> None:
    result = succeeded(
        calipers(
            *("calibrate", llama, "--scheme", "FP8", "--observer", "memoryless_minmax"),
            *("--activation-observer", "minmax", "--data", texts / file, *options, "--json"),
        )
    )
    rows = modules(result)
    assert len(rows) == 2 * len(LAYER)
    assert {row["activation_observer"] for row in rows.values()} == {"minmax"}
    assert {row["weight_observer"] for row in rows.values()} == {"memoryless_minmax"}
    assert {row["tokens"] for row in rows.values()} == {tokens}


def test_yaml_scheme(calipers: Calipers, llama: Path, tmp_path: Path) -> None:
    scheme = tmp_path / "int3.yaml"
    scheme.write_text(
        "weights: {num_bits: 3, type: int, strategy: channel, observer: memoryless_minmax}\n",
        encoding="utf-8",
    )
    rows = modules(succeeded(calipers("calibrate", llama, "--scheme", scheme, "--json")))
    assert {(row["weight_bits"], row["weight_observer"]) for row in rows.values()} == {
        (3, "memoryless_minmax")
    }


def test_unquantized_keeps_the_size(calipers: Calipers, llama: Path) -> None:
    result = succeeded(calipers("calibrate", llama, "--scheme", "UNQUANTIZED", "--json"))
    assert result["calibration"]["modules"] == []
    assert result["bytes_after"] == result["bytes_before"]


def test_dtype_halves_the_model(calipers: Calipers, llama: Path) -> None:
    fast = ("--observer", "memoryless_minmax", "--no-eval", "--json")
    stored = succeeded(calipers("calibrate", llama, *fast))
    half = succeeded(calipers("calibrate", llama, "--dtype", "bfloat16", *fast))
    # The rotary frequencies, a buffer of 16 values, stay float32.
    assert stored["bytes_before"] / 2 == pytest.approx(half["bytes_before"], abs=256)


def test_plain_output(calipers: Calipers, llama: Path, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = calipers(
        *("calibrate", llama, "--observer", "memoryless_minmax", "--eval", texts / "text.txt"),
        *("--out", out),
    )
    assert result.exit_code == 0, result.output
    assert "\x1b" not in result.stdout
    assert not any("─" <= char <= "╿" for char in result.stdout)
    lines = result.stdout.splitlines()
    assert lines[0].strip() == f"{llama}, scheme W4A16"
    heading = "modules count observer bits relative weight error activations tokens"
    assert lines[1].split() == heading.split()
    rows = {line.split()[0]: line.split() for line in lines[2 : 2 + len(LAYER)]}
    name = "model.layers.*.self_attn.q_proj"
    assert rows[name][1:4] == ["2", "memoryless_minmax", "4"]
    assert len(rows) == len(LAYER)
    tail = {line.split("  ")[0].strip(): line for line in lines[2 + len(LAYER) :]}
    assert {"perplexity", "size", "time", "peak memory", "checkpoint"} <= tail.keys()
    assert "->" in tail["perplexity"]
    assert "%" in tail["perplexity"]
    assert tail["checkpoint"].endswith(str(out))


def test_plain_output_without_checkpoint(calipers: Calipers, llama: Path) -> None:
    result = calipers("calibrate", llama, "--observer", "memoryless_minmax")
    assert result.exit_code == 0, result.output
    assert "not written (no --out)" in result.stdout
    assert "judged by" in result.stdout
    assert "calibrated with" not in result.stdout  # min/max looks at no data


@pytest.mark.usefixtures("unreached")
def test_what_the_embedded_text_does_not_reach_is_calibrated_without(
    calipers: Calipers, llama: Path
) -> None:
    result = succeeded(calipers("calibrate", llama, "--no-eval", "--json"))
    assert modules(result)["model.spare.unreached"]["fallback"] == ["weight"]


# -- modules without data --------------------------------------------------------------------


@pytest.fixture
def unreached(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loaded model gets one Linear that no token ever reaches."""

    def load(*args: Any, **kwargs: Any) -> Any:
        model = opening.load_model(*args, **kwargs)
        model.model.spare = nn.ModuleDict({"unreached": nn.Linear(128, 128, bias=False)})
        return model

    monkeypatch.setattr("calipers.cli.ways.load_model", load)


@pytest.mark.usefixtures("unreached")
@pytest.mark.parametrize("choice", [None, "error", "skip", "fallback"])
def test_on_missing(calipers: Calipers, llama: Path, texts: Path, choice: str | None) -> None:
    result = calipers(
        *("calibrate", llama, "--observer", "imatrix_mse", "--option", "grid=2", "--json"),
        *("--data", texts / "text.txt", "--samples", 1, "--sequence-length", 16),
        *(() if choice is None else ("--on-missing", choice)),
    )
    if choice in (None, "error"):
        assert "model.spare.unreached.weight" in error_of(result)
        return
    calibration = succeeded(result)["calibration"]
    rows = {row["name"]: row for row in calibration["modules"]}
    if choice == "skip":
        assert calibration["skipped"] == ["model.spare.unreached"]
        assert "model.spare.unreached" not in rows
    else:
        assert calibration["skipped"] == []
        assert rows["model.spare.unreached"]["fallback"] == ["weight"]
        assert rows["model.spare.unreached"]["tokens"] == 0


@pytest.mark.usefixtures("unreached")
@pytest.mark.parametrize(
    ("choice", "expected"), [("skip", "left unquantized"), ("fallback", "(fallback: weight)")]
)
def test_plain_output_names_modules_without_data(
    calipers: Calipers, llama: Path, texts: Path, choice: str, expected: str
) -> None:
    result = calipers(
        *("calibrate", llama, "--observer", "imatrix_mse", "--option", "grid=2"),
        *("--data", texts / "text.txt", "--samples", 1, "--sequence-length", 16),
        *("--on-missing", choice),
    )
    assert result.exit_code == 0, result.output
    line = next(line for line in result.stdout.splitlines() if "model.spare.unreached" in line)
    assert expected in line


# -- the place of the checkpoint -------------------------------------------------------------


def test_refuses_to_overwrite_before_any_work(
    calipers: Calipers, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def must_not_load(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the model was loaded before --out was checked")

    monkeypatch.setattr("calipers.cli.ways.load_model", must_not_load)
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine", encoding="utf-8")
    message = error_of(calipers("calibrate", llama, "--out", out))
    assert message.startswith(f"error: {out} exists")
    assert "--force" in message
    assert (out / "mine.txt").read_text(encoding="utf-8") == "mine"


def test_force_replaces(calipers: Calipers, llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine", encoding="utf-8")
    options = ("--observer", "memoryless_minmax", "--out", out, "--force", "--json")
    succeeded(calipers("calibrate", llama, *options))
    assert not (out / "mine.txt").exists()
    assert quantization_of(out)["quantization_status"] == "compressed"


def test_a_failed_write_leaves_nothing_behind(
    calipers: Calipers, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: Path, to: Path) -> None:
        assert (to.parent / "model.safetensors").exists()
        raise OSError("no space left on device")

    monkeypatch.setattr("shutil.copyfile", full)
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine", encoding="utf-8")
    options = ("--no-data", "--no-eval", "--out", out, "--force", "--json")
    assert "no space left" in error_of(calipers("calibrate", llama, *options))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("place", ["{llama}", "{link}", "{llama}/out", "{llama}/.."])
def test_the_model_itself_is_never_overwritten(
    calipers: Calipers, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def must_not_load(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the model was loaded before --out was checked")

    monkeypatch.setattr("calipers.cli.ways.load_model", must_not_load)
    link = tmp_path / "link"
    link.symlink_to(llama)
    before = sorted(llama.rglob("*"))
    out = place.format(llama=llama, link=link)
    message = error_of(calipers("calibrate", llama, "--out", out, "--force"))
    assert "the folder that the model was loaded from" in message
    assert sorted(llama.rglob("*")) == before


def test_a_place_that_cannot_be_written_is_refused_before_any_work(
    calipers: Calipers, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def must_not_load(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the model was loaded before --out was checked")

    monkeypatch.setattr("calipers.cli.ways.load_model", must_not_load)
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    message = error_of(calipers("calibrate", llama, "--out", tmp_path / "file" / "out"))
    assert "cannot be written" in message


@pytest.fixture
def bare(llama: Path, tmp_path: Path) -> Path:
    """The model without its tokenizer."""
    path = tmp_path / "bare"
    path.mkdir()
    for name in ("config.json", "model.safetensors"):
        (path / name).write_bytes((llama / name).read_bytes())
    return path


def test_without_a_tokenizer_there_is_no_text_and_it_is_said(
    calipers: Calipers, bare: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = succeeded(calipers("calibrate", bare, "--out", out, "--json"))
    assert result["no_text"].startswith("its tokenizer does not load: ")
    assert result["data"] is result["eval"] is result["verdict"] is None
    assert {row["weight_observer"] for row in modules(result).values()} == {"memoryless_minmax"}
    assert not any("token" in path.name for path in out.iterdir())
    assert AutoModelForCausalLM.from_pretrained(out).config.vocab_size == 320
    text = calipers("calibrate", bare).stdout
    assert re.search("^no text +its tokenizer does not load: ", text, re.MULTILINE)
    quiet = succeeded(calipers("calibrate", bare, "--no-data", "--no-eval", "--json"))
    assert quiet["no_text"] is None


@pytest.mark.parametrize(
    "options", [("--scheme", "FP8"), ("--observer", "optimal"), ("--data", "{texts}/text.txt")]
)
def test_without_a_tokenizer_what_needs_text_is_refused(
    calipers: Calipers, bare: Path, texts: Path, options: tuple[str, ...]
) -> None:
    given = [option.format(texts=texts) for option in options]
    message = error_of(calipers("calibrate", bare, *given))
    assert f"{bare}: " in message
    assert "its tokenizer does not load" in message or "its own does not load" in message


@pytest.mark.parametrize("data", [True, False], ids=["data", "no data"])
def test_what_belongs_to_the_model_comes_along(
    calipers: Calipers, llama: Path, texts: Path, tmp_path: Path, data: bool
) -> None:
    source = tmp_path / "source"
    shutil.copytree(llama, source)
    for name in ("preprocessor_config.json", "modeling_own.py"):
        (source / name).write_text("{}", encoding="utf-8")
    out = tmp_path / "out"
    options = ("--data", texts / "text.txt", "--samples", 2) if data else ("--no-data", "--no-eval")
    fast = ("--observer", "memoryless_minmax", *options)
    succeeded(calipers("calibrate", source, *fast, "--out", out, "--json"))
    for name in ("preprocessor_config.json", "modeling_own.py"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    loaded, own = AutoTokenizer.from_pretrained(out), AutoTokenizer.from_pretrained(source)
    assert loaded(SENTENCES)["input_ids"] == own(SENTENCES)["input_ids"]
    assert loaded.chat_template == own.chat_template


def test_how_it_was_loaded_is_not_saved_with_the_tokenizer(
    calipers: Calipers, llama: Path, texts: Path, tmp_path: Path
) -> None:
    options = ("--data", texts / "text.txt", "--samples", 2, "--out", tmp_path / "out", "--json")
    succeeded(calipers("calibrate", llama, "--observer", "memoryless_minmax", *options))
    saved = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert saved["model_max_length"]
    assert "local_files_only" not in saved


def test_a_model_put_aside_by_a_killed_save_is_put_back(
    calipers: Calipers, llama: Path, tmp_path: Path
) -> None:
    aside = tmp_path / ".model.0123abcd.old"
    shutil.copytree(llama, aside)
    os.utime(aside, (0, 0))
    succeeded(calipers("calibrate", tmp_path / "model", "--json"))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# -- errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--scheme", "W4A61"), "unknown scheme 'W4A61'. Did you mean 'W4A16'?"),
        (("--scheme", "missing.yaml"), "no such scheme file: missing.yaml"),
        (("--scheme", "FP8", "--no-data"), "needs data"),
        (("--observer", "imatrix_mse", "--no-data"), "needs data"),
        (("--observer", "mean"), "unknown observer 'mean'"),
        (("--observer", "optimall"), "unknown observer 'optimall'. Did you mean 'optimal'?"),
        (("--observer", "Imatrix-MES"), "Did you mean 'imatrix_mse'?"),
        (("--activation-observer", "mean", "--scheme", "FP8"), "unknown observer 'mean'"),
        (
            ("--observer", "memoryless_mse", "--option", "normm=2"),
            "unknown option 'normm' (did you mean 'norm'?)",
        ),
        (("--option", "norm"), "expected key=value, got 'norm'"),
        (("--shadow", "mze"), "unknown observer 'mze'"),
        (("--shadow", "mse:grid"), "shadow 'mse:grid': expected key=value, got 'grid'"),
        (("--pick", "best"), "pick='best' needs other observers"),
        (("--pick", "last", "--shadow", "mse"), "pick must be one of first, best, got 'last'"),
        (("--observer", "memoryless_mse", "--option", "norm=-1"), "norm=-1"),
        (("--ignore", "lm_haed"), "lm_haed"),
        (("--data", "missing.txt"), "missing.txt: no such file"),
        (("--eval", "missing.txt"), "missing.txt: no such file"),
        (("--data", "{texts}/wrong.jsonl"), "wrong.jsonl, line 2: expected an object with 'text'"),
        (("--data", "{texts}/broken.jsonl"), "broken.jsonl, line 2: not JSON"),
        (("--data", "{texts}/empty.txt"), "holds no sequence of at least two tokens"),
        (("--data", "{llama}/config.json"), "config.json: expected a list of samples"),
        (("--data", "{llama}/model.safetensors"), "expected a .txt, .csv, .json, .jsonl, .parquet"),
        (("--data", "{llama}"), "or a folder saved by datasets' save_to_disk"),
        (("--on-missing", "ignore"), "on_missing must be one of error, skip, fallback"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_errors_over_the_input(
    calipers: Calipers,
    llama: Path,
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    expected: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [option.format(texts=texts, llama=llama) for option in options]
    message = error_of(calipers("calibrate", llama, *given, "--json"))
    assert expected in " ".join(message.split())
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options",
    [
        ("--dtype", "float33"),
        ("--dtype", "add"),
        ("--device", "gpu"),
        ("--option", "norm=["),
    ],
    ids=" ".join,
)
def test_values_that_name_nothing(
    calipers: Calipers, llama: Path, options: tuple[str, ...]
) -> None:
    name, value = options
    message = error_of(calipers("calibrate", llama, *options))
    assert name.strip("-") in message
    assert value in message


def test_messages_stay_on_one_line(calipers: Calipers, llama: Path) -> None:
    """However long: what reads standard error line by line must find all of it."""
    message = error_of(calipers("calibrate", llama, "--scheme", "W4A61"))
    assert len(message) > 200
    assert "\n" not in message


def test_a_folder_without_a_model(calipers: Calipers, tmp_path: Path) -> None:
    message = error_of(calipers("calibrate", tmp_path))
    assert message == (
        f"error: {tmp_path}: expected a local transformers directory with a config.json"
    )
    assert error_of(calipers("calibrate", tmp_path / "none")).startswith("error: ")


def test_a_model_of_the_hub_is_downloaded_first(
    calipers: Calipers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    message = error_of(calipers("calibrate", "HuggingFaceTB/SmolLM2-135M"))
    assert "`hf download HuggingFaceTB/SmolLM2-135M --local-dir SmolLM2-135M`" in message
    assert "snapshot_download('HuggingFaceTB/SmolLM2-135M')" in message
    for path in ("./SmolLM2-135M", "SmolLM2-135M", "a/b/c", "/a/b"):
        assert "hf download" not in error_of(calipers("calibrate", path))


def test_messages_without_a_chat_template(
    calipers: Calipers, llama: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.chat_template = None
    monkeypatch.setattr("calipers.cli.calibrate.load_tokenizer", lambda path: tokenizer)
    message = error_of(calipers("calibrate", llama, "--data", texts / "chat.jsonl"))
    assert "line 1" in message
    assert "no chat template" in message


@pytest.mark.parametrize(
    "options",
    [
        ("--samples", "0"),
        ("--sequence-length", "1"),
        ("--samples", "many"),
        ("--no-such-option",),
        ("another", "argument"),
        ("--scheme",),
    ],
    ids=" ".join,
)
def test_usage_errors(calipers: Calipers, llama: Path, options: tuple[str, ...]) -> None:
    result = calipers("calibrate", llama, *options)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr


def test_a_fault_of_ours_is_no_error_of_the_user(
    calipers: Calipers, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise ZeroDivisionError("a fault")

    monkeypatch.setattr("calipers.cli.ways.run_plan", fail)
    with pytest.raises(ZeroDivisionError):
        calipers("calibrate", llama)


def test_embedded_demo_model_is_the_default(
    calipers: Calipers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # All of the held-out text would take half a minute.
    short = tmp_path / "heldout.txt"
    short.write_text(HELDOUT_TEXT.read_text(encoding="utf-8")[:4000], encoding="utf-8")
    monkeypatch.setattr("calipers.cli.texts.HELDOUT_TEXT", short)
    result = succeeded(
        calipers(
            *("calibrate", "--observer", "memoryless_minmax", "--samples", 1, "--json"),
            *("--sequence-length", 128),
        )
    )
    assert result["model"] == "demo"
    assert result["eval"]["text"] == "the demo model's held-out text"
    assert 1 < result["perplexity_before"] < 100
    assert result["perplexity_after"] == pytest.approx(result["perplexity_before"], rel=0.1)
    assert result["calibration"]["batches"] == 0  # min/max needs no data, so none is run


# -- what would not load back ----------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[str], Path]:
    """A tiny random model of a named architecture, in a folder."""

    def save(name: str) -> Path:
        getattr(architectures, name)().save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


@pytest.mark.usefixtures("without_help")
def test_what_would_not_load_back_is_refused_before_the_work(
    calipers: Calipers,
    saved: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def must_not_run(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("there was work before the load check")

    monkeypatch.setattr("calipers.cli.ways.run_plan", must_not_run)
    out = tmp_path / "out"
    message = error_of(calipers("calibrate", saved("falcon"), "--out", out))
    assert "would not load back" in message
    assert "transformer.h.*.mlp.dense_4h_to_h" in message
    assert "--no-load-check" in message
    assert not out.exists()


def test_the_load_check_can_be_switched_off(
    calipers: Calipers, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = ("--no-data", "--out", out, "--no-load-check", "--json")
    succeeded(calipers("calibrate", saved("falcon"), *options))
    assert quantization_of(out)["format"] == "pack-quantized"


def test_without_out_nothing_needs_to_load_back(
    calipers: Calipers, saved: Callable[[str], Path]
) -> None:
    succeeded(calipers("calibrate", saved("falcon"), "--json"))


@pytest.mark.usefixtures("without_help")
def test_what_would_not_load_back_can_be_left_alone(
    calipers: Calipers, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = ("--out", out, "--on-unfit", "skip", "--json")
    result = succeeded(calipers("calibrate", saved("mamba"), *options))
    reasons = {row["name"]: row["reason"] for row in result["calibration"]["left_alone"]}
    assert reasons["backbone.layers.1.mixer.out_proj"] == "cannot be loaded back"
    loaded = MambaForCausalLM.from_pretrained(out)
    assert loaded(torch.arange(8).reshape(1, 8)).logits.isfinite().all()


# -- the report ------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "count"), [((), 5), (("--worst", 2), 2), (("--worst", 0), 0)])
def test_the_worst_modules_are_named(
    calipers: Calipers, llama: Path, options: tuple[object, ...], count: int
) -> None:
    given = ("calibrate", llama, "--samples", 8, "--no-eval")
    rows = succeeded(calipers(*given, "--json"))["calibration"]["modules"]
    rows.sort(key=lambda row: row["weight_error"], reverse=True)
    text = calipers(*given, *options).stdout
    _, heading, tail = text.partition("The largest weight errors")
    assert bool(heading) == bool(count)
    shown = [line.split() for line in tail.splitlines() if line.strip().startswith("model.layers")]
    wanted = [[row["name"], f"{row['weight_error']:.4f}"] for row in rows[:count]]
    assert [each[:2] for each in shown] == wanted
    measures = [row["weight"] for row in rows[:count]]
    assert [each[2] for each in shown] == [f"{m['output_error']:.4f}" for m in measures]
    assert [each[3] for each in shown] == [f"{m['sqnr_db']:.1f}" for m in measures]


def test_dynamic_activations_are_called_so(calipers: Calipers, llama: Path) -> None:
    fast = ("--observer", "memoryless_minmax", "--no-eval")
    text = calipers("calibrate", llama, "--scheme", "FP8_DYNAMIC", *fast).stdout
    row = next(line for line in text.splitlines() if "q_proj" in line)
    assert row.split()[-2:] == ["dynamic", "0"]


@pytest.mark.parametrize(
    ("word", "shape"), [("fp8", (1,)), ("int8-head", (2, 1, 1)), ("FP8_HEAD", (2, 1, 1))]
)
def test_a_cache_alone(
    calipers: Calipers, llama: Path, tmp_path: Path, word: str, shape: tuple[int, ...]
) -> None:
    out = tmp_path / "out"
    result = succeeded(
        calipers(
            *("calibrate", llama, "--scheme", "UNQUANTIZED", "--kv-cache", word, "--out", out),
            *("--samples", 4, "--eval-samples", 2, "--json"),
        )
    )
    assert result["kv_cache"] == word.upper().replace("-", "_")
    assert result["perplexity_after"] != result["perplexity_before"]
    rows = modules(result)
    assert {name: row["states"] for name, row in rows.items()} == {
        f"model.layers.{layer}.self_attn": ["k", "v"] for layer in range(2)
    }
    assert {row["activation_observer"] for row in rows.values()} == {"static_minmax"}
    tensors = load_file(out / "model.safetensors")
    scales = {name: tuple(each.shape) for name, each in tensors.items() if "_scale" in name}
    assert scales == {f"{name}.{state}_scale": shape for name in rows for state in ("k", "v")}
    config = quantization_of(out)
    assert config["config_groups"] == {}
    assert config["kv_cache_scheme"]["num_bits"] == 8


def test_a_cache_of_a_scheme_file(calipers: Calipers, llama: Path, tmp_path: Path) -> None:
    scheme = tmp_path / "scheme.yaml"
    scheme.write_text(
        "config_groups: {FP8_DYNAMIC: [Linear]}\n"
        "kv_cache_scheme: {num_bits: 8, type: float, strategy: attn_head}\n"
    )
    common = ("calibrate", llama, "--scheme", scheme, "--samples", 4, "--no-eval")
    result = succeeded(calipers(*common, "--json", "--activation-observer", "histogram"))
    assert result["kv_cache"] == "FP8_HEAD"
    rows = modules(result)
    assert len(rows) == 2 * len(LAYER) + 2
    assert rows["model.layers.0.self_attn"]["activation_observer"] == "histogram"
    text = calipers(*common).stdout
    assert re.search(r"^cache +FP8_HEAD$", text, re.MULTILINE)
    assert "model.layers.*.self_attn (k, v)" in text


def test_caches_that_cannot_be(calipers: Calipers, llama: Path, bert: Path) -> None:
    wrong = error_of(calipers("calibrate", llama, "--kv-cache", "fp9"))
    assert "--kv-cache" in wrong
    assert "Did you mean 'FP8'?" in wrong
    assert "k states of attention" in error_of(
        calipers("calibrate", llama, "--kv-cache", "fp8", "--no-data")
    )
    assert "finds no attention in BertModel" in error_of(
        calipers("calibrate", bert, "--kv-cache", "fp8", "--no-eval")
    )
