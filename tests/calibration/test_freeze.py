from __future__ import annotations

import copy
import math

import pytest
import torch
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    apply_quantization_config,
    fake_quantize,
    initialize_module_for_quantization,
)
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES as PRESETS
from compressed_tensors.quantization.utils import calculate_qparams
from torch import nn

from calibration.tiny_models import hidden_batches, picture, tiny_llama, tiny_moe, token_batches
from calipers.calibration import Calibration, attach, resolve_config
from calipers.errors import CalipersError
from calipers.observers import MemorylessMinMaxObserver, Observer

FIRST = "model.layers.0.self_attn.q_proj"
DATA_FREE = [name for name in PRESETS if name not in ("FP8", "NVFP4", "UNQUANTIZED")]


def frozen(model: nn.Module, scheme, batches=None, observer="memoryless_minmax", **kwargs):
    with attach(model, scheme, observer=observer, **kwargs) as calibration:
        if batches is not None:
            calibration.run(batches)
        return calibration.freeze()


def use_observer(monkeypatch, observer_class: type[Observer]) -> None:
    """Under every name, so that the registry of other tests stays clean."""
    monkeypatch.setattr(
        Observer, "get_value_from_registry", classmethod(lambda cls, name: observer_class)
    )


def by_hand(
    weight: torch.Tensor, args: QuantizationArgs, global_scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales of a weight by plain reductions and compressed-tensors' own formula."""
    rows, cols = weight.shape
    if args.strategy == "tensor":
        low, high = weight.min().reshape(1), weight.max().reshape(1)
    elif args.strategy == "block":
        height, width = args.block_structure
        blocks = [
            [weight[r : r + height, c : c + width] for c in range(0, cols, width)]
            for r in range(0, rows, height)
        ]
        low = torch.stack([torch.stack([b.min() for b in row]) for row in blocks])
        high = torch.stack([torch.stack([b.max() for b in row]) for row in blocks])
    else:
        groups = weight.reshape(rows, -1, args.group_size or cols)
        low, high = groups.amin(-1), groups.amax(-1)
    return calculate_qparams(low, high, args, global_scale=global_scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("preset", [*DATA_FREE, "NVFP4", "FP8"])
def test_scales_are_those_of_the_weights_by_hand(preset, dtype):
    model = tiny_llama().to(dtype)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    report = frozen(model, preset, token_batches() if preset in ("NVFP4", "FP8") else None)
    assert len(report.modules) == 7
    for row in report.modules:
        module = model.get_submodule(row.name)
        assert torch.equal(module.weight, weights[f"{row.name}.weight"])
        args = module.quantization_scheme.weights
        global_scale = getattr(module, "weight_global_scale", None)
        scale, zero_point = by_hand(module.weight, args, global_scale)
        # no precision is lost to the dtype that compressed-tensors registers
        assert torch.equal(module.weight_scale.to(scale.dtype), scale)
        assert torch.equal(module.weight_zero_point.float(), zero_point.float())
        assert module.weight_zero_point.dtype == args.zp_dtype
        assert module.quantization_status == QuantizationStatus.FROZEN
    output = model(**token_batches(1)[0]).logits
    assert output.dtype == dtype
    assert bool(output.isfinite().all())


@pytest.mark.parametrize("preset", DATA_FREE)
def test_same_parameters_as_compressed_tensors_registers(preset):
    model, reference = tiny_llama(), tiny_llama()
    frozen(model, preset)
    config = resolve_config(preset, "lm_head")
    apply_quantization_config(reference, config, show_progress=False)
    shapes = {name: (p.shape, p.dtype) for name, p in model.named_parameters()}
    assert shapes == {name: (p.shape, p.dtype) for name, p in reference.named_parameters()}


def test_static_inputs_are_measured_on_the_full_precision_model_over_all_batches():
    model, batches = tiny_llama(layers=2), token_batches(3)
    seen: dict[str, list[torch.Tensor]] = {}
    reference = copy.deepcopy(model)
    for name, module in reference.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(
                lambda module, args, name=name: seen.setdefault(name, []).append(args[0])
            )
    with torch.no_grad():
        for batch in batches:
            reference(**batch)
    report = frozen(model, "FP8", batches)
    assert len(report.modules) == 14
    for row in report.modules:
        module = model.get_submodule(row.name)
        low = min(value.min() for value in seen[row.name])
        high = max(value.max() for value in seen[row.name])
        scale, zero_point = calculate_qparams(
            low, high, module.quantization_scheme.input_activations
        )
        assert torch.equal(module.input_scale, scale)
        assert torch.equal(module.input_zero_point.float(), zero_point.float())
        assert row.activation_observer == "static_minmax"
        assert row.tokens == 48


def test_asymmetric_outputs():
    scheme = QuantizationScheme(
        targets=["Linear"], output_activations=QuantizationArgs(num_bits=8, symmetric=False)
    )
    model, batches = tiny_moe((0,)), hidden_batches(1)
    with torch.no_grad():
        expert = model.layers[0].experts[0]
        value = expert.up_proj(batches[0])
    with attach(model, scheme) as calibration:
        calibration.run(batches)
        report = calibration.freeze(on_missing="skip")
    scale, zero_point = calculate_qparams(value.min(), value.max(), scheme.output_activations)
    assert torch.equal(expert.up_proj.output_scale, scale)
    assert torch.equal(expert.up_proj.output_zero_point, zero_point)
    row = report.modules[0]
    assert (row.weight_observer, row.weight_bits, row.weight_error) == (None, None, None)


FAMILIES = [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("o_proj",), ("down_proj",)]


def test_global_scales_are_shared_within_fused_groups():
    model, batches = tiny_llama(layers=2), token_batches()
    amax: dict[str, float] = {}
    reference = copy.deepcopy(model)
    for name, module in reference.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(
                lambda module, args, name=name: amax.__setitem__(
                    name, max(amax.get(name, 0.0), float(args[0].abs().max()))
                )
            )
    with torch.no_grad():
        for batch in batches:
            reference(**batch)
    report = frozen(model, "NVFP4", batches)
    names = [row.name for row in report.modules]
    for name in names:
        parent, _, leaf = name.rpartition(".")
        (family,) = [family for family in FAMILIES if leaf in family]
        members = [f"{parent}.{each}" for each in family]
        module = model.get_submodule(name)
        weight_amax = max(
            float(model.get_submodule(m).weight.detach().abs().max()) for m in members
        )
        input_amax = max(amax[m] for m in members)
        assert math.isclose(module.weight_global_scale.item(), 448 * 6 / weight_amax, rel_tol=1e-6)
        assert math.isclose(module.input_global_scale.item(), 448 * 6 / input_amax, rel_tol=1e-6)
        assert module.weight_global_scale.dtype == torch.float32
    layers = [
        model.get_submodule(f"model.layers.{i}.self_attn.q_proj").weight_global_scale.item()
        for i in range(2)
    ]
    assert layers[0] != layers[1]


def test_optimal_chooses_the_best_of_a_few_global_scales_for_a_fused_group():
    model = tiny_llama()
    reference = copy.deepcopy(model)
    frozen(model, "NVFP4A16", observer="optimal", observer_options={"objective": "mse"})
    args = PRESETS["NVFP4A16"]["weights"]
    chosen = []
    for parent, families in (("self_attn", FAMILIES[:1]), ("mlp", FAMILIES[1:2])):
        members = [f"model.layers.0.{parent}.{leaf}" for leaf in families[0]]
        weights = [reference.get_submodule(name).weight.detach() for name in members]
        largest = max(float(weight.abs().max()) for weight in weights)
        errors = []
        for step in range(4):
            scale = torch.tensor([448 * 6 / largest / 2 * 2 ** (-step / 32)])
            errors.append(sum(float(nvfp4_error(weight, scale, args)) for weight in weights))
        found = {model.get_submodule(name).weight_global_scale.item() for name in members}
        best = min(range(4), key=errors.__getitem__)
        (scale,) = found
        assert math.isclose(scale, 448 * 6 / largest / 2 * 2 ** (-best / 32), rel_tol=1e-6)
        chosen.append(best)
    assert any(chosen), "no group tells the first one from the best"


def nvfp4_error(weight: torch.Tensor, global_scale: torch.Tensor, args) -> torch.Tensor:
    module = nn.Module()
    module.weight_global_scale = global_scale
    observer = Observer.load_from_registry("optimal", "weight", args, module, objective="mse")
    scale, zero_point = observer(weight)
    rounded = fake_quantize(weight, scale, zero_point, args, global_scale)
    return (rounded - weight).double().square().sum()


def test_a_fused_group_that_lacks_a_member_is_tolerated():
    model = nn.ModuleDict({"q_proj": nn.Linear(32, 32), "v_proj": nn.Linear(32, 32)})
    frozen(model, "NVFP4A16")
    largest = max(float(each.weight.detach().abs().max()) for each in model.values())
    for each in model.values():
        assert math.isclose(each.weight_global_scale.item(), 448 * 6 / largest, rel_tol=1e-6)


def test_scales_that_the_registered_dtype_would_round_keep_their_own(monkeypatch):
    class Float32Scales(Observer):
        """Scales in float32 whatever the weight, as a peer's observer may give them."""

        def calculate_qparams(self, observed, reduce_dims=None, tensor_id=None):
            amax = observed.float().abs().amax(dim=reduce_dims, keepdim=True)
            return amax / 7.5, torch.zeros_like(amax).to(torch.int8)

    use_observer(monkeypatch, Float32Scales)
    model = tiny_moe((0,)).bfloat16()
    frozen(
        model,
        QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(num_bits=4, group_size=16)),
    )
    up = model.layers[0].experts[0].up_proj
    assert up.weight_scale.dtype == torch.float32
    assert not up.weight_scale.requires_grad
    expected = up.weight.float().reshape(64, 2, 16).abs().amax(-1) / 7.5
    assert torch.equal(up.weight_scale, expected)
    assert model(hidden_batches(1)[0].bfloat16()).dtype == torch.bfloat16
    # fake-quantize gives ungrouped weights in the dtype of their scale: that must be the weight's
    model = tiny_moe((0,)).bfloat16()
    scheme = QuantizationScheme(
        targets=["Linear"], weights=QuantizationArgs(num_bits=8, strategy="channel")
    )
    frozen(model, scheme)
    assert model.layers[0].experts[0].up_proj.weight_scale.dtype == torch.bfloat16
    assert model(hidden_batches(1)[0].bfloat16()).dtype == torch.bfloat16


def test_an_observer_of_the_wrong_shape_is_refused_and_undone(monkeypatch):
    class OneScale(MemorylessMinMaxObserver):
        def get_qparams(self, observed=None, g_idx=None):
            return torch.ones(1), torch.zeros(1, dtype=torch.int8)

    use_observer(monkeypatch, OneScale)
    model = tiny_moe((0,))
    before = picture(model)
    calibration = attach(model, "W8A8")
    with pytest.raises(
        CalipersError,
        match=r"layers\.0\.experts\.0\.up_proj\.weight_scale: compressed-tensors expects shape "
        r"\(64, 1\), the observer gave \(1,\)",
    ):
        calibration.freeze()
    calibration.detach()
    assert picture(model) == before


def test_nothing_but_the_quantization_stays_after_detaching():
    model, reference = tiny_llama(), tiny_llama()
    frozen(model, "FP8", token_batches(), observer="imatrix_mse")
    apply_quantization_config(reference, resolve_config("FP8", "lm_head"), show_progress=False)
    for (name, module), (_, other) in zip(
        model.named_modules(), reference.named_modules(), strict=True
    ):
        assert list(module._modules) == list(other._modules), name
        assert set(module.__dict__) == set(other.__dict__), name
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._forward_pre_hooks_with_kwargs


def test_frozen_modules_say_which_observer_and_options_were_used():
    model = tiny_llama()
    given = resolve_config("FP8")
    dump = given.model_dump()
    frozen(model, given, token_batches(), observer="memoryless-mse", observer_options={"norm": 2.0})
    scheme = model.get_submodule(FIRST).quantization_scheme
    assert (scheme.weights.observer, scheme.weights.observer_kwargs) == (
        "memoryless_mse",
        {"norm": 2.0},
    )
    assert scheme.input_activations.observer == "static_minmax"
    assert given.model_dump() == dump
    model = tiny_llama()
    frozen(model, "W8A8", observer=None)
    scheme = model.get_submodule(FIRST).quantization_scheme
    assert scheme.weights.observer == "memoryless_minmax"
    assert scheme.input_activations.observer is None


def test_no_observation_after_freezing():
    model = tiny_moe((0,))
    calibration = attach(model, "FP8", ignore=("re:.*experts.[123].*",))
    calibration.run(hidden_batches(1))
    calibration.freeze()
    up = model.layers[0].experts[0].up_proj
    tokens, high = calibration.observed[0].tokens, float(up.input_observer.max_vals)
    model(hidden_batches(1)[0] * 100)
    assert calibration.observed[0].tokens == tokens
    assert float(up.input_observer.max_vals) == high
    calibration.detach()


def test_weights_observers_forget_ranges_and_keep_importance():
    model = tiny_moe((0, 1, 2, 3))
    calibration = attach(model, "NVFP4A16", observer="imatrix_mse")
    calibration.run(hidden_batches(2))
    before = {each.name: each.weight_observer.state() for each in calibration.observed}
    calibration.freeze()
    for each in calibration.observed:
        after = each.weight_observer.state()
        assert after.keys() == before[each.name].keys()
        assert all(torch.equal(value, before[each.name][key]) for key, value in after.items())
        assert not each.weight_observer.has_statistics


def test_freezing_twice_or_after_detaching_is_an_error():
    calibration = attach(tiny_moe((0,)), "W8A8", observer="memoryless_minmax")
    calibration.freeze()
    with pytest.raises(CalipersError, match="cannot freeze: the calibration is already frozen"):
        calibration.freeze()
    calibration.detach()
    with pytest.raises(CalipersError, match="cannot freeze: the calibration is already detached"):
        calibration.freeze()


def test_on_missing_must_be_known():
    with (
        attach(tiny_moe((0,)), "W8A8") as calibration,
        pytest.raises(
            CalipersError, match="on_missing must be one of error, skip, fallback, got 'ignore'"
        ),
    ):
        calibration.freeze(on_missing="ignore")


def test_attaching_to_a_frozen_model_is_refused():
    model = tiny_moe((0,))
    frozen(model, "W8A8")
    told = r"layers\.\*\.experts\.\*\.up_proj \(4\), .*: is already quanti"
    with pytest.raises(CalipersError, match=told):
        attach(model, "W8A8")


def test_unquantized_changes_nothing():
    model = tiny_llama()
    before = picture(model)
    report = frozen(model, "UNQUANTIZED")
    assert report.modules == []
    assert picture(model) == before


def test_a_group_that_quantizes_nothing_leaves_its_modules_as_they_are():
    groups = {
        "keep": QuantizationScheme(targets=["re:.*up_proj"]),
        "rest": QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(num_bits=8)),
    }
    model = tiny_moe((0,))
    before = picture(model)
    frozen(model, QuantizationConfig(config_groups=groups))
    after = picture(model)
    assert after["layers.0.experts.0.up_proj"] == before["layers.0.experts.0.up_proj"]
    assert after["layers.0.experts.0.down_proj"] != before["layers.0.experts.0.down_proj"]


