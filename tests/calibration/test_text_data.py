"""`calibrate` on text: strings, samples, paths and datasets, with the model's tokenizer."""

from __future__ import annotations

from typing import Any

import datasets
import numpy
import pytest
import torch
from torch.utils.data import DataLoader

from calibration.tiny_models import picture, tiny_llama, token_batches
from calipers.calibration import attach, calibrate
from calipers.errors import CalipersError
from calipers.text import read_batches
from calipers.text.for_model import batches_for_model
from cli.conftest import train_tokenizer

TEXTS = ["The quick brown fox jumps", "over the lazy dog. " * 40, "Pack my box with jugs"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer()


def llama() -> Any:
    return tiny_llama(vocab_size=320)


def scales(model: Any) -> dict[str, Any]:
    return {name: t.clone() for name, t in model.state_dict().items() if name.endswith("_scale")}


@pytest.mark.parametrize(
    "wrap",
    [
        list,
        tuple,
        iter,
        numpy.array,
        lambda texts: [{"text": text, "id": 1} for text in texts],
        lambda texts: datasets.Dataset.from_dict({"text": texts, "id": [1] * len(texts)}),
    ],
    ids=["list", "tuple", "iterator", "array", "fields", "dataset"],
)
def test_text_is_calibrated_with_as_its_tokens_are(wrap, tokenizer):
    expected, model = llama(), llama()
    ids = read_batches(TEXTS, tokenizer, sequence_length=64)
    calibrate(expected, "FP8", "memoryless_minmax", [{"input_ids": each} for each in ids])
    report = calibrate(model, "FP8", "memoryless_minmax", wrap(TEXTS), tokenizer=tokenizer)
    assert report.batches == 3
    # cut at 64, the positions of the model
    assert {row.tokens for row in report.modules} == {sum(each.shape[1] for each in ids)}
    found = scales(model)
    assert len(found) == 14
    for name, value in scales(expected).items():
        assert torch.equal(found[name].float(), value.float()), name


@pytest.mark.parametrize("kind", [str, lambda path: path])
def test_a_path(kind, tokenizer, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(" ".join(TEXTS * 3), encoding="utf-8")
    report = calibrate(
        llama(),
        "FP8",
        "memoryless_minmax",
        kind(path),
        tokenizer=tokenizer,
        samples=4,
        sequence_length=8,
    )
    assert {row.tokens for row in report.modules} == {4 * 8}


def test_samples_and_length_limit_text(tokenizer):
    report = calibrate(
        *(llama(), "FP8", "memoryless_minmax", TEXTS),
        tokenizer=tokenizer,
        samples=2,
        sequence_length=3,
    )
    assert {row.tokens for row in report.modules} == {2 * 3}


def test_text_without_a_tokenizer_is_refused_with_the_model_as_before():
    model = llama()
    before = picture(model)
    with pytest.raises(CalipersError, match=r"got None: pass tokenizer=$"):
        calibrate(model, "FP8", data=TEXTS)
    with pytest.raises(CalipersError, match=r"^missing\.txt: no such file"):
        calibrate(model, "FP8", data="missing.txt", tokenizer=train_tokenizer())
    assert picture(model) == before


BATCHES = token_batches()
LOADER = DataLoader([batch["input_ids"] for batch in BATCHES], batch_size=None)


@pytest.mark.parametrize(
    "data",
    [
        BATCHES,
        [tuple(batch.values()) for batch in BATCHES],
        [batch["input_ids"] for batch in BATCHES],
        LOADER,
        BATCHES[0]["input_ids"],
        {"input_ids": BATCHES[0]["input_ids"]},
        [],
        [{"input_ids": [[1, 2]], "prompt": torch.ones(2)}],
        datasets.Dataset.from_dict({"input_ids": [[1, 2]], "text": ["a b"]}),
        3,
    ],
    ids=lambda data: type(data).__name__,
)
def test_batches_stay_as_they_are(data):
    assert batches_for_model(data, llama(), None) is data


def test_batches_of_an_iterator_come_as_they_were():
    found = list(batches_for_model(iter(BATCHES), llama(), None))
    assert len(found) == len(BATCHES)
    assert all(one is other for one, other in zip(found, BATCHES, strict=True))
    assert list(batches_for_model(iter([]), llama(), None)) == []


def test_a_misnamed_field_is_told(tokenizer):
    with pytest.raises(CalipersError, match=r"^data\[0\]: .* got the fields txt$"):
        calibrate(llama(), "FP8", data=[{"txt": "some words"}], tokenizer=tokenizer)


class Plain(torch.nn.Module):
    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return input_ids


def test_only_models_with_a_cache_are_told_to_use_none(tokenizer):
    (with_cache,) = batches_for_model(["a b"], llama(), tokenizer)
    (without,) = batches_for_model(["a b"], Plain(), tokenizer)
    assert with_cache.keys() == {"input_ids", "use_cache"}
    assert with_cache["use_cache"] is False
    assert without.keys() == {"input_ids"}


@pytest.mark.parametrize("call", [calibrate, attach])
def test_a_path_in_place_of_the_model_is_refused_with_the_line_to_write(call, tmp_path):
    for path in ("some/model", tmp_path):
        with pytest.raises(CalipersError) as caught:
            call(path, "W4A16")
        line = f"  model = AutoModelForCausalLM.from_pretrained({str(path)!r})"
        assert line in str(caught.value).splitlines()
        assert f"  calipers.{call.__name__}(model, ...)" in str(caught.value).splitlines()
    with pytest.raises(CalipersError, match=r"expected a torch\.nn\.Module, got dict$"):
        call({}, "W4A16")
