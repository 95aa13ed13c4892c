from __future__ import annotations

import copy

import pytest
import torch
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    apply_quantization_config,
)
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES as PRESETS
from torch import nn

from calibration.tiny_models import tiny_llama
from calipers.calibration import check_scheme, resolve_config
from calipers.calibration.targets import ONLY_LINEAR
from calipers.errors import SchemeError


class Model(nn.Module):
    """in_features 48: divided by 16, not by 20 or 128."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 48)
        self.norm = nn.LayerNorm(48)
        self.first = nn.Linear(48, 32)
        self.second = nn.Linear(32, 48)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(self.norm(self.embed(ids))))


IDS = torch.arange(10).reshape(2, 5)


def config_of(targets=("Linear",), ignore=(), **scheme) -> QuantizationConfig:
    return resolve_config(QuantizationScheme(targets=list(targets), **scheme), ignore)


def args(**fields) -> QuantizationArgs:
    return QuantizationArgs(**{"num_bits": 8, **fields})


def told(model: nn.Module, config: QuantizationConfig) -> list[str]:
    with pytest.raises(SchemeError) as caught:
        check_scheme(model, config)
    first, *lines = str(caught.value).splitlines()
    assert first == "the model cannot take this scheme:"
    return [line.strip() for line in lines]


def problems(model: nn.Module, config: QuantizationConfig) -> list[str]:
    """What is told, but for the ways out of columns that a group size does not divide."""
    return [
        line
        for line in told(model, config)
        if not line.startswith(("what to do: ", "group sizes that divide "))
    ]


def runs(model: nn.Module, config: QuantizationConfig, inputs: torch.Tensor) -> bool:
    """Whether compressed-tensors takes the config and the result runs."""
    try:
        apply_quantization_config(model, config, show_progress=False)
        for name, parameter in model.named_parameters():
            if name.endswith("scale"):
                parameter.data.fill_(0.1)
        model(inputs)
    except (ValueError, RuntimeError, NotImplementedError):
        return False
    return True


# what compressed-tensors itself refuses, sooner or later; `check_scheme` must refuse just that
CASES = {
    "group": ({"weights": args(group_size=16)}, True),
    "ragged group": ({"weights": args(group_size=20)}, False),
    "group wider than the row": ({"weights": args(group_size=64)}, False),
    "block": ({"weights": args(strategy="block", block_structure=[20, 20])}, True),
    "big block": ({"weights": args(strategy="block", block_structure=[128, 128])}, True),
    "attn_head": ({"weights": args(strategy="attn_head")}, False),
    "fp5": ({"weights": args(num_bits=5, type="float", zp_dtype=torch.int8)}, False),
    "fp8": ({"weights": args(type="float")}, True),
    "dynamic group input": ({"input_activations": args(group_size=16, dynamic=True)}, True),
    "ragged dynamic group": ({"input_activations": args(group_size=20, dynamic=True)}, False),
    "static group input": ({"input_activations": args(group_size=16)}, False),
    "static tensor_group": (
        {
            "input_activations": args(
                num_bits=4, type="float", strategy="tensor_group", group_size=16
            )
        },
        False,
    ),
    "input by head": ({"input_activations": args(strategy="attn_head")}, False),
    "output by channel": ({"output_activations": args(strategy="channel")}, False),
    "output by block": (
        {"output_activations": args(strategy="block", block_structure=[8, 8])},
        False,
    ),
    "dynamic group output": ({"output_activations": args(group_size=16, dynamic=True)}, True),
    "ragged group output": ({"output_activations": args(group_size=24, dynamic=True)}, False),
    "fp4 asymmetric input": (
        {
            "input_activations": args(
                num_bits=4, type="float", symmetric=False, group_size=16, dynamic=True
            )
        },
        False,
    ),
    "static input": ({"input_activations": args()}, True),
    "static output": ({"output_activations": args()}, True),
    "dynamic token output": ({"output_activations": args(strategy="token", dynamic=True)}, True),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore")
def test_refuses_what_compressed_tensors_cannot_run_and_nothing_else(case):
    scheme, fits = CASES[case]
    config = config_of(["first"], **scheme)
    assert runs(Model(), config, IDS) == fits
    if fits:
        assert [target.name for target in check_scheme(Model(), config)] == ["first"]
    else:
        assert all(line.startswith("first: ") for line in problems(Model(), config))


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_fits_a_model_of_suitable_size(preset):
    targets = check_scheme(tiny_llama(), resolve_config(preset))
    assert len(targets) == (0 if preset == "UNQUANTIZED" else 7)
    assert all(target.name != "lm_head" for target in targets)


def test_lists_every_module_with_its_reason():
    assert problems(Model(), config_of(weights=args(group_size=20))) == [
        "first: weights: group_size 20 does not divide 48 columns",
        "second: weights: group_size 20 does not divide 32 columns",
    ]


def test_columns_that_no_group_divides_come_with_the_sizes_that_do():
    skip = 'on_unfit="skip" (--on-unfit skip) leaves those modules alone'
    assert told(Model(), config_of(weights=args(group_size=20)))[2:] == [
        "group sizes that divide all columns of weights: 16, 8",
        f'what to do: scheme_options={{"group_size": 16}} (--group-size 16); or {skip}',
    ]
    model = nn.ModuleList(nn.Linear(columns, 8, bias=False) for columns in (576, 1536, 576))
    assert told(model, config_of(weights=args(group_size=128))) == [
        "* (2): weights: group_size 128 does not divide 576 columns",
        "group sizes that divide all columns of weights: 64, 32, 16, 8",
        f'what to do: scheme_options={{"group_size": 64}} (--group-size 64); or {skip}',
    ]


@pytest.mark.parametrize(
    ("columns", "scheme"),
    [
        (20, {"weights": args(group_size=16)}),
        (24, {"weights": args(num_bits=4, type="float", strategy="tensor_group", group_size=16)}),
        (24, {"weights": args(num_bits=4, type="float", group_size=16, scale_dtype=torch.uint8)}),
        (24, {"input_activations": args(group_size=16, dynamic=True)}),
    ],
    ids=["no power of two", "NVFP4", "MX", "inputs"],
)
def test_where_no_other_group_size_helps_none_is_named(columns, scheme):
    assert told(nn.Sequential(nn.Linear(columns, 8)), config_of(**scheme))[1:] == [
        'what to do: on_unfit="skip" (--on-unfit skip) leaves those modules alone'
    ]


def test_modules_that_share_a_reason_share_a_line():
    lines = problems(
        tiny_llama(), config_of(weights=args(num_bits=5, type="float", zp_dtype=torch.int8))
    )
    assert len(lines) == 1
    kinds, reason = lines[0].split(": ", 1)
    assert reason == "weights: float formats have 4, 6, 8 bits, got 5"
    assert len(kinds.split(", ")) == 7


def test_an_error_does_not_grow_with_the_kinds_of_modules():
    model = nn.ModuleDict({chr(97 + i) * 3: nn.Linear(20, 8) for i in range(20)})
    [line] = problems(model, config_of(weights=args(group_size=16)))
    assert "lll, and 8 other kinds: weights: group_size 16" in line


def test_lists_weights_and_inputs_and_patterns_together():
    scheme = {
        "weights": args(num_bits=4, type="float", symmetric=False, group_size=16),
        "output_activations": args(group_size=32),
    }
    lines = problems(Model(), config_of(["Linear", "nothing"], ["re:zz"], **scheme))
    assert lines == [
        "ignore pattern 're:zz' matches no module",
        "target 'nothing' matches no module",
        "first, second: weights: fp4 is always symmetric, got symmetric=False",
        "first, second: output activations: static strategy 'group' cannot run: fake-quantize "
        "would take groups for tokens; use dynamic=True, or 'local' with tensor_group",
        "second: output activations: group_size 32 does not divide 48 columns",
    ]


def test_local_inputs_must_be_divided_too():
    local = args(num_bits=4, type="float", strategy="tensor_group", group_size=20, dynamic="local")
    assert problems(Model(), config_of(["first"], input_activations=local)) == [
        "first: input activations: group_size 20 does not divide 48 columns"
    ]


def test_output_groups_count_output_features():
    config = config_of(["first"], output_activations=args(group_size=48, dynamic=True))
    assert problems(Model(), config) == [
        "first: output activations: group_size 48 does not divide 32 columns"
    ]


def test_embeddings_take_weights_but_no_inputs():
    config = config_of(["Embedding"], weights=args(group_size=16), output_activations=args())
    assert [target.name for target in check_scheme(Model(), config)] == ["embed"]
    config = config_of(["Embedding"], input_activations=args(strategy="token", dynamic=True))
    assert problems(Model(), config) == [
        "embed: input activations: an Embedding's input is token ids, which cannot be quantized"
    ]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (args(strategy="attn_head"), "strategy 'attn_head' means nothing for a weight"),
        (args(strategy="token", dynamic=True), "must be static, got dynamic=True"),
        (args(strategy="tensor", dynamic=True), "must be static, got dynamic=True"),
        (
            args(num_bits=5, type="float", zp_dtype=torch.int8),
            "float formats have 4, 6, 8 bits, got 5",
        ),
    ],
)
def test_weights_that_cannot_be(weights, message):
    lines = problems(Model(), config_of(["first"], weights=weights))
    assert f"first: weights: {message}" in lines


def test_activations_that_cannot_be():
    lines = problems(Model(), config_of(["first"], output_activations=args(strategy="channel")))
    assert lines == [
        "first: output activations: strategy 'channel' means nothing for the activations of a layer"
    ]


def test_already_quantized_modules():
    model = Model()
    apply_quantization_config(model, resolve_config("W8A8", ignore=["second"]), show_progress=False)
    assert problems(model, config_of(weights=args())) == ["first: is already quantized"]
    assert [t.name for t in check_scheme(model, config_of(["second"], weights=args()))] == [
        "second"
    ]
    del model.first.quantization_scheme
    model.first.quantization_status = QuantizationStatus.FROZEN
    assert problems(model, config_of(weights=args())) == ["first: is already quantized"]


def test_weights_that_are_no_floats():
    model = Model()
    model.first.weight = nn.Parameter(torch.zeros(32, 48, dtype=torch.uint8), requires_grad=False)
    model.second.to(torch.float8_e4m3fn)
    assert problems(model, config_of(weights=args())) == [
        f"{name}: its weight must be a float16, bfloat16, float32 or float64 tensor, got {dtype}"
        for name, dtype in (("first", torch.uint8), ("second", torch.float8_e4m3fn))
    ]


def test_the_default_ignore_may_match_nothing_but_no_other():
    assert check_scheme(Model(), resolve_config("W8A8"))
    lines = problems(Model(), resolve_config("W8A8", ignore=("lm_head", "lm_heads")))
    assert lines == ["ignore pattern 'lm_heads' matches no module"]
    lines = problems(tiny_llama(), resolve_config("W8A8", ignore=("lm_heads", "LlamaMPL", "re:z")))
    assert lines == [
        "ignore pattern 'lm_heads' matches no module. Did you mean 'lm_head'?",
        "ignore pattern 'LlamaMPL' matches no module. Did you mean 'LlamaMLP'?",
        "ignore pattern 're:z' matches no module",
    ]


def test_a_target_that_matches_nothing_may_mean_another():
    assert problems(Model(), config_of(["Linaer"], weights=args())) == [
        "target 'Linaer' matches no module. Did you mean 'Linear'?"
    ]


def test_targets_that_match_only_ignored_modules():
    config = config_of(["re:first|second"], ["Linear"], weights=args())
    assert problems(Model(), config) == [
        "target 're:first|second' matches only ignored modules: first, second"
    ]


def test_other_layer_types_are_told_by_name():
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Linear(4, 4), nn.Conv2d(3, 3, 3), nn.LayerNorm(4))
    lines = problems(model, config_of(["Conv2d", "Linear", "3"], weights=args()))
    ending = f"cannot be quantized: {ONLY_LINEAR} (matched by"
    assert [line.split(ending)[0] for line in lines] == ["* (2): Conv2d ", "3: LayerNorm "]
    assert all(line.endswith("ignore it to leave it as it is)") for line in lines)


def test_a_regex_may_touch_containers_norms_and_activations():
    model = tiny_llama()
    targets = check_scheme(model, config_of([r"re:model\.layers\.0.*"], weights=args()))
    assert len(targets) == 7
    assert all(isinstance(target.module, nn.Linear) for target in targets)


def test_a_regex_that_touches_other_matrices_is_told():
    model = nn.ModuleDict({"block": nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 4, 1))})
    lines = problems(model, config_of(["re:block"], weights=args()))
    assert [line.split(" ")[:2] for line in lines] == [["block.1:", "Conv1d"]]
    assert check_scheme(model, config_of(["re:block"], ["Conv1d"], weights=args()))


def test_a_container_named_alone_is_told():
    lines = problems(tiny_llama(), config_of(["LlamaMLP"], weights=args()))
    assert [line.split(" cannot")[0] for line in lines] == ["model.layers.0.mlp: LlamaMLP"]


def test_attention_takes_states_and_no_weights():
    config = config_of(["LlamaAttention"], input_activations=args(num_bits=8))
    (target,) = check_scheme(tiny_llama(), config)
    assert (target.name, list(target.args)) == ("model.layers.0.self_attn", ["q", "k", "v"])
    lines = problems(tiny_llama(), config_of(["LlamaAttention"], weights=args()))
    assert lines == [
        "model.layers.0.self_attn: attention has no weights of its own: target its q_proj, k_proj "
        "and v_proj instead"
    ]


def test_exact_names_win_over_patterns_over_classes():
    groups = {
        "all": QuantizationScheme(targets=["Linear"], weights=args(num_bits=8)),
        "some": QuantizationScheme(targets=["re:.*mlp.*"], weights=args(num_bits=6)),
        "one": QuantizationScheme(targets=["model.layers.0.mlp.up_proj"], weights=args(num_bits=4)),
    }
    config = resolve_config(QuantizationConfig(config_groups=groups))
    bits = {
        target.name.rpartition(".")[2]: target.args["weight"].num_bits
        for target in check_scheme(tiny_llama(), config)
    }
    assert (bits["q_proj"], bits["gate_proj"], bits["up_proj"]) == (8, 6, 4)


def test_a_group_that_quantizes_nothing_keeps_its_modules_out():
    groups = {
        "keep": QuantizationScheme(targets=["first"]),
        "rest": QuantizationScheme(targets=["Linear"], weights=args()),
    }
    config = resolve_config(QuantizationConfig(config_groups=groups))
    assert [target.name for target in check_scheme(Model(), config)] == ["second"]


def test_checking_changes_neither_model_nor_config():
    model, config = tiny_llama(), resolve_config("W4A16")
    before, dump = copy.deepcopy(model.state_dict()), config.model_dump()
    check_scheme(model, config)
    assert config.model_dump() == dump
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(hasattr(module, "quantization_scheme") for module in model.modules())


@pytest.mark.skipif("MXFP6A16" in PRESETS, reason="this compressed-tensors has floats of 6 bits")
def test_floats_of_6_bits_need_a_library_that_has_them():
    six = args(num_bits=6, type="float", zp_dtype=torch.int8)
    (line,) = problems(Model(), config_of(["first"], weights=six))
    assert "has no floats of 6 bits; 0.20 has" in line
