"""Left-padded, right-padded and unpadded batches of the same texts teach the same.

Where a model computes the same for a token, observers see the same: padding enters nothing. What is
left is the rounding of the model's own matrix products, which sum in another order when a batch has
another shape. In float64 that stays below what float32 statistics can tell, so there all is equal;
in float32 it is a few units in the last place (ulp).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from torch import Tensor

from calibration.tiny_models import tiny_llama
from calipers.calibration import attach

LENGTHS = (9, 4, 7, 12)
LONGEST = max(LENGTHS)
PAD = 0
Batches = list[dict[str, Tensor]]
#: Everything that an observer can be asked for: scales, ranges, moments, tokens.
CHOICES: dict[str, dict[str, Any]] = {
    "static minmax, imatrix, FP8 cache": {
        "scheme": "FP8",
        "observer": "imatrix_mse",
        "activation_observer": "static_minmax",
        "kv_cache": "FP8",
    },
    "minmax, optimal, FP8 cache by head": {
        "scheme": "W8A8_STATIC",
        "observer": "optimal",
        "activation_observer": "minmax",
        "kv_cache": "FP8_HEAD",
    },
    "mse, hessian, int8 cache": {
        "scheme": "W8A8_STATIC",
        "observer": "optimal",
        "observer_options": {"objective": "hessian"},
        "activation_observer": "mse",
        "kv_cache": "INT8",
    },
    "histogram, imatrix, NVFP4": {
        "scheme": "NVFP4",
        "observer": "imatrix_mse",
        "activation_observer": "histogram",
    },
}
choices = pytest.mark.parametrize("choice", CHOICES.values(), ids=list(CHOICES))
sides = pytest.mark.parametrize("side", ["left", "right"])


def texts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(1, 64, (length,), generator=generator) for length in LENGTHS]


def unpadded() -> Batches:
    return [{"input_ids": text[None]} for text in texts()]


def padded(side: str) -> dict[str, Tensor]:
    """All texts as one batch, with the positions that they have without padding."""
    ids = torch.full((len(LENGTHS), LONGEST), PAD)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts()):
        place = slice(0, len(text)) if side == "right" else slice(LONGEST - len(text), LONGEST)
        ids[row, place], mask[row, place] = text, 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


def one_by_one(side: str) -> Batches:
    """A batch for each text, padded as in the batch of all."""
    batch = padded(side)
    return [{name: value[row : row + 1] for name, value in batch.items()} for row in range(4)]


def model(dtype: torch.dtype) -> Any:
    found = tiny_llama(layers=2).to(dtype)
    with torch.no_grad():
        # the norm makes of it the largest input that there is: no pad may count
        found.model.embed_tokens.weight[PAD] = 50 * torch.eye(128)[0]
        for layer in found.model.layers:
            for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
                projection.weight[:, 0] *= 4
    return found


def learnt(
    batches: Batches, dtype: torch.dtype, choice: dict[str, Any], **more: Any
) -> dict[str, Tensor]:
    """Statistics of all observers, tokens of all modules, and the scales that came of them."""
    llama = model(dtype)
    choice = dict(choice)
    scheme = choice.pop("scheme")
    if scheme == "W8A8_STATIC":
        scheme = static_int8()
    found: dict[str, Tensor] = {}
    with attach(llama, scheme, **choice) as calibration:
        calibration.run(batches, **more)
        for each in calibration.observed:
            found[f"{each.name}.tokens"] = torch.tensor(each.tokens)
            for base_name, observer in each.observers.items():
                for name, value in observer.state().items():
                    if isinstance(value, Tensor):
                        found[f"{each.name}.{base_name}.{name}"] = value.clone()
        report = calibration.freeze()
    assert report.unmasked == []
    scales = (name for name in llama.state_dict() if name.endswith(("_scale", "_zero_point")))
    found.update({name: llama.state_dict()[name].clone() for name in scales})
    return found


def static_int8() -> Any:
    return QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(num_bits=8, strategy="channel"),
        input_activations=QuantizationArgs(num_bits=8, symmetric=False),
    )


def ulps(found: Tensor, expected: Tensor) -> float:
    """The largest difference, in units in the last place of the expected value in float32."""
    if not expected.is_floating_point():
        return 0.0 if torch.equal(found, expected) else float("inf")
    found, expected = found.double(), expected.double()
    unit = torch.finfo(torch.float32).eps * expected.abs()
    apart = (found - expected).abs()
    return float(torch.where(apart == 0, 0, apart / unit).max()) if apart.numel() else 0.0


@sides
@choices
def test_batch_by_batch_all_is_equal(choice: dict[str, Any], side: str) -> None:
    expected = learnt(unpadded(), torch.float64, choice)
    found = learnt(one_by_one(side), torch.float64, choice)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name].float(), value.float()), name


@sides
@pytest.mark.parametrize(
    "choice",
    [CHOICES["static minmax, imatrix, FP8 cache"], CHOICES["histogram, imatrix, NVFP4"]],
    ids=["FP8", "NVFP4"],
)
def test_as_one_batch_all_is_equal_but_sums_of_floats(choice: dict[str, Any], side: str) -> None:
    """Four batches or one: importance is summed in another order, about 2 ulp apart.

    Moving averages, which mean something else over other batches, are not among the choices.
    """
    expected = learnt(unpadded(), torch.float64, choice)
    found = learnt([padded(side)], torch.float64, choice)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if name.endswith("input_square_sum"):
            assert ulps(found[name], value) <= 4, name
        elif not name.endswith(("num_batches", "num_global_batches")):
            assert torch.equal(found[name].float(), value.float()), name


@sides
@choices
def test_in_float32_within_some_ulp(choice: dict[str, Any], side: str) -> None:
    """The model's own products are rounded otherwise: 11 ulp of importance, 3 of scales.

    Entries of X'X and scales of `optimal` are left out: those near 0 are sums of what cancels, and
    a choice among candidates can fall otherwise where two of them are equal up to rounding.
    """
    expected = learnt(unpadded(), torch.float32, choice)
    found = learnt(one_by_one(side), torch.float32, choice)
    assert found.keys() == expected.keys()
    left_out = ("input_products", "input_sketch", "weight_scale")
    for name, value in expected.items():
        if not name.endswith(left_out):
            assert ulps(found[name], value) <= 16, name
        if name.startswith("model.layers.0.self_attn.q_proj.input."):
            assert torch.equal(found[name], value), "no product comes before it"


@sides
def test_pads_are_far_from_equal_where_they_count(side: str) -> None:
    """What the tests above would miss if they compared too little."""
    choice = CHOICES["static minmax, imatrix, FP8 cache"]
    expected = learnt(unpadded(), torch.float64, choice)
    found = learnt(one_by_one(side), torch.float64, choice, use_attention_mask=False)
    for word in ("input_scale", "k_scale", "v_scale", "input_square_sum", "tokens"):
        names = [name for name in expected if name.endswith(word)]
        assert names
        assert any(ulps(found[name], expected[name]) > 1e4 for name in names), word


def test_keys_of_left_padding_need_the_positions() -> None:
    """transformers' forward counts positions from the pads on: keys are rotated otherwise."""
    choice = CHOICES["static minmax, imatrix, FP8 cache"]
    expected = learnt(unpadded(), torch.float64, choice)
    batches = one_by_one("left")
    for each in batches:
        del each["position_ids"]
    found = learnt(batches, torch.float64, choice)
    others = {name for name, value in expected.items() if ulps(found[name], value) > 2}
    assert others
    assert all(".self_attn.k" in name for name in others)
