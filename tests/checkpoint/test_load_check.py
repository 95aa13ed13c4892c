"""Whether a checkpoint would load back is tried on a small twin of the model, before any work."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
)
from loguru import logger
from safetensors.torch import load_file
from torch import nn

import architectures
import calipers
from architectures import GROUPED, example_inputs, output_of, tiny
from calipers.checkpoint import LoadCheck, check_load, find_load_problems
from calipers.checkpoint.twin import make_twin
from calipers.errors import CheckpointError, SchemeError

TOWERS = {"gemma3": "vision", "qwen2_vl": "visual"}


def llama(**fields: Any) -> Any:
    return tiny("LlamaForCausalLM", "LlamaConfig", **{**GROUPED, **fields})


def quantized(model: Any, scheme: Any = "W4A16", ignore: Any = ()) -> Any:
    calipers.calibrate(model, scheme, "memoryless_minmax", ignore=ignore)
    return model


def embedding_scheme() -> QuantizationConfig:
    args = QuantizationArgs(num_bits=8, strategy="channel")
    scheme = QuantizationScheme(targets=["Embedding"], weights=args)
    return QuantizationConfig(config_groups={"group_0": scheme})


@pytest.mark.usefixtures("without_help")
class TestRefusals:
    def test_layers_that_transformers_cannot_load_packed(self, tmp_path: Path) -> None:
        model = quantized(architectures.siglip())
        with pytest.raises(CheckpointError, match=r"(?s)would not load back.*self_attn\.k_proj"):
            calipers.save(model, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []

    def test_a_quantized_embedding(self, tmp_path: Path) -> None:
        model = quantized(llama(), embedding_scheme())
        with pytest.raises(CheckpointError, match=r"(?s)would not load back.*model\.embed_tokens"):
            calipers.save(model, tmp_path / "out")

    def test_what_was_at_the_target_stays(self, tmp_path: Path) -> None:
        calipers.save(quantized(llama()), tmp_path / "out")
        before = (tmp_path / "out" / "model.safetensors").read_bytes()
        with pytest.raises(CheckpointError, match="would not load back"):
            calipers.save(quantized(architectures.siglip()), tmp_path / "out", force=True)
        assert (tmp_path / "out" / "model.safetensors").read_bytes() == before

    def test_can_be_switched_off(self, tmp_path: Path) -> None:
        calipers.save(quantized(architectures.siglip()), tmp_path / "out", load_check=False)
        assert "encoder.layers.0.mlp.fc1.weight_packed" in load_file(
            tmp_path / "out" / "model.safetensors"
        )

    def test_the_ignore_list_of_the_refusal_is_the_way_out(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="leave them alone with") as refusal:
            check_load(architectures.gemma3(), "W4A16")
        printed = re.search(r"ignore=(\[.*?\"\])", str(refusal.value))
        assert printed is not None
        # The message shows strings as Python reads them.
        ignore = [each.strip('"') for each in printed[1].strip("[]").split(", ")]
        model = quantized(architectures.gemma3(), ignore=ignore)
        calipers.save(model, tmp_path / "out")
        loaded = type(model).from_pretrained(tmp_path / "out")
        assert torch.equal(output_of(loaded), output_of(model))

    def test_before_a_calibration_a_scheme_that_does_not_fit_is_its_own_error(self) -> None:
        with pytest.raises(SchemeError, match="cannot take this scheme"):
            check_load(llama(hidden_size=96, num_attention_heads=3, num_key_value_heads=3), "W4A16")

    @pytest.mark.parametrize("scheme", ["W4A16", "FP8_DYNAMIC", "NVFP4A16", "W8A8"])
    def test_what_loads_is_not_refused(self, scheme: str) -> None:
        check_load(llama(), scheme)


class TestHelp:
    @pytest.mark.parametrize(
        ("name", "ignore", "without"),
        [
            ("mixtral", "MixtralExperts", r"experts\.gate_up_proj"),  # dense, the rest is packed
            ("siglip", (), "AttributeError: 'Linear' object has no attribute 'weight'"),
        ],
    )
    def test_what_takes_the_loader_is_told(self, name: str, ignore: Any, without: str) -> None:
        warnings: list[str] = []
        sink = logger.add(lambda message: warnings.append(str(message)), level="WARNING")
        check_load(getattr(architectures, name)(), "W4A16", ignore=ignore)
        logger.remove(sink)
        told = rf"inside `with calipers\.loading_experts\(\):` alone; without it: .*{without}"
        assert any(re.search(told, each) for each in warnings)

    def test_the_other_rounding_of_a_loaded_model_is_no_difference(self) -> None:
        """A loaded Jamba subtracts a bias that the model in memory never adds."""
        model = architectures.jamba().bfloat16()
        scheme = QuantizationScheme(
            targets=["Linear"],
            weights=QuantizationArgs(type="float"),
            input_activations=QuantizationArgs(type="float"),
        )
        check_load(model, QuantizationConfig(config_groups={"group_0": scheme}))


class TestDtypes:
    @pytest.mark.parametrize("name", ["gemma3", "qwen2_vl"])
    @pytest.mark.parametrize("scheme", ["NVFP4A16", "MXFP4A16"])
    def test_of_multimodal_models_in_float32(self, name: str, scheme: str, tmp_path: Path) -> None:
        """These formats load in bfloat16 only: so must every part of the model."""
        model = quantized(getattr(architectures, name)(), scheme, f"re:.*{TOWERS[name]}.*")
        expected = output_of(model)
        calipers.save(model, tmp_path / "out")
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        parts = [config, config["text_config"], config["vision_config"]]
        assert [part["dtype"] for part in parts] == ["bfloat16"] * 3
        loaded = type(model).from_pretrained(tmp_path / "out")
        floats = {p.dtype for p in loaded.parameters() if p.dtype.itemsize > 1}
        assert torch.float16 not in floats
        spread = expected.max() - expected.min()
        assert (output_of(loaded) - expected).abs().max() < 0.05 * spread

    def test_of_text_models_their_float32_stays_on_disk(self, tmp_path: Path) -> None:
        calipers.save(quantized(llama(), "NVFP4A16"), tmp_path / "out")
        tensors = load_file(tmp_path / "out" / "model.safetensors")
        assert tensors["model.norm.weight"].dtype == torch.float32

    @pytest.mark.parametrize("name", ["gemma3", "qwen2_vl"])
    def test_the_size_said_is_the_size_written(self, name: str, tmp_path: Path) -> None:
        ignore = f"re:.*{TOWERS[name]}.*"
        model = quantized(getattr(architectures, name)(), "NVFP4A16", ignore)
        calipers.save(model, tmp_path / "out")
        tensors = load_file(tmp_path / "out" / "model.safetensors")
        written = sum(each.numel() * each.dtype.itemsize for each in tensors.values())
        assert calipers.checkpoint.compressed_size(model) == written


class TestTwins:
    def test_of_a_large_model_is_small_and_has_its_names(self) -> None:
        with torch.device("meta"):
            model = llama(
                hidden_size=4096,
                intermediate_size=14336,
                num_hidden_layers=32,
                num_attention_heads=32,
                num_key_value_heads=8,
                vocab_size=128256,
            )
        twin = make_twin(model)
        assert sum(p.numel() for p in twin.parameters()) < 3_000_000
        assert {n for n, _ in twin.named_modules()} < {n for n, _ in model.named_modules()}
        assert not any(p.is_meta for p in twin.parameters())
        assert twin(**example_inputs(twin)).logits.isfinite().all()

    def test_has_the_dtypes_of_its_parameters(self) -> None:
        """Jamba's class makes A_log in float32, whatever the dtype of the model."""
        model = architectures.jamba().bfloat16()
        twin = make_twin(model)
        assert {each.dtype for each in twin.parameters()} == {torch.bfloat16}

    @pytest.mark.usefixtures("without_help")
    def test_large_models_are_checked_by_them(self) -> None:
        with torch.device("meta"):
            sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 16}
            model = tiny("SiglipVisionModel", "SiglipVisionConfig", num_hidden_layers=20, **sizes)
        args = QuantizationArgs(num_bits=4, strategy="group", group_size=128)
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        names = [n for n, m in model.named_modules() if type(m) is nn.Linear and "layers" in n]
        check = find_load_problems(model, dict.fromkeys(names, scheme))
        assert set(check.problems) == set(names)
        assert check.unchecked is None

    def test_a_kind_of_layer_that_comes_late_is_in_it(self) -> None:
        model = architectures.jamba()  # attention and experts from the second layer on
        twin = make_twin(model)
        kinds = {re.sub(r"\d+", "*", name) for name, _ in model.named_modules()}
        assert {re.sub(r"\d+", "*", name) for name, _ in twin.named_modules()} == kinds

    def test_nothing_of_the_model_or_of_torch_is_changed(self) -> None:
        model = quantized(llama(), "W4A16")
        before = {name: value.clone() for name, value in model.state_dict().items()}
        config = model.config.to_dict()
        torch.manual_seed(3)
        expected = torch.rand(4)
        torch.manual_seed(3)
        torch.set_default_dtype(torch.float64)
        try:
            assert find_load_problems(model) == LoadCheck()
            assert torch.get_default_dtype() == torch.float64
        finally:
            torch.set_default_dtype(torch.float32)
        assert torch.equal(torch.rand(4), expected)
        assert model.config.to_dict() == config
        after = model.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], value) for name, value in before.items())