def test_progress_names_every_stage():
    calls: list[tuple[str, int, int | None]] = []
    model = tiny_llama()
    with attach(model, "NVFP4", observer="memoryless_minmax") as calibration:
        calibration.run(token_batches(1))
        calibration.freeze(progress=lambda *call: calls.append(call))
    for stage in ("global scales", "weights", "activations"):
        assert [call[1:] for call in calls if call[0] == stage] == [(i, 7) for i in range(1, 8)]
    expected = []
    for members in (3, 1, 2, 1):  # one fused group after the other
        for stage in ("global scales", "weights", "activations"):
            expected += [stage] * members
    assert [call[0] for call in calls] == expected


def statistics(calibration: Calibration) -> dict[str, dict[str, object]]:
    return {
        observer.name: {key: value.tolist() for key, value in observer.state().items()}
        for each in calibration.observed
        for observer in each.observers.values()
    }


class Stopped(Exception):
    pass


def stop_at(stage: str, count: int):
    def progress(current: str, done: int, total: int | None) -> None:
        if (current, done) == (stage, count):
            raise Stopped

    return progress


@pytest.mark.parametrize("stage", ["global scales", "weights", "activations"])
@pytest.mark.parametrize("observer", ["memoryless_minmax", "imatrix_mse", "minmax"])
def test_a_freeze_that_fails_is_undone_and_can_be_done_again(stage, observer):
    model, batches = tiny_llama(), token_batches()
    before = picture(model)
    with attach(model, "NVFP4", observer=observer) as calibration:
        calibration.run(batches)
        attached, gathered = picture(model), statistics(calibration)
        with pytest.raises(Stopped):
            calibration.freeze(progress=stop_at(stage, 3))
        assert picture(model) == attached
        assert statistics(calibration) == gathered
        again = calibration.freeze()
    reference = tiny_llama()
    expected = frozen(reference, "NVFP4", batches, observer)
    assert again.modules == expected.modules
    for key, value in reference.state_dict().items():
        assert torch.equal(model.state_dict()[key].float(), value.float()), key
    assert before.keys() == picture(model).keys()


