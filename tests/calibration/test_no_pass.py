"""Data that no observer needs is not run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from loguru import logger
from torch import nn

from calibration.tiny_models import picture, tiny_llama, token_batches
from calipers.calibration import attach, calibrate
from calipers.errors import CalipersError

UNUSED = "the data was not run: no observer of this calibration needs any"


@pytest.fixture
def told() -> Iterator[list[str]]:
    messages: list[str] = []
    sink = logger.add(
        lambda message: messages.append(str(message).strip()),
        level="INFO",
        format="{level}: {message}",
    )
    yield messages
    logger.remove(sink)


def must_not_be_asked() -> Iterator[Any]:
    raise AssertionError("the data was asked for")
    yield


def stages(calls: list[str]) -> Any:
    return lambda stage, done, total: calls.append(stage)


@pytest.mark.parametrize(
    ("scheme", "observer"),
    [("W4A16", "memoryless_minmax"), ("W8A8", "memoryless_mse"), ("FP8_DYNAMIC", "static_minmax")],
)
def test_weights_and_dynamic_activations(scheme, observer, told):
    model, without, seen = tiny_llama(), tiny_llama(), []
    with attach(model, scheme, observer=observer) as calibration:
        calibration.run(must_not_be_asked(), progress=stages(seen))
        calibration.run(must_not_be_asked(), progress=stages(seen))
        report = calibration.freeze()
    assert told.count(f"INFO: {UNUSED}") == 1
    assert (report.batches, report.tokens_given, seen) == (0, 0, [])
    expected = calibrate(without, scheme, observer)
    assert report.modules == expected.modules
    assert report.left_alone == expected.left_alone
    for name, value in without.state_dict().items():
        assert torch.equal(model.state_dict()[name].float(), value.float()), name


@pytest.mark.parametrize(
    ("scheme", "observer"),
    [("W4A16", None), ("W4A16", "imatrix_mse"), ("FP8", "memoryless_minmax"), ("NVFP4", None)],
)
def test_data_that_is_needed_is_run(scheme, observer, told):
    report = calibrate(tiny_llama(), scheme, observer, token_batches())
    assert report.batches == 2
    assert not any(UNUSED in message for message in told)


def test_one_module_that_needs_data_is_enough():
    from compressed_tensors.quantization import QuantizationConfig

    groups = {"W8A16": ["re:.*(q|k|v)_proj"], "FP8": ["re:.*down_proj"]}
    config = QuantizationConfig(config_groups=groups)
    report = calibrate(tiny_llama(), config, "memoryless_minmax", token_batches())
    assert report.batches == 2


def test_one_batch_in_place_of_many_is_refused_all_the_same():
    with (
        attach(tiny_llama(), "W4A16") as calibration,
        pytest.raises(CalipersError, match="iterable of batches, got Tensor"),
    ):
        calibration.run(token_batches(1)[0]["input_ids"])


class ReadsItsWeight(nn.Module):
    """A layer whose weight is read without a call."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.read = nn.Linear(32, 32), nn.Linear(32, 32)
        self.calls = 0

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.plain(hidden) @ self.read.weight


class FailsOnExample(ReadsItsWeight):
    """Its example input passes by the second layer, since it fails before."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(32, 32)
        self.dummy_inputs = {"hidden": torch.ones(2, 32), "fail": torch.ones(1)}

    def forward(self, hidden: torch.Tensor, fail: torch.Tensor | None = None) -> torch.Tensor:
        hidden = super().forward(hidden)
        if fail is not None:
            raise RuntimeError("not this input")
        return self.last(hidden)


def with_example() -> ReadsItsWeight:
    model = ReadsItsWeight()
    model.dummy_inputs = {"hidden": torch.ones(2, 32)}
    return model


@pytest.mark.parametrize(
    ("make", "calls"),
    # the example, or the first batch alone, or both
    [(with_example, 1), (ReadsItsWeight, 1), (FailsOnExample, 2)],
)
def test_layers_that_are_never_called_are_found(make, calls):
    model = make()
    data = (torch.randn(3, 32) for _ in range(5))
    report = calibrate(model, "W8A8", "memoryless_minmax", data)
    assert {each.name: each.reason for each in report.left_alone} == {"read": "never called"}
    assert "last" not in dict(model.named_modules()) or "last" in [
        each.name for each in report.modules
    ]
    assert report.batches == 0
    assert model.calls == calls


def test_an_example_that_fails_says_nothing_of_what_is_called():
    report = calibrate(FailsOnExample(), "W8A8", "memoryless_minmax")
    assert [each.name for each in report.modules] == ["plain", "read", "last"]


def test_no_batches_at_all():
    report = calibrate(ReadsItsWeight(), "W8A8", "memoryless_minmax", [])
    assert [each.name for each in report.modules] == ["plain", "read"]
    assert report.batches == 0


def test_a_first_batch_that_fails_is_the_callers_error():
    model = FailsOnExample()
    before = picture(model)
    with pytest.raises(RuntimeError, match="not this input"):
        calibrate(model, "W8A8", "memoryless_minmax", [(torch.ones(2, 32), torch.ones(1))])
    assert {name: value for name, value in picture(model).items() if name} == {
        name: value for name, value in before.items() if name
    }


def test_a_batch_that_fails_says_nothing_of_what_is_called():
    """The layers behind the failure were not reached, which is not the same as never called."""
    model = FailsOnExample()
    with attach(model, "FP8", observer="memoryless_minmax") as calibration:
        with pytest.raises(RuntimeError):
            calibration.run([(torch.ones(2, 32), torch.ones(1))])
        report = calibration.freeze(on_missing="skip")
    assert {each.reason for each in report.left_alone} == {"no data"}
