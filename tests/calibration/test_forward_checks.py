"""Modules whose forward or weight a quantized forward would pass over: refused before the data."""

from __future__ import annotations

import types
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from calibration.tiny_models import picture, tiny_llama, token_batches
from calipers.calibration import attach, calibrate
from calipers.errors import SchemeError

CPU = torch.device("cpu")


def q_proj(model: nn.Module) -> nn.Module:
    return model.model.layers[0].self_attn.q_proj


def refusal(model: nn.Module, scheme: str = "FP8") -> str:
    """The error of a calibration whose data must not be asked for."""

    def data():
        raise AssertionError("the data was run")
        yield

    before = picture(model)
    with pytest.raises(SchemeError) as caught:
        calibrate(model, scheme, data=data())
    assert picture(model) == before
    with pytest.raises(SchemeError):
        attach(model, scheme)
    return str(caught.value)


@pytest.fixture
def accelerate():
    return pytest.importorskip("accelerate")


@pytest.fixture(params=["cpu_offload", "disk_offload", "device_map", "dispatch"])
def hooked(request, accelerate, tmp_path):
    """A model with hooks of accelerate, made in each way that there is."""
    model = tiny_llama()
    match request.param:
        case "cpu_offload":
            return accelerate.cpu_offload(model, execution_device=CPU)
        case "disk_offload":
            return accelerate.disk_offload(model, str(tmp_path), execution_device=CPU)
        case "dispatch":
            return accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
        case "device_map":
            model.save_pretrained(tmp_path / "model")
            parts = dict.fromkeys(("model.embed_tokens", "model.norm", "lm_head"), "cpu")
            return type(model).from_pretrained(
                tmp_path / "model",
                device_map={**parts, "model.rotary_emb": "cpu", "model.layers": "disk"},
                offload_folder=str(tmp_path / "offload"),
            )


def test_hooks_of_accelerate_are_refused_and_the_way_out_works(hooked, request):
    from accelerate.hooks import remove_hook_from_module
    from compressed_tensors.offload import disable_offloading, from_accelerate

    with pytest.raises(SchemeError, match=r"offload\.from_accelerate\(model\)") as caught:
        calibrate(hooked, "W4A16", "imatrix_mse", data=iter(()))
    if "cpu_offload" in request.node.name:
        assert "remove_hook_from_module(model, recurse=True)" in str(caught.value)
        remove_hook_from_module(hooked, recurse=True)
    else:
        from_accelerate(hooked)
    plain = tiny_llama()
    for model in (hooked.eval(), plain):
        calibrate(model, "W4A16", "imatrix_mse", data=token_batches())
    # see test_offload: fake-quantize asks for an offloaded weight twice
    with torch.no_grad(), disable_offloading():
        found, expected = (m(**token_batches(1)[0]).logits for m in (hooked, plain))
    assert torch.equal(found, expected)


class TestShapeOfHooks:
    """The attributes that accelerate sets, also where it is not installed."""

    def test_offloading_is_told_once_for_all_modules(self):
        model = tiny_llama()
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module._hf_hook = SimpleNamespace(offload=True)
        message = refusal(model)
        assert message.count("accelerate keeps the weights") == 1
        assert "model.layers.0.self_attn.q_proj" in message
        assert "and 3 more modules" in message

    def test_a_module_that_is_not_quantized_counts(self):
        model = tiny_llama()
        model.model.embed_tokens._hf_hook = SimpleNamespace(hooks=[SimpleNamespace(offload=True)])
        assert "model.embed_tokens" in refusal(model)

    def test_a_hook_that_offloads_nothing_counts_on_targets_alone(self):
        model = tiny_llama()
        model.model._hf_hook = SimpleNamespace(offload=False)
        calibrate(model, "W4A16", "memoryless_minmax")
        model = tiny_llama()
        q_proj(model)._hf_hook = SimpleNamespace(offload=False)
        assert "q_proj: has a hook of accelerate around its forward" in refusal(model)


class TestForward:
    @pytest.mark.parametrize("kind", ["function", "method"])
    def test_replaced_on_the_instance(self, kind):
        model = tiny_llama()
        layer = q_proj(model)

        def twice(self, x):
            return 2 * nn.functional.linear(x, self.weight)

        if kind == "method":
            layer.forward = types.MethodType(twice, layer)
        else:
            layer.forward = lambda x: twice(layer, x)
        message = refusal(model)
        assert "q_proj: its forward was replaced on the instance" in message
        calibrate(model, "W4A16", "memoryless_minmax", ignore="re:.*q_proj$")

    def test_of_the_class_itself_is_none(self):
        model = tiny_llama()
        layer = q_proj(model)
        layer.forward = layer.forward  # what some libraries leave when they restore it
        calibrate(model, "W4A16", "memoryless_minmax")

    def test_replaced_before_offloading(self):
        from compressed_tensors.offload import offload_module

        model = tiny_llama()
        layer = q_proj(model)
        layer.forward = types.MethodType(lambda self, x: 2 * self.weight @ x, layer)
        offload_module(layer, CPU, CPU)
        with pytest.raises(SchemeError, match="q_proj: its forward was replaced"):
            attach(model, "W4A16")


class TestWeight:
    """Weights made of other parameters; the way out that the message names makes them plain."""

    def check(self, model: nn.Module, name: str, way_out) -> None:
        message = refusal(model)
        assert "q_proj: its weight is not a parameter" in message
        assert name in message
        way_out(q_proj(model))
        assert calibrate(model, "W4A16", "memoryless_minmax").quantized_share == 1

    @pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.orthogonal])
    def test_parametrizations(self, norm):
        model = tiny_llama()
        norm(q_proj(model))
        self.check(
            model,
            "parametrize.remove_parametrizations(module, 'weight')",
            lambda m: parametrize.remove_parametrizations(m, "weight"),
        )

    def test_weight_norm_of_old(self):
        model = tiny_llama()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            nn.utils.weight_norm(q_proj(model))
        self.check(model, "remove_weight_norm(module)", nn.utils.remove_weight_norm)

    def test_spectral_norm_of_old(self):
        model = tiny_llama()
        nn.utils.spectral_norm(q_proj(model))
        self.check(model, "remove_spectral_norm(module)", nn.utils.remove_spectral_norm)

    def test_pruning(self):
        model = tiny_llama()
        prune.random_unstructured(q_proj(model), "weight", amount=0.3)
        self.check(
            model, "prune.remove(module, 'weight')", lambda module: prune.remove(module, "weight")
        )

    def test_a_plain_tensor(self):
        model = tiny_llama()
        weight = q_proj(model).weight.detach()
        del q_proj(model).weight
        q_proj(model).weight = weight

        def register(module: nn.Module) -> None:
            del module.weight
            module.weight = nn.Parameter(weight)

        self.check(model, "torch.nn.Parameter", register)
