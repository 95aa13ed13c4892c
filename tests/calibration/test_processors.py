"""A processor in place of a tokenizer: samples of text with images or sounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy
import pytest
import torch

from architectures import whisper
from calibration.tiny_models import tiny_llama
from calipers.calibration import calibrate
from calipers.errors import CalipersError
from calipers.text import read_batches
from calipers.text.for_model import batches_for_model
from calipers.text.processors import has_media, is_processor, tokenizer_of
from cli.conftest import train_tokenizer
from multimodal_models import llava, llava_processor
from observers.samples import logged

Image = pytest.importorskip("PIL.Image")
IMAGE = "<image>"


def picture(seed: int = 0) -> Any:
    values = numpy.random.default_rng(seed).integers(0, 255, (40, 40, 3), dtype=numpy.uint8)
    return Image.fromarray(values)


def sound(seed: int = 0) -> Any:
    return numpy.random.default_rng(seed).standard_normal(4000).astype(numpy.float32)


@pytest.fixture(scope="module")
def processor() -> Any:
    return llava_processor(train_tokenizer())


SAMPLES = [
    {"text": f"a cat {IMAGE} sat", "images": picture(0)},
    "no picture at all",
    {"text": f"{IMAGE} and {IMAGE}", "images": [picture(1), picture(2)]},
    {"text": "none here", "images": None},
]


def scales(model: Any) -> dict[str, Any]:
    return {name: t.clone() for name, t in model.state_dict().items() if name.endswith("_scale")}


@pytest.mark.parametrize(
    "wrap",
    [list, tuple, iter, lambda values: (value for value in values)],
    ids=["list", "tuple", "iterator", "generator"],
)
def test_images_reach_the_tower(wrap: Any, processor: Any) -> None:
    assert processor.tokenizer.convert_tokens_to_ids(IMAGE) == 300
    expected, model = llava(), llava()
    tokenizer = processor.tokenizer
    batches = [
        dict(processor(**SAMPLES[0], return_tensors="pt")),  # type: ignore[arg-type]
        {"input_ids": torch.tensor([tokenizer(SAMPLES[1])["input_ids"]])},
        dict(processor(**SAMPLES[2], return_tensors="pt")),  # type: ignore[arg-type]
        {"input_ids": torch.tensor([tokenizer("none here")["input_ids"]])},
    ]
    calibrate(expected, "FP8", "memoryless_minmax", batches)
    report = calibrate(model, "FP8", "memoryless_minmax", wrap(SAMPLES), tokenizer=processor)
    assert report.batches == 4
    assert any("vision_tower" in each.name for each in report.modules)
    found = scales(model)
    assert found.keys() == scales(expected).keys()
    for name, value in scales(expected).items():
        assert torch.equal(found[name].float(), value.float()), name


def test_images_come_in_the_dtype_of_the_model(processor: Any) -> None:
    report = calibrate(
        llava(torch.bfloat16), "FP8", "memoryless_minmax", SAMPLES[:1], tokenizer=processor
    )
    assert report.batches == 1


def test_a_dataset_with_images(processor: Any) -> None:
    text = [f"a cat {IMAGE} sat"] * 3
    dataset = datasets.Dataset.from_dict({"text": text, "id": [1, 2, 3]})
    images = datasets.Dataset.from_dict(
        {"images": [[picture(i)] for i in range(3)]},
        features=datasets.Features({"images": datasets.List(datasets.Image())}),
    )
    dataset = datasets.concatenate_datasets([dataset, images], axis=1)
    batches = list(batches_for_model(dataset, llava(), processor, samples=2))
    assert [each["pixel_values"].shape for each in batches] == [(1, 3, 32, 32)] * 2
    # a tokenizer takes the text alone
    batches = list(batches_for_model(dataset, llava(), processor.tokenizer))
    assert [set(each) for each in batches] == [{"input_ids"}] * 3


def test_messages_with_images(processor: Any) -> None:
    content = [{"type": "image", "image": picture()}, {"type": "text", "text": "a cat"}]
    sample = {"messages": [{"role": "user", "content": content}]}
    assert has_media(sample)
    (batch,) = batches_for_model([sample], llava(), processor)
    assert batch["pixel_values"].shape == (1, 3, 32, 32)
    assert int((batch["input_ids"] == 300).sum()) == 16


def test_sounds() -> None:
    from transformers import WhisperFeatureExtractor, WhisperProcessor

    extractor = WhisperFeatureExtractor(feature_size=8, chunk_length=1, n_fft=64, hop_length=1000)
    tokenizer = train_tokenizer()
    hearing = WhisperProcessor(feature_extractor=extractor, tokenizer=tokenizer)
    model = whisper()
    model.resize_token_embeddings(320)
    samples = [{"audio": sound(i), "sampling_rate": 16000, "text": "a cat"} for i in range(2)]
    report = calibrate(model, "FP8", "memoryless_minmax", samples, tokenizer=hearing)
    assert report.batches == 2
    assert any("encoder" in each.name for each in report.modules)
    (batch,) = batches_for_model(samples[:1], model, hearing)
    assert batch["input_features"].shape == (1, 8, 16)


def test_text_alone_goes_through_its_tokenizer(processor: Any, tmp_path: Path) -> None:
    texts = ["a cat sat", "on a mat"]
    expected = read_batches(texts, processor.tokenizer, sequence_length=8)
    file = tmp_path / "text.txt"
    file.write_text("a cat sat on a mat " * 20, encoding="utf-8")
    for data in (texts, file):
        want = read_batches(data, processor.tokenizer, sequence_length=8)
        got = batches_for_model(data, tiny_llama(), processor, sequence_length=8)
        assert [each["input_ids"].tolist() for each in got] == [each.tolist() for each in want]
        read = read_batches(data, processor, sequence_length=8)
        assert [each.tolist() for each in read] == [each.tolist() for each in want]
    assert len(expected) == 2


def test_a_tokenizer_takes_the_text_and_says_so(processor: Any) -> None:
    with logged("WARNING") as messages:
        (batch,) = batches_for_model(SAMPLES[:1], llava(), processor.tokenizer)
    assert "pixel_values" not in batch
    (message,) = messages
    assert "data[0]: of a sample with images, videos or sounds its text alone is used" in message
    assert "pass the model's processor" in message


def test_what_a_processor_does_not_take_is_told(processor: Any) -> None:
    samples = ["plain", {"text": "two places <image> <image>", "images": "nothing/there.png"}]
    with pytest.raises(CalipersError, match=r"data\[1\]: LlavaProcessor does not take it: "):
        calibrate(llava(), "FP8", "memoryless_minmax", samples, tokenizer=processor)
    with pytest.raises(CalipersError, match="holds no sample"):
        calibrate(llava(), "FP8", "memoryless_minmax", ["", " "], tokenizer=processor)


def test_what_is_a_processor(processor: Any) -> None:
    tokenizer = processor.tokenizer
    assert is_processor(processor)
    assert not is_processor(tokenizer)
    assert tokenizer_of(processor) is tokenizer
    assert tokenizer_of(tokenizer) is tokenizer
    assert tokenizer_of(None) is None
