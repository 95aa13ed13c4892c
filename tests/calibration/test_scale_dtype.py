"""`scale_dtype`: where compressed-tensors cannot compute it, the scheme is refused by name."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

from calibration.tiny_models import picture, tiny_llama, token_batches
from calipers.calibration import calibrate
from calipers.errors import SchemeError
from calipers.observers import Observer

GROUPED = {"num_bits": 4, "strategy": "group", "group_size": 32}
STATIC = {"num_bits": 8, "type": "float", "strategy": "tensor"}
DYNAMIC = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
CHANNEL = {"num_bits": 8, "type": "float", "strategy": "channel"}


def scheme(weights: dict, inputs: dict | None = None) -> QuantizationScheme:
    return QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(**weights),
        input_activations=None if inputs is None else QuantizationArgs(**inputs),
    )


def wide(args: dict) -> dict:
    return {**args, "scale_dtype": torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("given", "what"),
    [
        (scheme(wide(GROUPED)), "weights"),
        (scheme(wide(CHANNEL)), "weights"),
        (scheme(STATIC, wide(STATIC)), "input activations"),
        (scheme(CHANNEL, wide(DYNAMIC)), "input activations"),
    ],
    ids=["group", "channel", "static", "dynamic"],
)
def test_wider_than_the_model_is_refused_before_the_data(given, what, dtype):
    def data():
        raise AssertionError("the data was run")
        yield

    model = tiny_llama().to(dtype)
    before = picture(model)
    expected = rf"q_proj, .*: {what}: scale_dtype torch\.float32 has a wider range than {dtype}"
    with pytest.raises(SchemeError, match=expected):
        calibrate(model, given, data=data())
    assert picture(model) == before


@pytest.mark.parametrize("name", ["memoryless_minmax", "memoryless_mse", "histogram", "minmax"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_observer_refuses_it_by_name_and_keeps_what_it_has(name, dtype):
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    observer = Observer.load_from_registry(name, "weight", QuantizationArgs(**wide(GROUPED)))
    expected = observer(x)[0].clone()
    assert expected.dtype == torch.float32
    with pytest.raises(ValueError, match=rf"weight: scale_dtype torch\.float32 .* {dtype}"):
        observer(x.to(dtype))
    assert torch.equal(observer.get_qparams()[0], expected)


@pytest.mark.parametrize("narrow", [None, torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "parts", [(GROUPED,), (CHANNEL, DYNAMIC), (STATIC, STATIC)], ids=["group", "dynamic", "static"]
)
def test_one_that_the_model_holds_works(parts, narrow):
    model = tiny_llama()
    given = scheme(*({**part, "scale_dtype": narrow} for part in parts))
    calibrate(model, given, "memoryless_minmax", token_batches())
    with torch.no_grad():
        assert model(**token_batches()[0]).logits.isfinite().all()
