"""Padding does not count where a batch carries the mask of its tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from torch import Tensor, nn

from calibration.tiny_models import tiny_llama
from calipers.calibration import Calibration, attach, calibrate
from observers.samples import logged

STATIC = QuantizationScheme(
    targets=["Linear"],
    weights=QuantizationArgs(num_bits=8, strategy="channel"),
    input_activations=QuantizationArgs(num_bits=8),
    output_activations=QuantizationArgs(num_bits=8),
)
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
COUNTED = 7


def ids(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 64, (2, 5), generator=generator)


def held(calibration: Calibration) -> dict[str, Any]:
    """All statistics, and the tokens of each module."""
    found: dict[str, Any] = {}
    for each in calibration.observed:
        found[each.name] = each.tokens
        for base_name, observer in each.observers.items():
            for name, value in observer.state().items():
                found[f"{each.name}.{base_name}.{name}"] = value
    return found


def assert_equal(found: dict[str, Any], expected: dict[str, Any], rtol: float = 0) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=rtol, atol=0, msg=name)


class Layered(nn.Module):
    """Layers that see (batch, tokens, hidden), (batch * tokens, hidden), and some tokens alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(8, 8)
        self.flat = nn.Linear(8, 8)
        self.routed = nn.Linear(8, 8)
        self.pooled = nn.Linear(8, 8)
        self.fail = False

    def forward(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
    ) -> Tensor:
        flat = self.flat(self.inner(x).flatten(0, 1))
        if self.fail:
            raise RuntimeError("failed half way")
        return self.routed(flat[1:4]).sum() + self.pooled(x.mean(1)).sum()


def batch(mask: Tensor | None = MASK, size: float = 1000.0, **more: Any) -> dict[str, Any]:
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))
    x[MASK == 0] *= size
    return {"x": x, **({} if mask is None else {"attention_mask": mask}), **more}


def chosen() -> Tensor:
    return batch()["x"][MASK == 1]


@pytest.mark.parametrize("activation", ["static_minmax", "minmax", "mse", "histogram"])
@pytest.mark.parametrize("weight", ["optimal", "imatrix_mse"])
def test_pads_enter_no_statistic(weight: str, activation: str) -> None:
    """What counts sees no pad behind it, so it is the same without them: up to the rounding."""
    options = {"objective": "hessian"} if weight == "optimal" else {}
    padded = {"input_ids": torch.where(MASK == 1, ids(), 0), "attention_mask": MASK}
    alone = [{"input_ids": ids()[:1]}, {"input_ids": ids()[1:, :2]}]
    choose = {"observer": weight, "observer_options": options, "activation_observer": activation}
    with attach(tiny_llama(), STATIC, **choose) as calibration:
        calibration.run([padded])
        found = held(calibration)
        assert {each.tokens for each in calibration.observed} == {COUNTED}
    with attach(tiny_llama(), STATIC, **choose) as calibration:
        calibration.run(alone)
        expected = held(calibration)
    # Averages are of one batch here and of two there; a pattern may change with the last bit.
    own = (".num_batches", ".past_min_vals", ".past_max_vals", ".offsets")
    kept = {name: value for name, value in expected.items() if not name.endswith(own)}
    for name, value in kept.items():
        if name.endswith(".counts"):
            assert found[name].sum() == value.sum()
        else:
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4, msg=name)
    assert found.keys() == expected.keys()


def test_every_layout_of_tokens() -> None:
    with attach(Layered(), STATIC, observer="imatrix_mse") as calibration:
        model = calibration.model
        calibration.run([batch()])
        tokens = {each.name: each.tokens for each in calibration.observed}
        assert tokens == {"inner": COUNTED, "flat": COUNTED, "routed": 3, "pooled": 2}
        assert torch.equal(model.inner.input_observer.max_vals, chosen().amax().view(1))
        square_sum = chosen().square().sum(0).double()
        torch.testing.assert_close(model.inner.weight_observer.input_square_sum, square_sum)
        assert model.flat.weight_observer.num_input_tokens == COUNTED
        assert float(model.flat.output_observer.max_vals) < 100
        report = calibration.freeze()
    assert (report.tokens_given, report.tokens_counted) == (10, COUNTED)
    assert report.unmasked == ["routed", "pooled"]
    assert report.modules[0].tokens == COUNTED


def test_the_option_turns_it_off() -> None:
    with attach(Layered(), STATIC) as calibration:
        calibration.run([batch()], use_attention_mask=False)
        assert calibration.observed[0].tokens == 10
        assert float(calibration.model.inner.input_observer.max_vals) > 100
        report = calibration.freeze()
    assert (report.tokens_given, report.tokens_counted, report.unmasked) == (0, 0, [])
    for use in (True, False):
        report = calibrate(Layered(), STATIC, "imatrix_mse", [batch()], use_attention_mask=use)
        assert report.modules[0].tokens == (COUNTED if use else 10)