def test_a_freeze_that_fails_leaves_the_model_exactly_as_before():
    model = tiny_llama()
    before = picture(model)
    calibration = attach(model, "W4A16", observer="memoryless_minmax")
    with pytest.raises(Stopped):
        calibration.freeze(progress=stop_at("weights", 7))
    calibration.detach()
    assert picture(model) == before


def test_compressed_tensors_failing_half_way_is_undone(monkeypatch):
    model = tiny_llama()
    calibration = attach(model, "W8A8", observer="memoryless_minmax")
    attached = picture(model)

    done = []

    def half(module, scheme):
        if len(done) == 4:
            raise Stopped
        initialize_module_for_quantization(module, scheme)
        done.append(module)
        assert picture(model) != attached

    with monkeypatch.context() as patch:
        patch.setattr("calipers.calibration.freeze.initialize_module_for_quantization", half)
        with pytest.raises(Stopped):
            calibration.freeze()
    assert picture(model) == attached
    assert len(calibration.freeze().modules) == 7
    calibration.detach()


def test_a_forward_of_the_instance_comes_back():
    model = tiny_moe((0,))
    up = model.layers[0].experts[0].up_proj
    up.forward = up.forward  # an attribute of the instance, as libraries that patch forwards do
    own = up.__dict__["forward"]
    calibration: Calibration = attach(model, "W8A8", observer="memoryless_minmax")
    with pytest.raises(Stopped):
        calibration.freeze(progress=stop_at("weights", 2))
    assert up.__dict__["forward"] is own
    calibration.detach()
