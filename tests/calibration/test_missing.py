from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
)

from calibration.tiny_models import hidden_batches, picture, tiny_llama, tiny_moe, token_batches
from calipers.calibration import attach
from calipers.calibration.missing import nearest_neighbours
from calipers.errors import MissingDataError

STATIC = QuantizationScheme(
    targets=["Linear"],
    weights=QuantizationArgs(num_bits=8, strategy="channel"),
    input_activations=QuantizationArgs(num_bits=8),
)
NVFP4 = "NVFP4"


def calibration_of(model, scheme=STATIC, batches=None, observer="memoryless_minmax", **kwargs):
    calibration = attach(model, scheme, observer=observer, **kwargs)
    calibration.run(hidden_batches() if batches is None else batches)
    # experts stand alone here, whatever they saw
    calibration.freeze = partial(calibration.freeze, on_few_tokens="own")
    return calibration


def test_all_modules_without_data_are_listed_and_nothing_is_changed():
    model = tiny_moe((0, 2))
    calibration = calibration_of(model)
    attached = picture(model)
    with pytest.raises(MissingDataError) as caught:
        calibration.freeze()
    assert str(caught.value).splitlines() == [
        "no data reached these tensors in 2 batches:",
        *(
            f"  layers.0.experts.{expert}.{leaf}.input: its observer saw no value"
            for expert in (1, 3)
            for leaf in ("up_proj", "down_proj")
        ),
        "Run batches that reach them, put the modules on the ignore list, or freeze with",
        "  on_missing='skip': leaves these modules unquantized,",
        "  on_missing='fallback': weights use their own range without importance, activations "
        "the merged range of their neighbours (other experts or layers)",
    ]
    assert picture(model) == attached
    calibration.detach()


def test_weights_that_want_importance_are_listed_with_activations():
    calibration = calibration_of(tiny_moe((0, 1, 2)), observer="imatrix_mse")
    with pytest.raises(MissingDataError) as caught:
        calibration.freeze()
    lines = str(caught.value).splitlines()
    weights = "its observer weighs by the layer's inputs and saw no token"
    assert f"  layers.0.experts.3.up_proj.weight: {weights}" in lines
    assert "  layers.0.experts.3.up_proj.input: its observer saw no value" in lines
    assert len([line for line in lines if line.startswith("  layers.")]) == 4


def test_local_inputs_lack_their_global_range():
    calibration = attach(tiny_llama(), NVFP4, observer="memoryless_minmax")
    with pytest.raises(MissingDataError, match=r"q_proj\.input: its observer saw no value"):
        calibration.freeze()
    calibration.run(token_batches(1))
    assert len(calibration.freeze().modules) == 7


def test_after_the_error_more_data_helps():
    model = tiny_moe((0, 1))
    calibration = calibration_of(model)
    with pytest.raises(MissingDataError):
        calibration.freeze()
    model.layers[0].active = (2, 3)
    calibration.run(hidden_batches())
    report = calibration.freeze()
    assert len(report.modules) == 8
    assert report.batches == 4


def test_skip_leaves_them_as_they_are():
    model = tiny_moe((0, 2))
    before = picture(model)
    calibration = calibration_of(model)
    report = calibration.freeze(on_missing="skip")
    calibration.detach()
    skipped = [
        f"layers.0.experts.{expert}.{leaf}"
        for expert in (1, 3)
        for leaf in ("up_proj", "down_proj")
    ]
    assert report.skipped == skipped
    assert [row.name for row in report.modules] == [
        f"layers.0.experts.{expert}.{leaf}"
        for expert in (0, 2)
        for leaf in ("up_proj", "down_proj")
    ]
    after = picture(model)
    for name in skipped:
        assert after[name] == before[name]
    assert hasattr(model.layers[0].experts[0].up_proj, "input_scale")


def test_skip_with_no_data_at_all_quantizes_nothing():
    model = tiny_moe((0,))
    before = picture(model)
    with attach(model, STATIC) as calibration:
        report = calibration.freeze(on_missing="skip")
    assert (report.modules, len(report.skipped)) == ([], 8)
    assert picture(model) == before


def scales(model, layer: int, leaf: str) -> list[float]:
    return [getattr(expert, leaf).input_scale.item() for expert in model.layers[layer].experts]


def test_fallback_takes_the_merged_range_of_the_other_experts():
    model = tiny_moe((0, 2))
    calibration = calibration_of(model)
    states = {each.name: each.observers["input"].state() for each in calibration.observed}
    report = calibration.freeze(on_missing="fallback")
    for leaf in ("up_proj", "down_proj"):
        found = scales(model, 0, leaf)
        amax = {
            expert: max(
                abs(states[f"layers.0.experts.{expert}.{leaf}"][key].item())
                for key in ("min_vals", "max_vals")
            )
            for expert in (0, 2)
        }
        merged = max(amax.values()) / 127.5
        assert amax[0] != amax[2]
        assert math.isclose(found[1], merged, rel_tol=1e-6)
        assert math.isclose(found[3], merged, rel_tol=1e-6)
        assert math.isclose(found[0], amax[0] / 127.5, rel_tol=1e-6)
    assert {row.name: row.fallback for row in report.modules if row.fallback} == {
        f"layers.0.experts.{expert}.{leaf}": ("input",)
        for expert in (1, 3)
        for leaf in ("up_proj", "down_proj")
    }
    # neighbours were copied: none of the observers has changed
    assert states == {each.name: each.observers["input"].state() for each in calibration.observed}


