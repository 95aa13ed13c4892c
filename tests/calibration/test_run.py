from __future__ import annotations

from collections import UserDict

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from torch import nn
from transformers import BatchEncoding

from calibration.tiny_models import hidden_batches, tiny_llama, tiny_moe, token_batches
from calipers.calibration import attach
from calipers.calibration.batches import run_batches
from calipers.errors import CalipersError

STATIC = QuantizationScheme(
    targets=["Linear"],
    input_activations=QuantizationArgs(num_bits=8),
    output_activations=QuantizationArgs(num_bits=8),
)


class Two(nn.Module):
    """Takes two arguments; calls its layer by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.modes: list[bool] = []
        self.grads: list[bool] = []

    def forward(self, x: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        self.modes.append(self.training)
        self.grads.append(torch.is_grad_enabled())
        return self.layer(input=x if scale is None else x * scale)


X, SCALE = torch.arange(8.0).reshape(2, 4), torch.tensor(-3.0)


@pytest.mark.parametrize(
    ("batch", "low", "high"),
    [
        (X, 0.0, 7.0),
        ((X,), 0.0, 7.0),
        ([X, SCALE], -21.0, 0.0),
        ((X, SCALE), -21.0, 0.0),
        ({"x": X, "scale": SCALE}, -21.0, 0.0),
        (UserDict({"x": X}), 0.0, 7.0),
        (BatchEncoding({"x": X, "scale": SCALE}), -21.0, 0.0),
    ],
)
def test_every_kind_of_batch_reaches_the_model(batch, low, high):
    model = Two()
    with torch.no_grad():
        expected = model.layer(X if low == 0 else X * SCALE)
    with attach(model, STATIC) as calibration:
        calibration.run([batch])
        observer = model.layer.input_observer
        assert (float(observer.min_vals), float(observer.max_vals)) == (low, high)
        assert float(model.layer.output_observer.max_vals) == float(expected.max())
        assert calibration.batches == 1


def test_statistics_grow_over_batches_and_runs():
    model = Two()
    with attach(model, STATIC) as calibration:
        calibration.run([X, X * 2])
        calibration.run(iter([-X]))
        assert calibration.batches == 3
        assert float(model.layer.input_observer.min_vals) == -7.0
        assert float(model.layer.input_observer.max_vals) == 14.0
        assert calibration.observed[0].tokens == 6


def test_runs_in_eval_mode_without_gradients_and_restores_every_flag():
    model = nn.Sequential(Two(), nn.Dropout(0.5), nn.Linear(3, 3))
    model.train()
    model[1].eval()
    before = [module.training for module in model.modules()]
    with attach(model, STATIC) as calibration:
        calibration.run([X])
        assert [m.training for n, m in model.named_modules() if "observer" not in n] == before
        assert torch.is_grad_enabled()
    assert (model[0].modes, model[0].grads) == ([False], [False])


class Fragile(Two):
    def forward(self, x: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        output = super().forward(x, scale)
        if float(x.max()) > 100:
            raise RuntimeError("too large")
        return output


def test_an_exception_of_the_model_goes_on_with_statistics_kept_and_flags_restored():
    model = Fragile().train()
    with attach(model, STATIC) as calibration:
        with pytest.raises(RuntimeError, match="too large"):
            calibration.run([X, X * 100, X])
        assert calibration.batches == 1
        assert model.training
        assert model.layer.training
        assert torch.is_grad_enabled()
        assert model.layer.input_observer.has_statistics
        calibration.run([X])
        assert calibration.batches == 2


def test_progress_is_told_before_the_first_batch_and_after_each():
    calls: list[tuple[str, int, int | None]] = []
    model = Two()
    with attach(model, STATIC) as calibration:
        calibration.run([X, X], progress=lambda *call: calls.append(call))
        assert calls == [("batches", 0, 2), ("batches", 1, 2), ("batches", 2, 2)]
        calls.clear()
        calibration.run(iter([X]), progress=lambda *call: calls.append(call))
        assert calls == [("batches", 0, None), ("batches", 1, None)]


@pytest.mark.parametrize("batches", [X, {"x": X}, "some text", b"bytes", 3])
def test_one_batch_in_place_of_many_is_refused(batches):
    with (
        attach(Two(), STATIC) as calibration,
        pytest.raises(
            CalipersError, match=f"iterable of batches, got {type(batches).__name__}; put"
        ),
    ):
        calibration.run(batches)


@pytest.mark.parametrize("batch", ["text", 3, None])
def test_batches_of_other_types_are_refused(batch):
    with (
        attach(Two(), STATIC) as calibration,
        pytest.raises(CalipersError, match=f"a batch must be .* got {type(batch).__name__}"),
    ):
        calibration.run([batch])


class OnMeta(nn.Module):
    """Stands for a model on another device: only tells where its arguments are."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2, device="meta"))
        self.places: list[str] = []

    def forward(self, *args: object, **kwargs: object) -> None:
        nested = [*args, *kwargs.values()]
        while nested:
            value = nested.pop()
            if isinstance(value, torch.Tensor):
                self.places.append(value.device.type)
            elif isinstance(value, (list, tuple)):
                nested.extend(value)


def test_tensors_are_moved_to_the_device_of_the_model():
    model = OnMeta()
    run_batches(model, [X, (X, [X]), {"a": X, "b": (X, "text")}])
    assert model.places == ["meta"] * 5


def test_experts_that_see_no_token_count_none():
    model = tiny_moe((0, 2))
    with attach(model, STATIC) as calibration:
        calibration.run(hidden_batches(3))
        tokens = {each.name: each.tokens for each in calibration.observed}
    assert tokens["layers.0.experts.0.up_proj"] == 30
    assert tokens["layers.0.experts.1.up_proj"] == 0


def test_empty_tensors_are_no_data():
    model = Two()
    with attach(model, STATIC) as calibration:
        calibration.run([X[:0]])
        assert not model.layer.input_observer.has_statistics
        assert not model.layer.output_observer.has_statistics
        assert calibration.observed[0].tokens == 0


def test_embeddings_count_ids():
    scheme = QuantizationScheme(
        targets=["Embedding"], output_activations=QuantizationArgs(num_bits=8)
    )
    model = tiny_llama()
    with attach(model, scheme) as calibration:
        calibration.run(token_batches(2))
        assert calibration.observed[0].tokens == 32
        assert model.model.embed_tokens.output_observer.has_statistics


def test_no_run_after_freezing_or_detaching():
    model = tiny_moe((0,))
    calibration = attach(model, "W8A8", observer="memoryless_minmax")
    calibration.freeze()
    with pytest.raises(CalipersError, match=r"cannot run batches: .* already frozen"):
        calibration.run(hidden_batches(1))
    calibration.detach()
    with pytest.raises(CalipersError, match=r"cannot run batches: .* already detached"):
        calibration.run(hidden_batches(1))
