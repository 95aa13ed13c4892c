from __future__ import annotations

import copy

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from loguru import logger
from torch import nn

from calibration.tiny_models import (
    LAYERS,
    hidden_batches,
    picture,
    tiny_llama,
    tiny_moe,
    token_batches,
)
from calipers.calibration import attach
from calipers.errors import CalipersError, SchemeError
from calipers.observers import (
    IMatrixMSEObserver,
    MemorylessMinMaxObserver,
    MinMaxObserver,
    Observer,
    StaticMinMaxObserver,
)

EVERYTHING = QuantizationScheme(
    targets=["Linear"],
    weights=QuantizationArgs(num_bits=4, group_size=32, observer="imatrix_mse"),
    input_activations=QuantizationArgs(num_bits=8),
    output_activations=QuantizationArgs(num_bits=8),
)


def observers_of(module: nn.Module) -> dict[str, type[Observer]]:
    return {
        name: type(child) for name, child in module.named_children() if isinstance(child, Observer)
    }


def test_observers_sit_on_the_module_under_their_base_names():
    model = tiny_llama()
    with attach(model, EVERYTHING):
        for leaf in LAYERS:
            (module,) = [m for n, m in model.named_modules() if n.endswith(leaf)]
            assert observers_of(module) == {
                "weight_observer": IMatrixMSEObserver,
                "input_observer": StaticMinMaxObserver,
                "output_observer": StaticMinMaxObserver,
            }
        q_proj = model.model.layers[0].self_attn.q_proj
        assert q_proj.weight_observer.name == "model.layers.0.self_attn.q_proj.weight"
        assert q_proj.input_observer.name == "model.layers.0.self_attn.q_proj.input"
        assert q_proj.output_observer.base_name == "output"
        assert observers_of(model.lm_head) == {}


@pytest.mark.parametrize("scheme", ["W4A16", "FP8", "NVFP4", "W8A8", "UNQUANTIZED", EVERYTHING])
def test_detaching_leaves_no_trace(scheme):
    model = tiny_llama()
    before = picture(model)
    calibration = attach(model, scheme)
    assert scheme == "UNQUANTIZED" or picture(model) != before
    calibration.run(token_batches())
    calibration.detach()
    assert picture(model) == before
    calibration.detach()
    assert picture(model) == before


def test_hooks_of_others_stay():
    model, seen = tiny_moe((0,)), []
    up = model.layers[0].experts[0].up_proj
    up.register_forward_pre_hook(lambda module, args: seen.append("pre"))
    up.register_forward_hook(lambda module, args, output: seen.append("post"))
    before = picture(model)
    with attach(model, EVERYTHING) as calibration:
        calibration.run(hidden_batches(1))
    assert picture(model) == before
    assert seen == ["pre", "post"]
    model(hidden_batches(1)[0])
    assert len(seen) == 4


def test_the_state_dict_and_the_outputs_stay_those_of_the_model():
    model, batch = tiny_llama(), token_batches(1)[0]
    with torch.no_grad():
        expected = model(**batch).logits
    keys = list(model.state_dict())
    with attach(model, EVERYTHING), torch.no_grad():
        assert list(model.state_dict()) == keys
        assert torch.equal(model(**batch).logits, expected)
        assert not any(hasattr(module, "quantization_scheme") for module in model.modules())


def test_a_block_that_raises_detaches_too():
    model = tiny_moe((0,))
    before = picture(model)
    with pytest.raises(KeyError), attach(model, EVERYTHING):
        raise KeyError
    assert picture(model) == before


@pytest.mark.parametrize(
    ("scheme_observer", "given", "expected"),
    [
        (None, None, MemorylessMinMaxObserver),
        ("minmax", None, MinMaxObserver),
        ("minmax", "memoryless_minmax", MemorylessMinMaxObserver),
        (None, "Memoryless-MinMax", MemorylessMinMaxObserver),
    ],
)
def test_the_weight_observer_is_the_argument_else_the_schemes_else_min_max(
    scheme_observer, given, expected
):
    scheme = QuantizationScheme(
        targets=["Linear"], weights=QuantizationArgs(num_bits=4, observer=scheme_observer)
    )
    model = tiny_moe((0,))
    with attach(model, scheme, observer=given):
        assert type(model.layers[0].experts[0].up_proj.weight_observer) is expected


@pytest.mark.parametrize(
    ("scheme_observer", "given", "expected"),
    [
        (None, None, StaticMinMaxObserver),
        ("minmax", None, MinMaxObserver),
        ("minmax", "memoryless_minmax", MemorylessMinMaxObserver),
    ],
)
def test_the_activation_observer_is_the_argument_else_the_schemes_else_static(
    scheme_observer, given, expected
):
    args = QuantizationArgs(num_bits=8, observer=scheme_observer)
    scheme = QuantizationScheme(targets=["Linear"], input_activations=args, output_activations=args)
    model = tiny_moe((0,))
    # the observer of weights has no say here
    with attach(model, scheme, observer="mse", activation_observer=given):
        up = model.layers[0].experts[0].up_proj
        assert observers_of(up) == {"input_observer": expected, "output_observer": expected}


def test_options_reach_weight_observers_alone_over_those_of_the_scheme():
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(
            num_bits=4, observer="memoryless_mse", observer_kwargs={"norm": 2.0, "grid": 30}
        ),
        input_activations=QuantizationArgs(num_bits=8),
    )
    dump = scheme.model_dump()
    model = tiny_moe((0,))
    with attach(model, scheme, observer_options={"norm": 3.0}):
        up = model.layers[0].experts[0].up_proj
        assert (up.weight_observer.options.norm, up.weight_observer.options.grid) == (3.0, 30)
        assert up.input_observer.args.observer_kwargs == {}
    assert scheme.model_dump() == dump


