"""Measures in a report against what running the layers gives."""

from __future__ import annotations

import functools
import json
import math

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from transformers import AutoModelForCausalLM, AutoTokenizer

from calibration.tiny_models import tiny_llama, token_batches
from calipers.calibration import calibrate
from calipers.calibration.report import ModuleReport
from calipers.demo import CALIBRATION_TEXT, MODEL_PATH
from calipers.observers.input_moments import InputMoments
from calipers.ranges.input_gram import ColumnGroups, column_groups
from calipers.text import read_batches

HESSIAN = {"objective": "hessian"}
#: One scale a row, so that the block of a row of 128 columns is all of X'X.
CHANNEL = QuantizationScheme(
    targets=["Linear"], weights=QuantizationArgs(num_bits=4, strategy="channel")
)


def measured_errors(model, report, batches):
    """||X (W - Q)'|| / ||X W'|| of every module, by running the unquantized model."""
    seen = {}
    hooks = [
        model.get_submodule(row.name).register_forward_pre_hook(
            lambda _, args, name=row.name: seen.setdefault(name, []).append(
                args[0].detach().flatten(0, -2).double()
            )
        )
        for row in report.modules
    ]
    # the weights are those of before; only the forwards of layers fake-quantize them
    modules = [model.get_submodule(row.name) for row in report.modules]
    for module in modules:
        module.quantization_enabled = False
    with torch.no_grad():
        for batch in batches:
            model(**batch) if isinstance(batch, dict) else model(batch)
    for hook in hooks:
        hook.remove()
    found = {}
    for row, module in zip(report.modules, modules, strict=True):
        weight = module.weight.detach()
        args = module.quantization_scheme.weights
        back = fake_quantize(weight, module.weight_scale, module.weight_zero_point, args)
        inputs = torch.cat(seen[row.name])
        error = inputs @ (weight.double() - back.double()).T
        found[row.name] = float(error.norm() / (inputs @ weight.double().T).norm())
    return found


def test_the_whole_gram_predicts_the_output_error_of_every_module():
    model, batches = tiny_llama(layers=2), token_batches(4)
    report = calibrate(model, CHANNEL, "optimal", batches, observer_options=HESSIAN)
    measured = measured_errors(model, report, batches)
    assert len(report.modules) == 14
    for row in report.modules:
        assert row.weight.output_error_from == "gram"
        assert row.weight.output_error == pytest.approx(measured[row.name], rel=0.02), row.name


@functools.cache
def demo_inputs():
    """Of each layer of the demo model its moments with the whole of X'X, its inputs, its weight."""
    model = AutoModelForCausalLM.from_pretrained(MODEL_PATH, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH)
    batches = read_batches(CALIBRATION_TEXT, tokenizer, samples=8, sequence_length=128)
    report = calibrate(model, "W4A16", "memoryless_minmax")
    return model, report, measured_errors(model, report, batches), list(batches)


def whole(cols):
    """All columns in one block."""
    return ColumnGroups(torch.arange(cols).unsqueeze(0), 1, cols)


def by_group(args, cols):
    return column_groups(args, cols, None)


# docs/reading-a-report.md states the last two
@pytest.mark.parametrize(("known", "within"), [("gram", 0.02), ("blocks", 0.15), ("diagonal", 3)])
def test_the_error_of_the_prediction_on_the_demo_model(known, within):
    model, report, measured, batches = demo_inputs()
    worst = 0.0
    for row in report.modules:
        module = model.get_submodule(row.name)
        args = module.quantization_scheme.weights
        moments = InputMoments()
        products = whole if known == "gram" else functools.partial(by_group, args)

        def see(_, inputs, moments=moments, products=products):
            moments.observe(inputs[0], products=None if known == "diagonal" else products)

        hook = module.register_forward_pre_hook(see)
        try:
            with torch.no_grad():
                for batch in batches:
                    model(batch)
        finally:
            hook.remove()
        cols = module.weight.shape[1]
        gram = moments.gram(None if known == "diagonal" else products(cols))
        assert gram.kind == known
        weight = module.weight.detach()
        back = fake_quantize(weight, module.weight_scale, module.weight_zero_point, args)
        predicted = float((gram.energy(weight - back) / gram.energy(weight)).sqrt())
        worst = max(worst, abs(predicted / measured[row.name] - 1))
    assert worst < within


def test_held_out_error_is_that_of_the_chosen_observer():
    report = calibrate(
        tiny_llama(), "W4A16", "optimal", token_batches(9), shadow="memoryless_minmax"
    )
    for row in report.modules:
        assert row.weight.held_out_error == pytest.approx(math.sqrt(row.shadows["weight"][0].error))
    alone = calibrate(tiny_llama(), "W4A16", "optimal", token_batches(9))
    assert alone.modules[0].weight.held_out_error is None


def test_what_is_measured_does_not_change_a_scale():
    plain, other = tiny_llama(), tiny_llama()
    report = calibrate(plain, "FP8", "memoryless_minmax", token_batches(8))
    calibrate(other, "FP8", "memoryless_minmax", iter(token_batches(8)))
    for row in report.modules:
        one, two = (each.get_submodule(row.name).input_scale for each in (plain, other))
        assert torch.equal(one, two)
        found = row.activation_measures["input"]
        assert found.judged_by == "in-sample"
        assert found.sqnr_db > 20
        assert found.clipped == 0  # static_minmax clips nothing that it saw
        assert found.moved >= 0
        assert sum(row.plots["input"].histogram.counts) > 0


def test_activations_are_judged_by_held_out_tokens_where_there_are_some():
    report = calibrate(tiny_llama(), "FP8", "memoryless_minmax", token_batches(9), shadow="mse")
    found = report.modules[0].activation_measures["input"]
    assert found.judged_by == "held-out"


def test_how_far_a_scale_moved_in_the_last_quarter():
    model = torch.nn.Sequential(torch.nn.Linear(16, 16))
    ones = torch.ones(1, 3, 16)
    report = calibrate(model, "FP8", "memoryless_minmax", [ones, ones, ones, 2 * ones])
    assert report.modules[0].activation_measures["input"].moved == pytest.approx(0.5)
    model = torch.nn.Sequential(torch.nn.Linear(16, 16))
    report = calibrate(model, "FP8", "memoryless_minmax", [ones, 2 * ones, ones, ones])
    assert report.modules[0].activation_measures["input"].moved == 0
    model = torch.nn.Sequential(torch.nn.Linear(16, 16))
    report = calibrate(model, "FP8", "memoryless_minmax", [ones, ones])
    assert report.modules[0].activation_measures["input"].moved is None


@pytest.mark.parametrize("scheme", ["W4A16_ASYM", "NVFP4", "MXFP4A16", "FP8_BLOCK", "W8A8"])
def test_any_scheme_has_measures_that_json_holds(scheme):
    report = calibrate(tiny_llama(), scheme, "memoryless_minmax", token_batches(2))
    told = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    for row in told["modules"]:
        weight = row["weight"]
        assert weight["error"] == row["weight_error"]
        assert weight["sqnr_db"] == pytest.approx(-20 * math.log10(weight["error"]))
        assert 0 < weight["entropy"] <= weight["bits"]
        assert weight["clipped"] == 0
        assert (weight["scales_saturated"] is None) == (scheme != "NVFP4")
        assert row["plots"]["weight"]["histogram"]["low"] < 0
    assert report.to_dict()["modules"][0]["plots"] == told["modules"][0]["plots"]


def test_records_are_equal_by_what_they_say():
    assert hash(ModuleReport("a")) == hash(ModuleReport("a"))
