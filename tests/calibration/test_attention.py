"""Keys, values and queries of attention: what is observed, what is refused, what is put back."""

from __future__ import annotations

import copy
import gc
import pickle
from typing import Any

import pytest
import torch
from compressed_tensors.modeling import QuantizedAttentionImpl
from compressed_tensors.offload import offload_module
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
)
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import architectures
from attention_models import batches, continued, logits, make
from calipers import calibrate
from calipers.calibration import attach, check_scheme, resolve_config
from calipers.calibration.attention import find_attention, sees_cache
from calipers.errors import CalipersError, MissingDataError, SchemeError

FP8 = QuantizationArgs(num_bits=8, type="float")


def states_config(strategy: str = "tensor", **more: Any) -> QuantizationConfig:
    """A scheme that targets attention, with its queries."""
    args = QuantizationArgs(num_bits=8, type="float", strategy=strategy)
    group = QuantizationScheme(targets=["re:.*self_attn$"], input_activations=args)
    return QuantizationConfig(config_groups={"attention": group}, **more)


def picture(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that hooking and quantizing attention could change."""
    found: dict[str, Any] = {
        name: (
            type(module),
            sorted(vars(module)),
            list(module._forward_pre_hooks),
            list(module._forward_hooks),
            list(module._parameters),
        )
        for name, module in model.named_modules()
    }
    config: Any = model.config
    found["config"] = {k: v for k, v in vars(config).items() if k.startswith("_attn")}
    return found


class States:
    """Keys, values and queries as the model computes them, caught by another way than hooks."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.seen: dict[str, list[torch.Tensor]] = {"q": [], "k": [], "v": []}

    def run(self, given: list[dict[str, torch.Tensor]]) -> States:
        """Batches through the attention function, without repeating heads and with no past."""

        def watch(module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
            if module.layer_idx == 0:
                for name, each in (("q", query), ("k", key), ("v", value)):
                    self.seen[name].append(each)
            return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, *args, **kwargs)

        before = self.model.config._attn_implementation
        ALL_ATTENTION_FUNCTIONS.register("watched", watch)
        try:
            self.model.config._attn_implementation = "watched"
            with torch.no_grad():
                for batch in given:
                    self.model(**batch)
        finally:
            self.model.config._attn_implementation = before
            del ALL_ATTENTION_FUNCTIONS._global_mapping["watched"]
        return self


@pytest.mark.parametrize("strategy", ["tensor", "attn_head"])
def test_scales_are_those_of_the_states(strategy: str) -> None:
    model = make("llama")
    seen = States(model).run(batches()).seen
    calibrate(model, states_config(strategy), data=batches())
    attention = model.model.layers[0].self_attn
    for name, values in seen.items():
        largest = torch.cat(values).abs()
        if strategy == "attn_head":
            largest = largest.amax(dim=(0, 2, 3))[:, None, None]
        else:
            largest = largest.max().reshape(1)
        expected = largest / torch.tensor(448.0, dtype=torch.bfloat16)
        assert torch.equal(getattr(attention, f"{name}_scale"), expected)
        assert not hasattr(attention, f"{name}_zero_point")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kv_cache", ["FP8", "INT8_HEAD"])
def test_padding_has_no_part_in_the_scales(side: str, kv_cache: str) -> None:
    """One sequence alone, and the same one beside a longer one that pads it."""
    generator = torch.Generator().manual_seed(5)
    long, short = (torch.randint(3, 100, (1, n), generator=generator) for n in (12, 7))
    pads = torch.full((1, 5), 2)
    padded = torch.cat([pads, short] if side == "left" else [short, pads], dim=1)
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[1, : 5 if side == "left" else None] = 0 if side == "left" else 1
    if side == "right":
        mask[1, 7:] = 0
    positions = mask.cumsum(-1).sub(1).clamp(min=0)
    batch = {
        "input_ids": torch.cat([long, padded]),
        "attention_mask": mask,
        "position_ids": positions,
    }
    scales = []
    for data in ([batch], [{"input_ids": long}, {"input_ids": short}]):
        model = make("llama", dtype=torch.float32)
        # pads are far larger than any token
        with torch.no_grad():
            model.model.embed_tokens.weight[2] *= 50
            model.model.norm.weight.fill_(1)
        report = calibrate(model, None, data=data, kv_cache=kv_cache)
        attention = model.model.layers[0].self_attn
        scales.append((attention.k_scale, attention.v_scale))
        row = report["model.layers.0.self_attn"]
        assert row.tokens == 19
        assert row.states == ("k", "v")
        assert report.unmasked == []
    for padded_scale, plain in zip(*scales, strict=True):
        torch.testing.assert_close(padded_scale, plain, rtol=1e-5, atol=0)


def test_padding_counts_where_it_is_asked_for() -> None:
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[0, 5:] = 0
    data = [{**batches(1)[0], "attention_mask": mask}]
    counted = calibrate(make("llama"), None, data=data, kv_cache="FP8")
    all_of_them = calibrate(
        make("llama"), None, data=data, kv_cache="FP8", use_attention_mask=False
    )
    assert [report["model.layers.0.self_attn"].tokens for report in (counted, all_of_them)] == [
        17,
        24,
    ]


@pytest.mark.parametrize("observer", ["static_minmax", "minmax", "histogram", "mse"])
@pytest.mark.parametrize("kv_cache", ["FP8_HEAD", "INT8"])
def test_observers_of_activations_see_states(observer: str, kv_cache: str) -> None:
    model = make("llama")
    report = calibrate(
        model, None, None, batches(), kv_cache=kv_cache, activation_observer=observer
    )
    assert [(row.activation_observer, row.activations, row.weight_bits) for row in report] == [
        (observer, "static", None)
    ] * 2
    args = model.model.layers[0].self_attn.quantization_scheme.input_activations
    assert args.observer == observer
    assert logits(model).isfinite().all()


def test_a_state_has_the_observer_that_the_scheme_names() -> None:
    args = QuantizationArgs(num_bits=8, type="float", observer="minmax")
    model = make("llama")
    with attach(model, None, kv_cache=args) as calibration:
        (kind,) = {type(o).__name__ for m in calibration.observed for o in m.observers.values()}
        assert kind == "MinMaxObserver"
        assert type(model.model.layers[1].self_attn.k_observer).__name__ == kind
    assert not hasattr(model.model.layers[1].self_attn, "k_observer")


@pytest.mark.parametrize("config", [states_config(), None])
def test_a_detached_model_is_as_before(config: QuantizationConfig | None) -> None:
    model = make("llama")
    before, plain = picture(model), logits(model)
    calibration = attach(model, config, kv_cache=None if config else "FP8")
    assert picture(model) != before
    assert torch.equal(logits(model), plain)
    calibration.run(batches())
    calibration.detach()
    assert picture(model) == before
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("config", [states_config(), None])
def test_a_failed_calibration_leaves_the_model_as_before(config: QuantizationConfig | None) -> None:
    model = make("gemma3")
    before, plain = picture(model), logits(model)
    data = [*batches(), {"nonsense": torch.zeros(1)}]
    with pytest.raises(ValueError, match="exactly one of input_ids"):
        calibrate(model, config, data=data, kv_cache=None if config else "FP8_HEAD")
    assert picture(model) == before
    assert torch.equal(logits(model), plain)


def test_half_of_a_freeze_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("llama")
    with attach(model, None, kv_cache=QuantizationArgs(num_bits=8, symmetric=False)) as calibration:
        calibration.run(batches())
        attached = picture(model)
        last = calibration.observed[-1].tensors["v"].observer
        with monkeypatch.context() as patch:
            patch.setattr(type(last), "get_qparams", lambda self: (None, None))
            with pytest.raises(CalipersError, match="gave no scale"):
                calibration.freeze()
        assert picture(model) == attached
        report = calibration.freeze()
    assert len(report.modules) == 2
    assert hasattr(model.model.layers[0].self_attn, "k_zero_point")


@pytest.mark.parametrize("config", [states_config("attn_head"), None])
def test_a_frozen_model_generates(config: QuantizationConfig | None) -> None:
    model = make("mistral")
    calibrate(model, config, data=batches(), kv_cache=None if config else "FP8")
    assert continued(model).shape == (1, 9)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        first = model(ids[:, :2], use_cache=True)
        second = model(ids[:, 2:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(second.logits, whole[:, 2:], rtol=0.05, atol=0.05)


def test_ignoring_the_layers_of_attention_leaves_the_cache() -> None:
    """Loaders give a kv_cache_scheme to all attention, whatever is ignored."""
    model = make("llama")
    report = calibrate(model, "FP8_DYNAMIC", None, batches(), ["re:.*self_attn.*"], kv_cache="FP8")
    assert report["model.layers.0.self_attn"].states == ("k", "v")
    assert "model.layers.0.self_attn.q_proj" not in report


def test_ignored_attention_has_no_scheme_of_a_group() -> None:
    lines = _problems(make("llama"), states_config(), ignore="model.layers.1.self_attn")
    assert any("model.layers.1.self_attn" in line for line in lines)


def test_a_group_wins_over_the_cache() -> None:
    config = states_config("attn_head", kv_cache_scheme=QuantizationArgs(num_bits=8))
    targets = check_scheme(make("llama"), resolve_config(config))
    assert [each.base_names for each in targets] == [("q", "k", "v")] * 2
    assert {each.args["k"].strategy for each in targets} == {"attn_head"}


def test_data_is_needed() -> None:
    with pytest.raises(MissingDataError, match="k states of attention are quantized statically"):
        calibrate(make("llama"), "FP8_DYNAMIC", kv_cache="FP8")


class _OneLayerSkipped(nn.Module):
    """Stands for a decoder layer that no batch reaches."""

    def forward(self, hidden: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return hidden


def _with_an_attention_that_no_batch_reaches() -> Any:
    model = make("llama")
    unused = model.model.layers[1]
    model.model.layers[1] = _OneLayerSkipped()
    model.model.layers[1].inner = unused
    return model


def test_a_state_that_no_batch_shows_is_an_error_that_names_it() -> None:
    model = _with_an_attention_that_no_batch_reaches()
    before = picture(model)
    name = r"model\.layers\.1\.inner\.self_attn\.k: its observer saw no value"
    for kv_cache, config in (("FP8", None), (None, states_config())):
        with pytest.raises(MissingDataError, match=name) as caught:
            calibrate(model, config, data=batches(), kv_cache=kv_cache)
        assert "in all attention or in none), or freeze with\n  on_missing='fallback'" in str(
            caught.value
        )
    with pytest.raises(MissingDataError, match=rf"(?s){name}.*cannot leave them unquantized"):
        calibrate(model, None, data=batches(), kv_cache="FP8", on_missing="skip")
    assert picture(model) == before


def test_a_neighbour_stands_in_where_that_is_asked_for() -> None:
    model = make("llama")
    with attach(model, None, kv_cache="FP8") as calibration:
        calibration.run(batches())
        for tensor in calibration.observed[1].tensors.values():
            tensor.observer.reset()
        report = calibration.freeze("fallback")
    assert report["model.layers.1.self_attn"].fallback == ("k", "v")
    first, second = (layer.self_attn for layer in model.model.layers)
    assert torch.equal(first.k_scale, second.k_scale)


def test_attention_that_never_sees_a_cache_is_left_alone_by_name() -> None:
    class VisionAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.k_proj = nn.Linear(8, 8)

        def forward(self, hidden: torch.Tensor, past_key_values: Any = None) -> torch.Tensor:
            return self.k_proj(hidden)

    model = make("llama")
    model.model.layers[0].vision = VisionAttention()
    assert [sees_cache(each) for each in find_attention(model).values()] == [True, False, True]
    report = calibrate(model, None, data=batches(), kv_cache="FP8")
    assert [each.name for each in report.left_alone if each.reason == "no cache"] == [
        "model.layers.0.vision"
    ]
    assert "model.layers.0.vision: no cache" in str(report) or "(see left_alone)" in str(report)
    assert not hasattr(model.model.layers[0].vision, "k_scale")
    assert len(report.modules) == 2


def test_the_vision_tower_of_llama_4_sees_no_cache() -> None:
    text = {**architectures.GROUPED, "num_local_experts": 2, "head_dim": 32, "pad_token_id": 0}
    vision = {
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "vision_output_dim": 64,
        "projector_input_dim": 64,
        "projector_output_dim": 64,
    }
    model = architectures.tiny(
        "Llama4ForConditionalGeneration",
        "Llama4Config",
        text_config={**text, "intermediate_size_mlp": 256},
        vision_config={**vision, "intermediate_size": 256, "patch_size": 14},
        image_token_index=100,
        boi_token_index=101,
        eoi_token_index=102,
    )
    assert {name: sees_cache(module) for name, module in find_attention(model).items()} == {
        "vision_model.model.layers.0.self_attn": False,
        "language_model.model.layers.0.self_attn": True,
        "language_model.model.layers.1.self_attn": True,
    }


def _problems(model: Any, scheme: Any, kv_cache: Any = None, ignore: Any = ()) -> list[str]:
    before = picture(model) if hasattr(model, "config") else None
    with pytest.raises(SchemeError) as caught:
        attach(model, scheme, kv_cache=kv_cache, ignore=ignore)
    if before is not None:
        assert picture(model) == before
    first, *lines = str(caught.value).split("\n  ")
    assert first == "the model cannot take this scheme:"
    return lines


def test_what_upstream_cannot_do_is_told_before_any_work() -> None:
    (line,) = _problems(architectures.whisper(), None, "FP8")
    assert "an EncoderDecoderCache" in line
    assert "WhisperForConditionalGeneration would not run" in line
    (line,) = _problems(architectures.bert(), None, "FP8")
    assert "finds no attention in BertForMaskedLM" in line
    (line,) = _problems(make("latent"), None, "FP8_HEAD")
    assert line.startswith("model.layers.*.self_attn (2): its cache holds one latent for all heads")
    (line,) = _problems(nn.Sequential(nn.Linear(4, 4)), None, "FP8")
    assert "hooks the attention of transformers models, got Sequential" in line
    (line,) = _problems(make("gpt_oss"), states_config())
    assert "the model's attention function is 'eager'" in line
    lines = _problems(architectures.gemma3(), states_config())
    assert "target these as well, or quantize the cache alone" in lines[-1]
    assert "model.vision_tower.encoder.layers.0.self_attn" in lines[-1]


def test_arguments_that_states_cannot_take() -> None:
    token = QuantizationArgs(num_bits=8, strategy="token", dynamic=True)
    (line,) = _problems(make("llama"), None, token)
    assert line == (
        "model.layers.*.self_attn (2): states of attention take the strategies 'tensor', "
        "'attn_head', got 'token'"
    )
    dynamic = QuantizationArgs(num_bits=8, strategy="tensor", dynamic=True)
    (line,) = _problems(make("llama"), None, dynamic)
    assert "quantized statically, got dynamic=True" in line


def test_attention_is_quantized_once() -> None:
    model = make("llama")
    calibrate(model, None, data=batches(), kv_cache="FP8")
    with pytest.raises(SchemeError, match="is already quantized"):
        calibrate(model, None, data=batches(), kv_cache="FP8")
    report = calibrate(model, "FP8_DYNAMIC")
    assert len(report.modules) == 14


def test_another_number_of_heads_than_the_config_has_is_told() -> None:
    model = make("llama")
    model.model.layers[1].self_attn.k_proj = nn.Linear(128, 32, dtype=torch.bfloat16)
    (line,) = _problems(model, None, "FP8_HEAD")
    assert line == (
        "model.layers.1.self_attn: has 1 heads of keys, and compressed-tensors makes 2 scales, as "
        "many as the config names: use strategy 'tensor'"
    )


def test_a_cache_alone_is_no_small_share(capfd: pytest.CaptureFixture[str]) -> None:
    report = calibrate(make("llama"), None, data=batches(), kv_cache="FP8")
    assert report.quantized_share == 0.0
    assert "projection weights are quantized" not in capfd.readouterr().err
    assert "model.layers.*.self_attn (k, v)" in str(report)


def test_what_is_taken_away_leaves_other_models_their_attention_function(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """compressed-tensors remembers one function for all hooked models of a process."""
    monkeypatch.setattr(QuantizedAttentionImpl, "_original_impl", "flash_attention_2")
    attach(make("llama"), states_config()).detach()
    assert QuantizedAttentionImpl._original_impl == "flash_attention_2"


def test_copies_are_quantized_by_their_own_scales() -> None:
    model = make("llama")
    calibrate(model, None, data=batches(), kv_cache="FP8")
    expected = logits(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for layer in model.model.layers:
            layer.self_attn.k_scale.data *= 64
        assert not torch.equal(logits(model), expected)
        assert torch.equal(logits(copied), expected)
        for layer in model.model.layers:
            layer.self_attn.k_scale.data /= 64
    del model, layer
    gc.collect()
    assert torch.equal(logits(copied), expected)


def test_a_copy_of_an_observed_model_feeds_its_own_observers() -> None:
    model = make("llama")
    with attach(model, None, kv_cache="FP8") as calibration:
        copied = copy.deepcopy(model)
        logits(copied)
        assert copied.model.layers[0].self_attn.k_observer.has_statistics
        observers = [each for module in calibration.observed for each in module.observers.values()]
        assert len(observers) == 4
        assert not any(each.has_statistics for each in observers)


def test_offloaded_models_get_the_same_scales() -> None:
    plain, offloaded = make("llama"), make("llama")
    for module in list(offloaded.modules()):
        offload_module(module, torch.device("cpu"), torch.device("cpu"))
    for model in (plain, offloaded):
        calibrate(model, "FP8_DYNAMIC", data=batches(), kv_cache="FP8")
    assert torch.equal(logits(plain), logits(offloaded))
    for state in ("k_scale", "v_scale"):
        one, other = (getattr(m.model.layers[0].self_attn, state) for m in (plain, offloaded))
        assert torch.equal(one, other)