def test_options_of_the_schemes_observer_are_not_handed_to_another():
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(
            num_bits=4, observer="minmax", observer_kwargs={"averaging_constant": 0.5}
        ),
    )
    model = tiny_moe((0,))
    with attach(model, scheme, observer="memoryless_minmax"):
        assert model.layers[0].experts[0].up_proj.weight_observer.args.observer_kwargs == {}


def test_dynamic_activations_get_no_observer_and_local_ones_do():
    model = tiny_llama()
    q_proj = model.model.layers[0].self_attn.q_proj
    with attach(model, "W8A8"):
        assert list(observers_of(q_proj)) == ["weight_observer"]
    with attach(model, "NVFP4") as calibration:
        assert list(observers_of(q_proj)) == ["weight_observer", "input_observer"]
        calibration.run(token_batches(1))
        assert q_proj.input_observer.has_global_statistics
        assert not q_proj.input_observer.has_statistics


@pytest.mark.parametrize("scheme", ["W4A16", "NVFP4", "FP8"])
def test_no_weight_is_observed_before_freezing(scheme):
    model = tiny_llama()
    with attach(model, scheme) as calibration:
        calibration.run(token_batches(1))
        for each in calibration.observed:
            assert not each.weight_observer.has_statistics
            assert not each.weight_observer.has_global_statistics


BAD = {
    "unknown option": ({"observer_options": {"nrom": 2}}, ValueError, "unknown option 'nrom'"),
    "bad value": ({"observer_options": {"norm": "x"}}, ValueError, "norm"),
    "unknown observer": ({"observer": "mze"}, CalipersError, "unknown observer 'mze'.*imatrix_mse"),
    "unknown activation observer": (
        {"activation_observer": "mze"},
        CalipersError,
        "unknown observer 'mze'",
    ),
    "importance of activations": (
        {"activation_observer": "imatrix_mse"},
        CalipersError,
        "cannot measure the input activations of layers.0.experts.0.up_proj",
    ),
    "scheme": ({"ignore": ["re:nothing"]}, SchemeError, "ignore pattern 're:nothing'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_fail_before_anything_is_attached(case):
    arguments, error, message = BAD[case]
    model = tiny_moe((0,))
    before = picture(model)
    with pytest.raises(error, match=message):
        attach(model, "FP8", **arguments)
    assert picture(model) == before


def test_an_embedding_cannot_be_weighed_by_its_inputs():
    scheme = QuantizationScheme(targets=["Embedding"], weights=QuantizationArgs(num_bits=8))
    model = tiny_llama()
    before = picture(model)
    with pytest.raises(CalipersError, match=r"the Embedding model\.embed_tokens, whose inputs are"):
        attach(model, scheme, observer="imatrix_mse")
    assert picture(model) == before


def test_attaching_twice_is_an_error_and_harms_nothing():
    model = tiny_moe((0,))
    with attach(model, "W8A8"):
        before = picture(model)
        with pytest.raises(
            CalipersError,
            match=r"has 8 observers attached already \(layers\.0\.experts\.0\.up_proj"
            r"\.weight_observer, \.\.\.\): call detach\(\)",
        ):
            attach(model, "W8A8")
        assert picture(model) == before
    attach(model, "W8A8").detach()


class Failing(MemorylessMinMaxObserver):
    """Cannot be attached to the second module it meets."""

    met = 0

    def attach(self, module: nn.Module) -> None:
        Failing.met += 1
        if Failing.met == 2:
            raise RuntimeError("no room")


def test_an_observer_that_fails_to_attach_leaves_no_trace(monkeypatch):
    monkeypatch.setattr(Observer, "get_value_from_registry", classmethod(lambda cls, name: Failing))
    model = tiny_moe((0,))
    before = picture(model)
    with pytest.raises(RuntimeError, match="no room"):
        attach(model, "W8A8")
    assert picture(model) == before


def test_a_model_that_is_one_layer():
    torch.manual_seed(0)
    model = nn.Linear(32, 8)
    calibration = attach(model, EVERYTHING, ignore=())
    calibration.run([torch.randn(3, 32)])
    assert model.input_observer.name == "input"
    report = calibration.freeze()
    assert report.modules[0].tokens == 3
    assert model.weight_scale.shape == (8, 1)


def test_a_copied_model_can_be_used_beside_the_first():
    model = tiny_moe((0,))
    with attach(model, EVERYTHING):
        copied = copy.deepcopy(model)
        copied(hidden_batches(1)[0])
        assert not model.layers[0].experts[0].up_proj.input_observer.has_statistics
        assert copied.layers[0].experts[0].up_proj.input_observer.has_statistics


class FusedExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(4, 8, 8))


def test_fused_experts_are_told_of_since_they_stay_unquantized():
    model = nn.ModuleDict({"shared": nn.Linear(8, 8), "experts": FusedExperts()})
    messages: list[str] = []
    sink = logger.add(messages.append, level="WARNING", format="{message}")
    try:
        with attach(model, "W8A8"):
            pass
        with attach(nn.Sequential(nn.Conv1d(2, 2, 3), nn.Linear(8, 4)), "W8A8"):
            pass
    finally:
        logger.remove(sink)
    assert len(messages) == 1
    assert "1 modules hold experts fused into one parameter (experts, ...)" in messages[0]