class TestUnchecked:
    def test_a_class_of_the_users_own_is_saved_with_a_line_in_the_log(self, tmp_path: Path) -> None:
        kind = type("OwnModel", (type(llama()),), {"__module__": "own"})
        model = quantized(kind(llama().config))
        lines: list[str] = []
        sink = logger.add(lines.append, level="INFO", format="{message}")
        try:
            calipers.save(model, tmp_path / "out")
        finally:
            logger.remove(sink)
        assert any("could not be checked: OwnModel" in line for line in lines)

    def test_where_the_twin_cannot_be_written(self, monkeypatch: Any) -> None:
        def full(*args: Any, **kwargs: Any) -> None:
            raise OSError("no space left on device")

        monkeypatch.setattr("calipers.checkpoint.load_check.write_checkpoint", full)
        model = quantized(llama(vocab_size=101), "W4A16")
        check = find_load_problems(model)
        assert check.unchecked is not None
        assert "no space left" in check.unchecked
        monkeypatch.undo()
        assert find_load_problems(model) == LoadCheck()

    def test_a_loader_that_gives_other_values_is_found(self, monkeypatch: Any) -> None:
        model = llama(vocab_size=97)  # of no other test, whose result is remembered
        original = type(model).from_pretrained.__func__

        def forgetful(cls: Any, *args: Any, **kwargs: Any) -> Any:
            loaded = original(cls, *args, **kwargs)
            with torch.no_grad():
                loaded.model.norm.weight.mul_(2)
            return loaded

        monkeypatch.setattr(type(model), "from_pretrained", classmethod(forgetful))
        with pytest.raises(
            CheckpointError, match=r"other values of 1 tensors.*model\.norm\.weight"
        ):
            check_load(model, "W4A16")

    def test_a_loader_whose_model_computes_something_else_is_found(self, monkeypatch: Any) -> None:
        model = llama(vocab_size=99)
        original = type(model).from_pretrained.__func__

        def twisted(cls: Any, *args: Any, **kwargs: Any) -> Any:
            loaded = original(cls, *args, **kwargs)
            loaded.lm_head.register_forward_hook(lambda m, a, out: out.flip(-1))
            return loaded

        monkeypatch.setattr(type(model), "from_pretrained", classmethod(twisted))
        with pytest.raises(CheckpointError, match="loads with other outputs, by"):
            check_load(model, "W4A16")