@pytest.mark.parametrize(
    "mask",
    [
        MASK.bool(),
        MASK.float(),
        torch.where(MASK == 1, torch.tensor([[3], [2]]), 0),  # numbers of packed sequences
    ],
    ids=["bool", "float", "numbers"],
)
def test_kinds_of_masks(mask: Tensor) -> None:
    with attach(Layered(), STATIC) as calibration:
        calibration.run([batch(mask)])
        assert calibration.observed[0].tokens == COUNTED


@pytest.mark.parametrize(
    ("mask", "given"),
    [
        (None, 0),
        (torch.ones(2, 5), 10),
        (torch.zeros(2, 5).masked_fill(MASK == 0, -torch.inf), 0),  # additive
        (torch.ones(2, 1, 5, 5), 0),
        (torch.tensor([[1, 1, 1, 1, 1, 0, 0]] * 2), 0),  # of other tokens
        (MASK.T, 0),
    ],
    ids=["none", "ones", "additive", "4-D", "cached", "transposed"],
)
def test_batches_without_a_mask_of_their_tokens(mask: Tensor | None, given: int) -> None:
    with attach(Layered(), STATIC) as calibration:
        calibration.run([batch(mask)])
        assert {each.tokens for each in calibration.observed} == {10, 3, 2}
        report = calibration.freeze()
    assert report.tokens_given == report.tokens_counted == given
    assert report.unmasked == []


def test_other_kinds_of_batches_count_whole() -> None:
    with attach(Layered(), STATIC) as calibration:
        calibration.run([batch()["x"], (batch()["x"], MASK)])
        assert calibration.observed[0].tokens == 20


def test_no_mask_is_left_behind() -> None:
    with attach(Layered(), STATIC) as calibration:
        calibration.run([batch()])
        calibration.model(**batch())
        assert calibration.observed[0].tokens == COUNTED + 10
        calibration.model.fail = True
        with pytest.raises(RuntimeError):
            calibration.run([batch()])
        calibration.model.fail = False
        calibration.run([batch(None)])
        assert calibration.observed[0].tokens == COUNTED + 20


def test_batches_that_are_all_padding() -> None:
    with attach(Layered(), STATIC) as calibration:
        calibration.run([batch(torch.zeros(2, 5)), batch()])
        assert calibration.observed[0].tokens == COUNTED
        report = calibration.freeze()
    assert (report.tokens_given, report.tokens_counted) == (20, COUNTED)


@pytest.mark.parametrize("key", ["labels", "decoder_input_ids"])
def test_an_encoder_decoder_whose_tokens_cannot_be_told_apart(key: str) -> None:
    class Config:
        is_encoder_decoder = True

    model = Layered()
    with attach(model, STATIC) as calibration:
        calibration.run([batch(**{key: ids()})])
        assert calibration.observed[0].tokens == COUNTED, "a decoder alone: labels are its tokens"
    model = Layered()
    model.config = Config()
    with attach(model, STATIC) as calibration, logged("WARNING") as messages:
        calibration.run([batch(**{key: ids()})])
        assert calibration.observed[0].tokens == 10
        calibration.run([batch(**{key: ids()[:, :3]})])
        assert calibration.observed[0].tokens == 10 + COUNTED
    (message,) = messages
    assert message.startswith("attention_mask not used: encoder and decoder have 5 tokens")


def test_embeddings() -> None:
    scheme = QuantizationScheme(
        targets=["Embedding"], output_activations=QuantizationArgs(num_bits=8)
    )
    model = tiny_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[0] = 50
    with attach(model, scheme) as calibration:
        padded = torch.where(MASK == 1, ids(), 0)
        calibration.run([{"input_ids": padded, "attention_mask": MASK}])
        assert calibration.observed[0].tokens == COUNTED
        assert float(model.model.embed_tokens.output_observer.max_vals) < 50


def test_global_scales_of_inputs() -> None:
    padded = {"input_ids": torch.where(MASK == 1, ids(), 0), "attention_mask": MASK}
    model = tiny_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[0] = torch.eye(128)[0]  # the norm makes it the largest
    scales = {}
    for use in (True, False):
        with attach(model, "NVFP4", observer="memoryless_minmax") as calibration:
            calibration.run([padded], use_attention_mask=use)
            for each in calibration.observed:
                scale = each.observers["input"].get_global_scale()
                scales[each.name, use] = float(scale)
    name = "model.layers.0.self_attn.q_proj"
    assert scales[name, True] > scales[name, False] * 1.01
