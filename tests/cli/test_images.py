"""Samples with images on the command line: files that lie beside the data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from transformers import LlavaForConditionalGeneration

from calipers.calibration import calibrate
from cli.conftest import Calipers, error_of, succeeded, train_tokenizer
from multimodal_models import llava, llava_processor

Image = pytest.importorskip("PIL.Image")
FEW = ("--sequence-length", 16, "--eval-samples", 2)


def saved(path: Path, *, processor: bool) -> Path:
    with torch.random.fork_rng():
        llava().save_pretrained(path)
    made = llava_processor(train_tokenizer())
    (made if processor else made.tokenizer).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that sees, its tokenizer and its processor."""
    return saved(tmp_path_factory.mktemp("models") / "llava", processor=True)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two images and samples.jsonl, which names them, among a sample of text."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "images").mkdir()
    for seed in (0, 1):
        values = numpy.random.default_rng(seed).integers(0, 255, (40, 40, 3), dtype=numpy.uint8)
        Image.fromarray(values).save(folder / "images" / f"{seed}.png")
    part = {"type": "image", "path": "images/1.png"}
    write(
        folder / "samples.jsonl",
        {"text": "a <image> sat", "images": "images/0.png"},
        {"text": "no picture at all"},
        {"text": "<image> and <image>", "images": ["images/0.png", "images/1.png"]},
        {"messages": [{"role": "user", "content": [part, {"type": "text", "text": "a cat"}]}]},
    )
    return folder


def write(path: Path, *samples: dict[str, Any]) -> Path:
    path.write_text("".join(f"{json.dumps(each)}\n" for each in samples), encoding="utf-8")
    return path


def test_calibrate(calipers: Calipers, seeing: Path, pictures: Path, texts: Path) -> None:
    given = ("--scheme", "FP8", "--data", pictures / "samples.jsonl", "--eval", texts / "text.txt")
    result = succeeded(calipers("calibrate", seeing, *given, *FEW, "--json"))
    data = result["data"]
    assert (data["sequences"], data["with_media"]) == (4, 3)
    assert data["tokens"] > 4 * 16  # an image has 16
    assert result["eval"]["with_media"] == 0
    report = result["calibration"]
    assert report["batches"] == 4
    assert any("vision_tower" in each["name"] for each in report["modules"])
    assert "3 with images or sounds" in calipers("calibrate", seeing, *given, *FEW).stdout


def test_the_images_are_those_of_the_files(
    calipers: Calipers, seeing: Path, pictures: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    given = ("--scheme", "FP8", "--observer", "memoryless_minmax", "--no-eval")
    data = ("--data", pictures / "samples.jsonl", "--samples", 1)
    succeeded(calipers("calibrate", seeing, *given, *data, "--out", out, "--json"))
    model = LlavaForConditionalGeneration.from_pretrained(seeing)
    sample = {"text": "a <image> sat", "images": Image.open(pictures / "images" / "0.png")}
    processor = llava_processor(train_tokenizer())
    calibrate(model, "FP8", "memoryless_minmax", [sample], tokenizer=processor)
    loaded = LlavaForConditionalGeneration.from_pretrained(out)
    expected = {k: v for k, v in model.state_dict().items() if k.endswith("input_scale")}
    assert any("vision_tower" in name for name in expected)
    for name, value in expected.items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_compare(calipers: Calipers, seeing: Path, pictures: Path, texts: Path) -> None:
    given = ("--data", pictures / "samples.jsonl", "--eval", texts / "text.txt", *FEW)
    schemes = ("--scheme", "FP8", "--scheme", "W8A8", "--observer", "memoryless_minmax")
    result = succeeded(calipers("compare", seeing, *schemes, *given, "--json"))
    assert result["data"]["with_media"] == 3
    assert [run["scheme"] for run in result["runs"]] == ["FP8", "W8A8"]
    assert all(run["perplexity"]["value"] > 1 for run in result["runs"])


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        ("images/2.png", "line 1: no such file: {folder}/images/2.png"),
        ("https://example.org/cat.png", "line 1: https://example.org/cat.png: nothing is fetched"),
        ("samples.jsonl", "line 1: LlavaProcessor does not take it: "),
    ],
)
def test_what_is_no_image(
    calipers: Calipers, seeing: Path, pictures: Path, images: Any, expected: str
) -> None:
    data = write(pictures / "wrong.jsonl", {"text": "a <image>", "images": images})
    error = error_of(calipers("calibrate", seeing, "--data", data, "--no-eval"))
    assert f"{data}, {expected.format(folder=pictures)}" in error


def test_without_a_processor_the_text_alone_is_read(
    calipers: Calipers, pictures: Path, tmp_path: Path
) -> None:
    blind = saved(tmp_path / "blind", processor=False)
    given = ("--data", pictures / "samples.jsonl", "--samples", 3, "--no-eval")
    result = succeeded(calipers("calibrate", blind, "--only", "language", *given, "--json"))
    assert (result["data"]["sequences"], result["data"]["with_media"]) == (3, 0)


def test_a_processor_that_does_not_load_is_told(
    calipers: Calipers, seeing: Path, pictures: Path, tmp_path: Path
) -> None:
    broken = saved(tmp_path / "broken", processor=True)
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (broken / name).exists():
            (broken / name).write_text("{", encoding="utf-8")
    data = ("--data", pictures / "samples.jsonl", "--no-eval")
    error = error_of(calipers("calibrate", broken, *data))
    assert "need the model's processor, which does not load: " in error
