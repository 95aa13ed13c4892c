"""Which modules get which scheme, and which are left alone and why."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from loguru import logger
from torch import nn

from architectures import (
    bert,
    gpt2_classifier,
    jamba,
    llama4,
    llama_classifier,
    mamba,
    mixtral,
    qwen3_next,
    whisper,
)
from calibration.tiny_models import hidden_batches, tiny_llama, tiny_moe, token_batches
from calipers.calibration import attach, calibrate, resolve_config
from calipers.calibration.architectures import find_output_heads, find_routers
from calipers.calibration.targets import Resolution, resolve_modules
from calipers.errors import SchemeError


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


class Multimodal(nn.Module):
    """A model with a language model inside whose head nobody declares."""

    def __init__(self) -> None:
        super().__init__()
        self.language_model = nn.ModuleDict(
            {"proj": nn.Linear(32, 32), "lm_head": nn.Linear(32, 64)}
        )
        self.classifier = nn.Linear(32, 2)
        self.blocks = nn.ModuleList([nn.ModuleDict({"classifier": nn.Linear(32, 32)})])


HEADS = {
    "llama": (tiny_llama, ["lm_head"]),
    "wrapped": (lambda: Wrapper(tiny_llama()), ["inner.lm_head"]),
    "compiled": (lambda: torch.compile(tiny_llama(), backend="eager"), ["_orig_mod.lm_head"]),
    "whisper": (whisper, ["proj_out"]),
    "bert": (bert, ["cls.predictions.decoder", "cls.predictions.transform.dense"]),
    "gpt2 classifier": (gpt2_classifier, ["score"]),
    "llama classifier": (llama_classifier, ["score"]),
    "not of transformers": (Multimodal, ["classifier", "language_model.lm_head"]),
}


def resolved(model: nn.Module, scheme: Any = "W8A8", ignore: Any = ()) -> Resolution:
    return resolve_modules(model, resolve_config(scheme, ignore))


def by_reason(found: Any) -> dict[str, list[str]]:
    """Names that are left alone, by reason; takes a resolution or a report."""
    reasons: dict[str, list[str]] = {}
    for each in found.left_alone:
        reasons.setdefault(each.reason, []).append(each.name)
    return reasons


@pytest.fixture
def warnings_logged():
    messages: list[str] = []
    sink = logger.add(lambda message: messages.append(str(message)), level="WARNING")
    yield messages
    logger.remove(sink)


class TestOutputHeads:
    @pytest.mark.parametrize("case", HEADS)
    def test_are_left_alone_wherever_they_are(self, case):
        make, heads = HEADS[case]
        model = make()
        found = resolved(model)
        assert sorted(by_reason(found)["output head"]) == heads
        assert not {target.name for target in found.targets} & set(heads)
        assert find_output_heads(model) == set(heads)

    def test_whatever_else_is_ignored(self):
        found = resolved(tiny_llama(), ignore="re:.*down_proj")
        assert by_reason(found)["output head"] == ["lm_head"]

    def test_but_for_a_target_that_is_its_exact_name(self):
        for targets in (["Linear", "lm_head"], ["lm_head"]):
            config = QuantizationConfig(config_groups={"W8A16": targets})
            model = tiny_llama()
            report = calibrate(model, config, "memoryless_minmax")
            assert "lm_head" in [each.name for each in report.modules]
            assert hasattr(model.lm_head, "weight_scale")

    def test_a_pattern_that_reaches_nothing_else_is_an_error_with_the_way_out(self):
        config = QuantizationConfig(config_groups={"W8A16": ["re:.*lm_head"]})
        with pytest.raises(SchemeError) as caught:
            calibrate(tiny_llama(), config)
        assert "'re:.*lm_head' matches only modules that are left alone (1 output head)" in str(
            caught.value
        )
        assert "the exact name of a module as a target quantizes it" in str(caught.value)

    def test_an_explicit_lm_head_where_there_is_none_is_told(self, warnings_logged):
        calibrate(tiny_moe((0, 1, 2, 3)), "W8A8", ignore=("lm_head",))
        assert any("ignore pattern 'lm_head' matches no module" in m for m in warnings_logged)


class TestRouters:
    @pytest.mark.parametrize(
        ("make", "endings"),
        [
            (mixtral, {"mlp.gate"}),
            (llama4, {"feed_forward.router"}),
            (qwen3_next, {"mlp.gate", "mlp.shared_expert_gate"}),
            (jamba, {"feed_forward.router"}),
        ],
        ids=["mixtral", "llama4", "qwen3_next", "jamba"],
    )
    def test_are_left_alone(self, make, endings):
        model = make()
        found = resolved(model)
        assert {".".join(n.split(".")[-2:]) for n in by_reason(found)["router"]} == endings
        assert not {target.name for target in found.targets} & find_routers(model)

    def test_a_gate_means_a_router_beside_experts_alone(self):
        model = nn.ModuleDict(
            {
                "attention": nn.ModuleDict({"gate": nn.Linear(32, 32)}),
                "moe": nn.ModuleDict({"gate": nn.Linear(32, 4), "experts": nn.ModuleList()}),
            }
        )
        assert find_routers(model) == {"moe.gate"}


class TestIgnoredContainers:
    @pytest.mark.parametrize(
        ("pattern", "layers"),
        [("model.layers.0.mlp", {0}), ("LlamaMLP", {0, 1}), (r"re:.*mlp$", {0, 1})],
    )
    def test_mean_all_that_they_contain(self, pattern, layers):
        found = resolved(tiny_llama(layers=2), ignore=pattern)
        assert by_reason(found)["ignored by you"] == [
            f"model.layers.{layer}.mlp.{leaf}"
            for layer in sorted(layers)
            for leaf in ("gate_proj", "up_proj", "down_proj")
        ]

    def test_a_regex_that_spares_one_layer_spares_it(self):
        """A negative lookahead matches the containers of what it spares too."""
        found = resolved(tiny_llama(), ignore=r"re:^((?!o_proj).)*$")
        assert [target.name for target in found.targets] == ["model.layers.0.self_attn.o_proj"]

    def test_the_whole_model(self):
        with pytest.raises(SchemeError, match="matches only ignored modules"):
            calibrate(tiny_llama(), "W8A8", ignore="LlamaForCausalLM")

    def test_a_pattern_that_is_no_regex(self):
        with pytest.raises(SchemeError, match=r"ignore pattern 're:\*mlp' is no regular express"):
            calibrate(tiny_llama(), "W8A8", ignore="re:*mlp")


class MyLinear(nn.Linear):
    """What models do to Linear: the same forward in other words."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden @ self.weight.T + (0 if self.bias is None else self.bias)


