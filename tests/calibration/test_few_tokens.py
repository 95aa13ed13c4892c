"""Experts that saw few tokens, or none: coverage, and what stands in for their own statistics."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from loguru import logger
from torch import nn

import architectures
from architectures import example_inputs, output_of, spread_weights
from calibration.tiny_models import hidden_batches, tiny_moe
from calipers.calibration import attach, calibrate
from calipers.calibration.experts import LinearExperts
from calipers.calibration.few_tokens import ENOUGH_TOKENS
from calipers.errors import CalipersError, MissingDataError
from calipers.observers import MemorylessMinMaxObserver, Observer

STATIC = QuantizationScheme(
    targets=["Linear"],
    weights=QuantizationArgs(num_bits=8, strategy="channel"),
    input_activations=QuantizationArgs(num_bits=8),
)
W4A16 = QuantizationScheme(
    targets=["Linear"], weights=QuantizationArgs(num_bits=4, strategy="group", group_size=32)
)


@Observer.register("hooks_itself_few_tokens")
class HooksItself(MemorylessMinMaxObserver):
    """Counts the calls of its module by a hook of its own."""

    needs_data = True
    calls = 0

    def attach(self, module: nn.Module) -> None:
        self.handle = module.register_forward_pre_hook(self.count)

    def detach(self, module: nn.Module) -> None:
        self.handle.remove()

    def count(self, *_: Any) -> None:
        self.calls += 1

    @property
    def has_data(self) -> bool:
        return self.calls > 0


def starved(name: str = "qwen3_moe") -> Any:
    """A model whose routers send all tokens to two of four experts."""
    model = spread_weights(getattr(architectures, name)())
    for router in (each for each in model.modules() if "TopKRouter" in type(each).__name__):
        router.register_forward_hook(_to_the_first_two)
    return model


def _to_the_first_two(router: nn.Module, args: Any, output: Any) -> Any:
    logits, weights, index = output
    return logits, weights, torch.stack([0 * index[:, 0], 0 * index[:, 1] + 1], dim=-1)


def batches(count: int = 3) -> list[dict[str, torch.Tensor]]:
    model = architectures.qwen3_moe()
    return [example_inputs(model, seed) for seed in range(count)]


def states(calibration: Any, base_name: str) -> dict[str, dict[str, torch.Tensor]]:
    return {each.name: each.observers[base_name].state() for each in calibration.observed}


class TestStarved:
    """Acceptance: no scale that nobody measured, nothing that is not finite, named by coverage."""

    @pytest.mark.parametrize("on_few_tokens", ["shrink", "pooled"])
    @pytest.mark.parametrize("scheme", ["W4A16", "FP8", "NVFP4"])
    @pytest.mark.parametrize("observer", ["imatrix_mse", "optimal", "memoryless_minmax"])
    def test_all_scales_are_measured(self, scheme: str, observer: str, on_few_tokens: str) -> None:
        model = starved()
        report = calibrate(model, scheme, observer, batches(), on_few_tokens=on_few_tokens)
        assert report.quantized_share > 0.99
        assert not report.skipped
        for row in report.modules:
            assert row.fallback == ()
            module = model.get_submodule(row.name)
            found = {n: p for n, p in module.named_parameters() if n.endswith("_scale")}
            assert found
            for parameter in found.values():
                assert torch.isfinite(parameter).all()
                assert (parameter > 0).all()
                assert not (parameter == 1).all()
            if scheme == "FP8" and ".experts." in row.name:
                leaf = row.name.rpartition(".")[2]
                seen = row.name.partition(".experts.")[0] + f".experts.0.{leaf}"
                assert module.input_scale < 4 * model.get_submodule(seen).input_scale
        assert torch.isfinite(output_of(model)).all()

    def test_coverage_names_them(self) -> None:
        report = calibrate(starved(), "W4A16", data=batches())
        tokens = 3 * 24
        for layer, found in enumerate(report.coverage):
            name = f"model.layers.{layer}.mlp.experts"
            assert found.name == name
            assert found.tokens == {
                f"{name}.0": tokens,
                f"{name}.1": tokens,
                f"{name}.2": 0,
                f"{name}.3": 0,
            }
            assert found.unseen == [f"{name}.2", f"{name}.3"]
            assert found.few == list(found.tokens)
            assert found.enough == ENOUGH_TOKENS
        assert len(report.coverage) == 2
        read = json.loads(json.dumps(report.to_dict()))["coverage"]
        assert read == [each.to_dict() for each in report.coverage]
        assert read[0]["unseen"] == ["model.layers.0.mlp.experts.2", "model.layers.0.mlp.experts.3"]
        assert "experts: 8 of 8 saw fewer than 256 tokens, 4 none" in str(report)

    def test_it_is_said_once(self) -> None:
        warnings: list[str] = []
        sink = logger.add(lambda message: warnings.append(message), level="WARNING")
        calibrate(starved(), "W4A16", data=batches(), enough_tokens=10)
        logger.remove(sink)
        (told,) = [each for each in warnings if "experts saw fewer than" in each]
        assert "4 of 8 experts saw fewer than 10 tokens, 4 of them none" in told

    def test_error_names_them_and_the_ways_out(self) -> None:
        model = starved()
        before = dict(model.named_modules())
        with pytest.raises(MissingDataError) as caught:
            calibrate(model, "W4A16", data=batches(), on_few_tokens="error", enough_tokens=20)
        lines = str(caught.value).splitlines()
        assert lines[:2] == [
            "experts saw fewer than 20 tokens:",
            "  model.layers.0.mlp.experts: 2 of 4 experts, with their tokens: 2 (0), 3 (0)",
        ]
        assert "all_experts=True" in lines[-1]
        assert dict(model.named_modules()) == before

    def test_own_leaves_them_to_on_missing(self) -> None:
        with pytest.raises(MissingDataError, match=r"experts\.2\.gate_proj\.weight"):
            calibrate(starved(), "W4A16", data=batches(), on_few_tokens="own")
        report = calibrate(
            starved(), "W4A16", data=batches(), on_few_tokens="own", on_missing="fallback"
        )
        assert report["model.layers.0.mlp.experts.2.gate_proj"].fallback == ("weight",)

    def test_skip_leaves_those_without_tokens_unquantized(self) -> None:
        report = calibrate(starved(), "W4A16", data=batches(), on_missing="skip")
        assert len(report.skipped) == 2 * 2 * 3
        assert report["model.layers.0.mlp.experts.1.up_proj"].shared == 1 - 72 / 256

    def test_all_experts_see_every_token(self) -> None:
        model = starved()
        expected = output_of(model)
        calibration = attach(model, "W4A16", observer="imatrix_mse")
        seen: list[torch.Tensor] = []
        handle = model.lm_head.register_forward_hook(lambda *call: seen.append(call[-1]))
        calibration.run([example_inputs(model)], all_experts=True)
        handle.remove()
        assert torch.equal(seen[0].float(), expected)
        report = calibration.freeze(enough_tokens=24)
        assert [set(each.tokens.values()) for each in report.coverage] == [{24}, {24}]
        assert not any(each.few for each in report.coverage)
        first = {n: s for n, s in states(calibration, "weight").items() if n.endswith("gate_proj")}
        sums = [s["input_square_sum"] for n, s in first.items() if "layers.0.mlp.experts" in n]
        assert len(sums) == 4
        assert all(torch.equal(each, sums[0]) for each in sums)
        assert not any(e.all_experts for e in model.modules() if isinstance(e, LinearExperts))

    def test_all_experts_needs_experts(self) -> None:
        told = pytest.raises(CalipersError, match="all_experts: the model has no experts")
        with attach(tiny_moe((0,)), STATIC) as calibration, told:
            calibration.run(hidden_batches(), all_experts=True)


class TestShrinking:
    def test_ranges_move_with_the_share(self) -> None:
        model = tiny_moe((0, 2))
        calibration = attach(model, STATIC, observer="memoryless_minmax")
        calibration.run(hidden_batches())  # 20 tokens for each of the two
        before = states(calibration, "input")
        report = calibration.freeze(enough_tokens=80)
        for leaf in ("up_proj", "down_proj"):
            name = "layers.0.experts.{}." + leaf
            ends = {
                expert: (
                    before[name.format(expert)]["min_vals"].item(),
                    before[name.format(expert)]["max_vals"].item(),
                )
                for expert in (0, 2)
            }
            whole = min(e[0] for e in ends.values()), max(e[1] for e in ends.values())
            for expert in range(4):
                share = 0.75 if expert in ends else 1.0
                own = ends.get(expert, whole)
                low, high = (o * (1 - share) + w * share for o, w in zip(own, whole, strict=True))
                scale = model.get_submodule(name.format(expert)).input_scale.item()
                assert scale == pytest.approx(max(-low, high) / 127.5, rel=1e-6)
                assert report[name.format(expert)].shared == share
        assert before == states(calibration, "input")

    @pytest.mark.parametrize("options", [{}, {"objective": "hessian"}])
    def test_sums_are_weighted_by_tokens(self, options: dict[str, Any]) -> None:
        """As if all experts together had seen the tokens that lack."""
        calibration = attach(tiny_moe((0, 2)), W4A16, observer="optimal", observer_options=options)
        calibration.run(hidden_batches())
        before = states(calibration, "weight")
        shared: dict[str, dict[str, torch.Tensor]] = {}
        calibration.freeze(
            enough_tokens=50,
            progress=lambda stage, *_: shared.update(
                {
                    each.name: each.tensors["weight"].lent.state()
                    for each in calibration.observed
                    if stage == "weights" and each.tensors["weight"].lent is not None
                }
            ),
        )
        keys = ["input_square_sum"]
        keys += ["input_products", "input_sketch"] if options else []
        for key in keys:
            own = {n: s[key] for n, s in before.items() if key in s and n.endswith("up_proj")}
            assert len(own) == 2
            pool = sum(own.values())
            for name in own:
                expected = own[name] + pool * (30 / 40)
                torch.testing.assert_close(shared[name][key], expected)
                assert shared[name]["num_input_tokens"] == 50
            for name in ("layers.0.experts.1.up_proj", "layers.0.experts.3.up_proj"):
                torch.testing.assert_close(shared[name][key], pool)

    def test_enough_tokens_stand_alone(self) -> None:
        one, other = tiny_moe((0, 1, 2, 3)), tiny_moe((0, 1, 2, 3))
        calibrate(one, STATIC, "imatrix_mse", hidden_batches(), enough_tokens=20)
        calibrate(other, STATIC, "imatrix_mse", hidden_batches(), on_few_tokens="own")
        expected = other.state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in one.state_dict().items())

    @pytest.mark.parametrize("observer", ["static_minmax", "minmax", "histogram", "mse"])
    @pytest.mark.parametrize("on_few_tokens", ["shrink", "pooled"])
    def test_every_observer_of_activations(self, observer: str, on_few_tokens: str) -> None:
        model = tiny_moe((0, 2, 3))
        calibration = attach(model, STATIC, observer="imatrix_mse", activation_observer=observer)
        calibration.run(hidden_batches())
        calibration.freeze(on_few_tokens=on_few_tokens)
        for leaf in ("up_proj", "down_proj"):
            found = [getattr(each, leaf).input_scale.item() for each in model.layers[0].experts]
            whole = found[1]
            assert whole > 0
            if on_few_tokens == "pooled":
                assert found == [whole] * 4
            else:
                assert len({*found}) >= 3  # one may have seen the ends of the whole
                assert all(0.3 * whole < each < 2 * whole for each in found)

    def test_more_of_a_share_is_nearer_to_the_whole(self) -> None:
        found = []
        for enough in (20, 40, 400, 40_000):
            model = tiny_moe((0, 2))
            calibrate(
                model,
                STATIC,
                "memoryless_minmax",
                hidden_batches(),
                activation_observer="histogram",
                enough_tokens=enough,
            )
            experts = model.layers[0].experts
            found.append((experts[0].up_proj.input_scale, experts[1].up_proj.input_scale))
        apart = [abs(own - whole) for own, whole in found]
        assert apart[0] > 10 * apart[2]
        assert apart[3] < 0.02 * found[3][1]

    def test_a_layer_that_saw_nothing_is_left_to_on_missing(self) -> None:
        with attach(tiny_moe((0, 1), ()), STATIC) as calibration:
            calibration.run(hidden_batches())
            with pytest.raises(MissingDataError) as caught:
                calibration.freeze()
        assert "layers.1.experts.0.up_proj.input" in str(caught.value)
        assert "layers.0.experts.2" not in str(caught.value)

    def test_an_observer_with_hooks_of_its_own_stands_alone(self) -> None:
        """What it knows is not in its state."""
        with attach(tiny_moe((0, 1)), STATIC, observer="hooks_itself_few_tokens") as calibration:
            calibration.run(hidden_batches())
            with pytest.raises(MissingDataError) as caught:
                calibration.freeze(on_few_tokens="pooled")
        assert "layers.0.experts.2.up_proj.weight" in str(caught.value)
        assert ".input" not in str(caught.value)

    def test_after_a_failed_freeze_nothing_has_changed(self) -> None:
        calibration = attach(tiny_moe((0, 1), ()), STATIC, observer="imatrix_mse")
        calibration.run(hidden_batches())
        before = states(calibration, "weight")
        with pytest.raises(MissingDataError):
            calibration.freeze()
        after = states(calibration, "weight")
        assert all(
            torch.equal(after[name][key], value)
            for name, state in before.items()
            for key, value in state.items()
        )

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                {"on_few_tokens": "ignore"},
                "on_few_tokens must be one of shrink, pooled, own, error",
            ),
            (
                {"enough_tokens": 0},
                "enough_tokens: expected a whole number of tokens from 1, got 0",
            ),
            ({"enough_tokens": True}, "enough_tokens: expected a whole number"),
        ],
    )
    def test_bad_words_are_told_before_any_work(self, options: Any, message: str) -> None:
        with pytest.raises(CalipersError, match=message):
            calibrate(tiny_moe((0,)), STATIC, "imatrix_mse", [object()], **options)


@pytest.mark.parametrize("name", ["qwen3_moe", "llama4"])
def test_padding_does_not_count_for_experts(name: str) -> None:
    model = spread_weights(getattr(architectures, name)())
    ids = example_inputs(model)["input_ids"]
    pads = torch.full_like(ids[:, :5], 1)

    def calibrated(batch: dict[str, torch.Tensor]) -> Any:
        calibration = attach(model, STATIC, observer="imatrix_mse")
        calibration.run([batch])
        found = states(calibration, "weight"), {e.name: e.tokens for e in calibration.observed}
        assert not any(each.unmasked for each in calibration.observed)
        calibration.detach()
        return found

    plain, tokens = calibrated({"input_ids": ids})
    mask = torch.cat([torch.ones_like(ids), torch.zeros_like(pads)], dim=1)
    padded, counted = calibrated(
        {"input_ids": torch.cat([ids, pads], dim=1), "attention_mask": mask}
    )
    assert counted == tokens
    assert any(".experts." in name for name in plain)
    for name, state in plain.items():
        for key, value in state.items():
            torch.testing.assert_close(padded[name][key], value, rtol=1e-4, atol=1e-6)


def test_no_data_no_coverage() -> None:
    assert calibrate(architectures.mixtral(), "W8A8", "memoryless_minmax").coverage == []
