"""Plans of small models: predictions, groups, budgets, and what `calibrate` makes of them."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from transformers import LlamaForCausalLM

import architectures
from calipers import calibrate
from calipers.calibration.config import resolve_config
from calipers.calibration.targets import resolve_modules
from calipers.demo import MODEL_PATH
from calipers.errors import CalipersError, SchemeError
from calipers.planning import SchemePlan, plan_schemes
from calipers.planning.candidates import read_candidates, stored_bits
from calipers.planning.predict import gather, make_units, quantized_weights, weight_of


@pytest.fixture(scope="module")
def demo() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(MODEL_PATH).eval()


@pytest.fixture(scope="module")
def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 500, (2, 24), generator=generator) for _ in range(3)]


@pytest.fixture(scope="module")
def plan(demo: LlamaForCausalLM, batches: list[torch.Tensor]) -> SchemePlan:
    return plan_schemes(demo, batches, "W4A16,W8A16", bits=6, group_size=32)


def test_fused_layers_have_one_scheme_and_all_fits(plan: SchemePlan) -> None:
    assert 5.5 < plan.bits <= 6
    assert {each.scheme for each in plan.choices} == {"W4A16", "W8A16"}
    fused = next(each for each in plan.choices if each.name.endswith("layers.1.self_attn.q_proj"))
    leaves = [name.rpartition(".")[2] for name in fused.modules]
    assert leaves == ["q_proj", "k_proj", "v_proj"]


def test_calibrate_takes_the_file_and_makes_the_planned_weights(
    demo: LlamaForCausalLM, batches: list[torch.Tensor], plan: SchemePlan, tmp_path: Path
) -> None:
    path = tmp_path / "scheme.yaml"
    plan.write(path)
    model = copy.deepcopy(demo)
    calibrate(model, str(path), data=batches, observer_options={"objective": "imatrix"})
    config = resolve_config("W4A16")
    units = make_units(resolve_modules(demo, config).targets)
    gathered = gather(demo, units, batches)
    candidates = {each.name: each for each in read_candidates("W4A16,W8A16", 32)}
    chosen = {each.name: each.scheme for each in plan.choices}
    for unit in units:
        wanted = quantized_weights(
            unit.targets, candidates[str(chosen[unit.name])], gathered.statistics
        )
        for name, weight in wanted.items():
            module = model.get_submodule(name)
            args = module.quantization_scheme.weights
            zero = getattr(module, "weight_zero_point", None)
            got = fake_quantize(module.weight, module.weight_scale, zero, args)
            assert torch.equal(got, weight), name


def test_the_predicted_error_is_the_measured_one(
    demo: LlamaForCausalLM, batches: list[torch.Tensor], plan: SchemePlan
) -> None:
    unit = make_units(resolve_modules(demo, resolve_config("W4A16")).targets)[1]
    (target,) = unit.targets
    choice = next(each for each in plan.choices if each.name == unit.name)
    gathered = gather(demo, [unit], batches)
    candidate = {e.name: e for e in read_candidates("W4A16,W8A16", 32)}[str(choice.scheme)]
    quantized = quantized_weights([target], candidate, gathered.statistics)[target.name]
    seen: list[torch.Tensor] = []
    hook = target.module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        for batch in batches:
            demo(input_ids=batch)
    hook.remove()
    inputs = torch.cat([each.flatten(0, 1) for each in seen]).double()
    weight = weight_of(target).detach().double()
    error = (inputs @ (weight - quantized.double()).T).square().sum()
    whole = (inputs @ weight.T).square().sum()
    assert choice.error == pytest.approx(float(error / whole), rel=1e-3)


def test_the_model_stays_as_it_is(demo: LlamaForCausalLM, batches: list[torch.Tensor]) -> None:
    before = {name: each.clone() for name, each in demo.state_dict().items()}
    plan_schemes(demo, batches, "W4A16,NVFP4A16,W8A16", bits=5, group_size=32)
    after = demo.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(m._forward_pre_hooks for m in demo.modules())


def test_experts_of_a_layer_decide_together() -> None:
    model = architectures.spread_weights(architectures.qwen3_moe(vocab_size=320))
    data = [torch.arange(3, 35)[None]]
    found = plan_schemes(model, data, "W4A16,W8A16", bits=6, group_size=16, sensitivity="residual")
    experts = [each for each in found.choices if "experts" in each.name]
    assert experts
    assert all(len(each.modules) == 12 for each in experts)
    report = calibrate(model, found.config, data=data, on_missing="fallback")
    assert {row.name for row in report.modules} == {n for c in found.choices for n in c.modules}


@pytest.mark.parametrize("bits", [4.0, 9.0, float("nan")])
def test_budgets_that_no_plan_has(
    demo: LlamaForCausalLM, batches: list[torch.Tensor], bits: float
) -> None:
    with pytest.raises(CalipersError, match=r"bits \(--bits\): expected 4\.\d+ to [89]\.\d+"):
        plan_schemes(demo, batches, bits=bits, group_size=32)


def test_candidates_that_there_are_not() -> None:
    with pytest.raises(SchemeError, match="unknown scheme 'W44A16'"):
        read_candidates("W4A16,W44A16")
    with pytest.raises(SchemeError, match=r"FP8 .*quantizes activations"):
        read_candidates("FP8")
    with pytest.raises(SchemeError, match="W4A16 is given twice"):
        read_candidates("W4A16,w4a16")


def test_bits_as_stored() -> None:
    w4 = QuantizationArgs(num_bits=4, strategy="group", group_size=64)
    assert stored_bits(w4, 8, 128, torch.bfloat16) == 8 * 128 * 4 + 16 * 16
    uneven = w4.model_copy(update={"symmetric": False})
    assert stored_bits(uneven, 8, 128, torch.bfloat16) == 8 * 128 * 4 + 16 * (16 + 4)
    (nvfp4,) = read_candidates("NVFP4A16")
    assert stored_bits(nvfp4.args, 8, 128, torch.bfloat16) == 8 * 128 * 4 + 64 * 8 + 32