class Gated(nn.Linear):
    def forward(self, hidden: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden) * gate


class TestKinds:
    def test_subclasses_of_linear_are_quantized_where_they_are_called_alike(self):
        model = nn.Sequential(MyLinear(32, 32), nn.Linear(32, 32)).eval()
        model.append(Gated(32, 32))
        found = resolved(model)
        assert [target.name for target in found.targets] == ["0", "1"]
        assert by_reason(found) == {"not a Linear": ["2"]}

    def test_a_body_of_other_layers_is_no_success(self):
        with pytest.raises(SchemeError) as caught:
            calibrate(gpt2_classifier(), "W8A8")
        assert "matches only modules that are left alone (1 output head): score" in str(
            caught.value
        )
        assert "8 Conv1D" in str(caught.value)

    def test_a_small_share_is_a_warning_and_the_report_has_the_rest(self, warnings_logged):
        model = nn.Sequential(nn.Linear(32, 32), nn.Conv1d(32, 32, 3), nn.Linear(32, 32))
        with attach(model, "W8A8", ignore="2") as calibration:
            report = calibration.freeze()
        assert by_reason(report) == {"not a Linear": ["1"], "ignored by you": ["2"]}
        assert report.quantized_share == 1 / (1 + 3 + 1)
        assert any("only 20% of the model's projection weights" in m for m in warnings_logged)
        row = report.to_dict()["left_alone"][0]
        weights = {"weights": 3072, "share": 3 / (1 + 3 + 1)}
        assert row == {"name": "1", "kind": "Conv1d", "reason": "not a Linear", **weights}

    def test_the_share_leaves_out_heads_embeddings_and_norms(self):
        report = calibrate(tiny_llama(), "W8A8")
        assert report.quantized_share == 1.0
        assert by_reason(report) == {"output head": ["lm_head"]}

    def test_experts_count(self):
        report = calibrate(mixtral(), "W8A8", ignore="MixtralExperts")
        assert by_reason(report)["ignored by you"] == [
            f"model.layers.{layer}.mlp.experts" for layer in range(2)
        ]
        kept = [each for each in report.left_alone if each.reason == "ignored by you"]
        assert {(each.kind, each.weights) for each in kept} == {("MixtralExperts", 2 * 3 * 2**15)}
        attention, experts = 2 * (128 * 128 * 2 + 64 * 128 * 2), 2 * 2 * 3 * 128 * 256
        routers = 2 * 2 * 128
        expected = attention / (attention + experts + routers)
        assert report.quantized_share == pytest.approx(expected, rel=1e-12)

    def test_shapes_that_do_not_fit_are_left_alone_on_request(self):
        model = nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 32))
        scheme = QuantizationConfig(config_groups={"MXFP4A16": ["Linear"]})
        with pytest.raises(SchemeError, match=r"1: weights: group_size 32 does not divide 48"):
            calibrate(model, scheme)
        report = calibrate(model, scheme, on_unfit="skip")
        assert by_reason(report) == {"shape": ["1"]}
        assert [each.name for each in report.modules] == ["0"]
        with pytest.raises(ValueError, match="on_unfit must be one of error, skip, got 'drop'"):
            calibrate(model, scheme, on_unfit="drop")

    def test_a_second_call_counts_what_the_first_one_did(self):
        model = tiny_llama()
        calibrate(model, "W8A8", ignore="LlamaMLP")
        report = calibrate(model, "W8A16", ignore="LlamaAttention")
        assert report.quantized_share == 1.0
        assert Counter(each.reason for each in report.left_alone) == {
            "quantized before": 4,
            "output head": 1,
        }