def test_fallback_prefers_its_own_list_to_other_layers():
    model = tiny_moe((0, 1, 2, 3), (0,), (0, 1, 2, 3))
    calibration = calibration_of(model)
    calibration.freeze(on_missing="fallback")
    own = scales(model, 1, "up_proj")
    assert own[1] == own[2] == own[3] == own[0]
    assert own[0] not in (scales(model, 0, "up_proj") + scales(model, 2, "up_proj"))


def test_fallback_takes_the_nearest_layers_where_its_own_list_has_nothing():
    model = tiny_moe((0, 1), (), (0, 1), (0, 1))
    calibration = calibration_of(model)
    calibration.freeze(on_missing="fallback")
    nearest = max(scales(model, 0, "up_proj")[:2] + scales(model, 2, "up_proj")[:2])
    assert scales(model, 1, "up_proj") == [nearest] * 4
    assert max(scales(model, 3, "up_proj")) > nearest


def test_fallback_without_any_neighbour_is_still_an_error():
    model = tiny_moe(())
    calibration = calibration_of(model)
    attached = picture(model)
    with pytest.raises(MissingDataError) as caught:
        calibration.freeze(on_missing="fallback")
    text = str(caught.value)
    assert text.count("its observer saw no value") == 8
    assert "No neighbour (same name but for its numbers) has data either." in text
    assert "on_missing='skip': leaves these modules unquantized" in text
    assert "on_missing='fallback'" not in text
    assert picture(model) == attached


def test_neighbours_must_be_quantized_alike():
    model = tiny_moe((0,))
    other = STATIC.model_copy(deep=True)
    other.targets = ["re:.*experts.0.*"]
    other.input_activations.num_bits = 4
    config = QuantizationConfig(config_groups={"a": other, "b": STATIC})
    calibration = calibration_of(model, config)
    with pytest.raises(MissingDataError, match="No neighbour"):
        calibration.freeze(on_missing="fallback")


@pytest.mark.parametrize("options", [{}, {"strict": True}])
def test_fallback_of_weights_is_their_own_range_without_importance(options):
    scheme = QuantizationScheme(
        targets=["Linear"], weights=QuantizationArgs(num_bits=4, group_size=16)
    )
    model = tiny_moe((0,))
    calibration = calibration_of(model, scheme, observer="imatrix_mse", observer_options=options)
    report = calibration.freeze(on_missing="fallback")
    fallen = [row.name for row in report.modules if row.fallback == ("weight",)]
    assert len(fallen) == 6
    reference = tiny_moe((0,))
    # the same search with all columns alike
    unweighted = {"norm": 3.0, "maxshrink": 0.95, "grid": 20}
    with attach(reference, scheme, observer="memoryless_mse", observer_options=unweighted) as plain:
        plain.freeze()
    for row in report.modules:
        scale = model.get_submodule(row.name).weight_scale
        same = torch.equal(scale, reference.get_submodule(row.name).weight_scale)
        assert same == (row.name in fallen), row.name
    assert not any(calibration.observed[i].weight_observer.has_data for i in range(2, 8))


def test_fallback_of_local_inputs():
    model = tiny_moe((0, 1))
    calibration = calibration_of(model, "NVFP4")
    calibration.freeze(on_missing="fallback")
    experts = model.layers[0].experts
    found = [expert.up_proj.input_global_scale.item() for expert in experts]
    # a global scale falls as the range grows
    assert found[2] == found[3] == min(found[:2])
    assert found[0] != found[1]


@pytest.mark.parametrize(
    ("name", "others", "expected"),
    [
        ("l.3.e.7.up", ["l.3.e.0.up", "l.3.e.9.up", "l.2.e.7.up"], ["l.3.e.0.up", "l.3.e.9.up"]),
        ("l.3.e.7.up", ["l.0.e.7.up", "l.2.e.1.up", "l.4.e.5.up"], ["l.2.e.1.up", "l.4.e.5.up"]),
        ("l.3.up", ["l.1.up", "l.6.up"], ["l.1.up"]),
        ("l.3.up", ["l.1.down", "l.6.x.up", "m.3.up", "l.3.up"], []),
        ("l.3.w1", ["l.3.w3", "l.3.w2"], []),
        ("up", ["down", "up"], []),
    ],
)
def test_neighbours_differ_in_numbers_alone_and_the_nearest_come(name, others, expected):
    assert nearest_neighbours(name, others) == expected
