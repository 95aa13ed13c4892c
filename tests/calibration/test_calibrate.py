from __future__ import annotations

import json

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

from calibration.tiny_models import hidden_batches, picture, tiny_llama, tiny_moe, token_batches
from calipers.calibration import CalibrationReport, attach, calibrate
from calipers.errors import CalipersError, MissingDataError, SchemeError


def test_one_call_does_what_the_steps_do():
    model, steps = tiny_llama(), tiny_llama()
    report = calibrate(model, "FP8", "imatrix_mse", token_batches())
    with attach(steps, "FP8", observer="imatrix_mse") as calibration:
        calibration.run(token_batches())
        expected = calibration.freeze()
    assert report.modules == expected.modules
    assert report.batches == 2
    found = model.state_dict()
    for key, value in steps.state_dict().items():
        assert torch.equal(found[key].float(), value.float()), key


def test_defaults_are_w4a16_without_data_and_without_the_head():
    model = tiny_llama()
    report = calibrate(model)
    assert isinstance(report, CalibrationReport)
    assert len(report.modules) == 7
    assert {row.weight_observer for row in report.modules} == {"memoryless_minmax"}
    assert {row.weight_bits for row in report.modules} == {4}
    assert not hasattr(model.lm_head, "quantization_scheme")


def test_observers_and_options_are_handed_on():
    model = tiny_moe((0, 1, 2, 3))
    report = calibrate(
        model,
        "FP8",
        "memoryless_mse",
        hidden_batches(),
        observer_options={"norm": 2.0},
        activation_observer="minmax",
        ignore="re:.*experts.3.*",
    )
    assert len(report.modules) == 6
    assert {row.activation_observer for row in report.modules} == {"minmax"}
    scheme = model.layers[0].experts[0].up_proj.quantization_scheme
    assert scheme.weights.observer_kwargs == {"norm": 2.0}


def test_data_that_is_needed_is_asked_for_before_any_work():
    model = tiny_llama()
    before = picture(model)
    with pytest.raises(MissingDataError) as caught:
        calibrate(model, "FP8", "imatrix_mse")
    first = "model.layers.0.self_attn.q_proj"
    assert str(caught.value).splitlines() == [
        "this calibration needs data, and data is None:",
        f"  IMatrixMSEObserver weighs weights by their layer's inputs: 7 modules, {first}, ...",
        "  input activations are quantized statically (StaticMinMaxObserver must see them): "
        f"7 modules, {first}, ...",
        "Pass data= (--data FILE): batches, as mappings of arguments (input_ids=...), tensors, or "
        "tuples of arguments; or text, as strings or a file, with tokenizer=.",
    ]
    assert picture(model) == before


@pytest.mark.parametrize("preset", ["NVFP4", "FP8"])
def test_static_and_local_activations_need_data(preset):
    with pytest.raises(MissingDataError, match="needs data, and data is None"):
        calibrate(tiny_llama(), preset)


@pytest.mark.parametrize("preset", ["W8A8", "NVFP4A16", "FP8_DYNAMIC", "MXFP4"])
def test_weights_and_dynamic_activations_need_none(preset):
    assert len(calibrate(tiny_llama(), preset, "memoryless_minmax").modules) == 7


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"scheme": "W4A17"}, SchemeError),
        ({"observer_options": {"nrom": 1}}, ValueError),
        ({"data": [torch.ones(2, 3)]}, RuntimeError),
        ({"data": [None]}, CalipersError),
        ({"data": []}, MissingDataError),
        ({"data": hidden_batches(), "on_missing": "never"}, ValueError),
    ],
)
def test_the_model_is_as_before_where_anything_fails(change, error):
    model = tiny_moe((0, 1))
    before = picture(model)
    with pytest.raises(error):
        calibrate(model, **{"scheme": "FP8", "observer": "memoryless_minmax", **change})
    assert picture(model) == before


def test_on_missing_and_progress_are_handed_on():
    stages = []
    report = calibrate(
        tiny_moe((0,)),
        "FP8",
        "memoryless_minmax",
        hidden_batches(),
        on_missing="skip",
        progress=lambda stage, done, total: stages.append(stage),
    )
    assert len(report.skipped) == 6
    assert list(dict.fromkeys(stages)) == ["batches", "weights", "activations"]


def test_the_report_is_ready_for_json():
    report = calibrate(
        tiny_moe((0,)),
        "FP8",
        "imatrix_mse",
        hidden_batches(),
        on_missing="fallback",
        on_few_tokens="own",
    )
    read = json.loads(json.dumps(report.to_dict()))
    assert set(read) == {
        "modules",
        "skipped",
        "left_alone",
        "quantized_share",
        "seconds",
        "batches",
        "tokens_given",
        "tokens_counted",
        "unmasked",
        "held_out",
        "coverage",
        "stability",
    }
    assert read["batches"] == 2
    assert read["seconds"] > 0
    row = read["modules"][2]
    assert row.pop("weight_error") > 0
    assert row.pop("weight")["bits"] == 8
    assert list(row.pop("plots")) == ["weight"]
    unknown = {"sqnr_db": None, "judged_by": None, "clipped": None, "moved": None}
    assert row.pop("activation_measures") == {"input": unknown}
    assert row == {
        "name": "layers.0.experts.1.up_proj",
        "weight_observer": "imatrix_mse",
        "weight_bits": 8,
        "activation_observer": "static_minmax",
        "tokens": 0,
        "fallback": ["weight", "input"],
        "objective": None,
        "activations": "static",
        "shared": 0.0,
        "states": [],
        "shadows": {},
    }


def test_a_tied_head_is_left_alone():
    model = tiny_llama(tie_word_embeddings=True)
    before = model.lm_head.weight.clone()
    calibrate(model, "W4A16", "memoryless_minmax")
    assert torch.equal(model.lm_head.weight, before)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_embeddings_can_be_quantized():
    scheme = QuantizationScheme(
        targets=["Embedding"], weights=QuantizationArgs(num_bits=8, group_size=32)
    )
    model = tiny_llama()
    report = calibrate(model, scheme, "memoryless_minmax")
    assert [row.name for row in report.modules] == ["model.embed_tokens"]
    assert model.model.embed_tokens.weight_scale.shape == (64, 4)
    assert bool(model(**token_batches(1)[0]).logits.isfinite().all())