class ReadsItsWeight(nn.Module):
    """A layer whose weight is read without a call, in a model that says how to run it."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.read = nn.Linear(32, 32), nn.Linear(32, 32)
        self.dummy_inputs = {"hidden": torch.ones(2, 32)}

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.plain(hidden) @ self.read.weight


class TestNeverCalled:
    @pytest.mark.parametrize("with_data", [True, False])
    def test_found_by_running(self, with_data, warnings_logged):
        model = ReadsItsWeight()
        data = [{"hidden": torch.randn(3, 32)}] if with_data else None
        scheme = "FP8" if with_data else "W8A8"
        report = calibrate(model, scheme, "memoryless_minmax", data)
        assert [each.name for each in report.modules] == ["plain"]
        assert by_reason(report) == {"never called": ["read"]}
        assert not hasattr(model.read, "quantization_scheme")
        assert any("left alone" in m and "read" in m for m in warnings_logged)

    def test_experts_without_tokens_are_another_matter(self):
        report = calibrate(
            tiny_moe((0,)), "FP8", "memoryless_minmax", hidden_batches(), on_missing="skip"
        )
        assert set(by_reason(report)) == {"no data"}
        assert len(report.skipped) == 6

    @pytest.mark.parametrize(
        ("make", "names"),
        [
            (lambda: nn.MultiheadAttention(32, 2), ["out_proj"]),
            (
                lambda: nn.TransformerEncoder(
                    nn.TransformerEncoderLayer(32, 2, 32, batch_first=True), 1
                ),
                [f"layers.0.{leaf}" for leaf in ("self_attn.out_proj", "linear1", "linear2")],
            ),
            (mamba, [f"backbone.layers.{layer}.mixer.dt_proj" for layer in range(2)]),
            (jamba, ["model.layers.0.mamba.dt_proj"]),
        ],
        ids=["attention", "encoder", "mamba", "jamba"],
    )
    def test_known_classes_without_running(self, make, names):
        model = nn.ModuleDict({"body": make(), "other": nn.Linear(32, 32)})
        found = by_reason(resolved(model))
        assert found["never called"] == [f"body.{name}" for name in names]

    def test_counting_leaves_no_hook(self):
        model = tiny_llama()
        with attach(model, "W8A8"):
            pass
        calibrate(model, "W8A8")
        assert not any(module._forward_pre_hooks for module in model.modules())


class TestFusedLayers:
    def test_only_some_members_is_a_warning(self, warnings_logged):
        calibrate(tiny_llama(layers=2), "W8A8", ignore="re:.*q_proj")
        (message,) = [m for m in warnings_logged if "fuse" in m]
        assert "model.layers.0.self_attn: engines fuse these layers" in message
        assert "q_proj unquantized, k_proj weights int8 channel and inputs int8 token" in message
        assert "and 1 more like it" in message

    def test_and_an_error_under_nvfp4(self):
        with pytest.raises(SchemeError) as caught:
            calibrate(tiny_llama(), "NVFP4A16", ignore="re:.*q_proj")
        assert "model.layers.0.self_attn: engines fuse these layers" in str(caught.value)
        assert "quantize all of them or none" in str(caught.value)

    def test_different_schemes_in_one_call_and_in_two(self, warnings_logged):
        groups = {"W8A16": ["re:.*(gate|down)_proj"], "W4A16": ["re:.*up_proj"]}
        calibrate(tiny_llama(), QuantizationConfig(config_groups=groups))
        assert any(
            "gate_proj weights int8" in m and "up_proj weights int4" in m for m in warnings_logged
        )
        warnings_logged.clear()
        model = tiny_llama()
        calibrate(model, "W8A16", ignore="re:.*up_proj")
        warnings_logged.clear()
        calibrate(model, "W4A16", ignore="re:.*(?<!up_proj)$")
        assert any(
            "gate_proj weights int8" in m and "up_proj weights int4" in m for m in warnings_logged
        )

    def test_all_alike_says_nothing(self, warnings_logged):
        calibrate(tiny_llama(), "NVFP4", "memoryless_minmax", token_batches())
        assert not any("fuse" in m for m in warnings_logged)
