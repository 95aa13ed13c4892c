"""Saving: every preset comes back from disk, atomically, and the model in memory stays as it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from compressed_tensors.offload import offload_module, update_offload_parameter
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationStatus,
    QuantizationStrategy,
    apply_quantization_config,
)
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES as PRESETS
from compressed_tensors.quantization.utils import (
    calculate_qparams,
    generate_gparam,
    maybe_pad_tensor_for_block_quant,
)
from loguru import logger
from safetensors import safe_open
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, LlamaConfig

from calipers.checkpoint import compressed_size, save
from calipers.errors import CheckpointError

# FP4 and MX weights come back from compressed-tensors in bfloat16 only: docs/presets.md
BFLOAT16_ONLY = {"NVFP4", "NVFP4A16", "MXFP4", "MXFP4A16", "MXFP4XFP8", "MXFP8", "MXFP8A16"}
BFLOAT16_ONLY |= {"MXFP6A16", "MXFP6A8"}
# of these, the ones whose dequantized weights bfloat16 holds exactly (power-of-two scales)
EXACT_IN_BFLOAT16 = {"MXFP4", "MXFP4A16", "MXFP8", "MXFP8A16"}
IDS = torch.randint(0, 1024, (2, 16), generator=torch.Generator().manual_seed(1))
TOLERANCE = 1e-3  # of the logits' range


def tiny_llama(dtype: torch.dtype = torch.float32, layers: int = 2) -> torch.nn.Module:
    # made by from_config, as from_pretrained makes it: rotary frequencies stay float32 in bfloat16
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=1024,
        tie_word_embeddings=True,
        initializer_range=0.05,
    )
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def in_groups(weight: torch.Tensor, args: QuantizationArgs) -> torch.Tensor:
    """The weight with all values of one scale in the last dimension."""
    match QuantizationStrategy(args.strategy):
        case QuantizationStrategy.TENSOR:
            return weight.reshape(1, -1)
        case QuantizationStrategy.CHANNEL:
            return weight.unsqueeze(1)
        case QuantizationStrategy.BLOCK:
            height, width = args.block_structure
            padded = maybe_pad_tensor_for_block_quant(weight, (height, width))
            rows, columns = padded.shape[0] // height, padded.shape[1] // width
            blocks = padded.reshape(rows, height, columns, width).transpose(1, 2)
            return blocks.flatten(2)
        case _:
            return weight.unflatten(-1, (-1, args.group_size))


def quantize_min_max(
    model: torch.nn.Module, preset: str, ignore: tuple[str, ...] = ("lm_head",)
) -> torch.nn.Module:
    """Scales of the plain minimum and maximum for every Linear, by compressed-tensors alone."""
    config = QuantizationConfig(config_groups={preset: ["Linear"]}, ignore=list(ignore))
    apply_quantization_config(model, config, show_progress=False)
    linears = [each.weight for each in model.modules() if isinstance(each, torch.nn.Linear)]
    largest = torch.stack([weight.abs().max().float() for weight in linears]).max()
    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None:
            continue
        module.quantization_status = QuantizationStatus.FROZEN
        if scheme.weights is None:
            continue
        weight, global_scale = module.weight.data, None
        if hasattr(module, "weight_global_scale"):
            global_scale = generate_gparam(-largest, largest)  # one for layers that are fused
            update_offload_parameter(module, "weight_global_scale", global_scale)
        groups = in_groups(weight, scheme.weights)
        low, high = groups.amin(-1), groups.amax(-1)
        scale, zero_point = calculate_qparams(low, high, scheme.weights, global_scale=global_scale)
        shape = module.weight_scale.shape
        update_offload_parameter(module, "weight_scale", scale.reshape(shape))
        update_offload_parameter(module, "weight_zero_point", zero_point.reshape(shape))
        if hasattr(module, "input_scale"):
            update_offload_parameter(module, "input_scale", torch.tensor([0.01]))
        if hasattr(module, "input_global_scale"):
            update_offload_parameter(module, "input_global_scale", torch.tensor([448 * 6 / 4.0]))
    return model


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(IDS).logits.float()


def assert_same_logits(loaded: torch.nn.Module, expected: torch.Tensor) -> None:
    spread = expected.max() - expected.min()
    difference = (logits(loaded) - expected).abs().max()
    assert torch.isfinite(difference)
    assert difference <= TOLERANCE * spread


def stored(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path / "model.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def all_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.fixture
def warnings_logged():
    messages: list[str] = []
    sink = logger.add(lambda message: messages.append(str(message)), level="WARNING")
    yield messages
    logger.remove(sink)


# transformers warns whenever dequantize is passed, although this is the way to pass it
passes_dequantize = pytest.mark.filterwarnings(
    "ignore:You passed `quantization_config`:UserWarning"
)


class TestPresets:
    @pytest.mark.parametrize(
        "dtype",
        [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16],
        ids=["float32", "bfloat16"],
    )
    @pytest.mark.parametrize("preset", sorted(PRESETS))
    def test_comes_back_with_the_same_logits(self, preset, dtype, tmp_path, warnings_logged):
        model = quantize_min_max(tiny_llama(dtype), preset)
        expected = logits(model)
        save(model, tmp_path / "saved")
        if preset in BFLOAT16_ONLY and dtype != torch.bfloat16:
            assert any("dtype bfloat16" in message for message in warnings_logged)
            loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
            assert loaded.dtype == torch.bfloat16
            assert torch.isfinite(logits(loaded)).all()
            return
        assert not warnings_logged
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        assert loaded.dtype == dtype
        assert_same_logits(loaded, expected)

    @passes_dequantize
    @pytest.mark.parametrize("preset", sorted(EXACT_IN_BFLOAT16))
    def test_mx_of_a_float32_model_dequantizes_exactly(self, preset, tmp_path):
        """What docs/presets.md tells users of a float32 model to do."""
        model = quantize_min_max(tiny_llama(), preset)
        expected = logits(model)
        save(model, tmp_path / "saved")
        loaded = AutoModelForCausalLM.from_pretrained(
            tmp_path / "saved",
            dtype=torch.float32,
            quantization_config=CompressedTensorsConfig(dequantize=True),
        )
        assert_same_logits(loaded.float(), expected)

    def test_every_preset_is_documented(self):
        page = Path(__file__).parents[2] / "docs" / "presets.md"
        text = page.read_text(encoding="utf-8")
        assert [name for name in PRESETS if f"`{name}`" not in text] == []

    def test_config_says_compressed(self, tmp_path):
        save(quantize_min_max(tiny_llama(), "W4A16"), tmp_path / "saved")
        config = json.loads((tmp_path / "saved" / "config.json").read_text())
        quantization = config["quantization_config"]
        assert quantization["quantization_status"] == "compressed"
        assert quantization["format"] == "pack-quantized"
        assert quantization["ignore"] == ["lm_head"]
        assert config["tie_word_embeddings"] is True

    def test_symmetric_zero_points_are_left_out(self, tmp_path):
        save(quantize_min_max(tiny_llama(), "W4A16"), tmp_path / "saved")
        assert not [key for key in stored(tmp_path / "saved") if key.endswith("zero_point")]


class TestModelInMemory:
    @pytest.mark.parametrize("preset", ["W4A16_ASYM", "FP8", "NVFP4"])
    def test_is_unchanged(self, preset, tmp_path):
        model = quantize_min_max(tiny_llama(torch.bfloat16), preset)
        before, expected = all_tensors(model), logits(model)
        config = model.config.to_dict()
        schemes = {n: m.quantization_scheme.model_dump() for n, m in self.quantized(model)}
        save(model, tmp_path / "saved")
        after = all_tensors(model)
        assert after.keys() == before.keys()
        for key, value in before.items():
            assert after[key].dtype == value.dtype
            assert torch.equal(after[key].float(), value.float()), key
        assert torch.equal(logits(model), expected)
        assert model.config.to_dict() == config
        assert {n: m.quantization_scheme.model_dump() for n, m in self.quantized(model)} == schemes
        assert {m.quantization_status for _, m in self.quantized(model)} == {
            QuantizationStatus.FROZEN
        }

    def test_saves_twice_alike(self, tmp_path):
        model = quantize_min_max(tiny_llama(), "W4A16")
        save(model, tmp_path / "one")
        save(model, tmp_path / "two")
        for file in sorted(p.name for p in (tmp_path / "one").iterdir()):
            assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()

    def test_is_quiet(self, tmp_path, capfd):
        model = quantize_min_max(tiny_llama(), "W4A16")
        capfd.readouterr()
        save(model, tmp_path / "saved")
        assert capfd.readouterr() == ("", "")

    @staticmethod
    def quantized(model):
        return [(n, m) for n, m in model.named_modules() if hasattr(m, "quantization_scheme")]


@pytest.fixture(scope="module")
def model():
    return quantize_min_max(tiny_llama(), "W4A16")


class TestTarget:
    def test_returns_the_path_and_makes_parents(self, model, tmp_path):
        path = tmp_path / "a" / "b"
        assert save(model, path) == path
        assert save(model, str(path), force=True) == path
        assert sorted(p.name for p in tmp_path.joinpath("a").iterdir()) == ["b"]

    def test_empty_folder_is_filled(self, model, tmp_path):
        (tmp_path / "saved").mkdir()
        save(model, tmp_path / "saved")
        assert (tmp_path / "saved" / "model.safetensors").exists()

    def test_refuses_a_taken_folder(self, model, tmp_path):
        (tmp_path / "mine.txt").write_text("mine")
        with pytest.raises(CheckpointError, match=r"exists and is not empty.*force=True"):
            save(model, tmp_path)
        assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]

    def test_refuses_a_file_even_by_force(self, model, tmp_path):
        file = tmp_path / "file"
        file.write_text("mine")
        with pytest.raises(CheckpointError, match="is a file; save writes a folder"):
            save(model, file, force=True)
        assert file.read_text() == "mine"

    def test_force_replaces_all_of_it(self, model, tmp_path):
        target = tmp_path / "saved"
        target.mkdir()
        (target / "old.txt").write_text("old")
        save(model, target, force=True)
        assert not (target / "old.txt").exists()
        assert (target / "config.json").exists()
        assert [p.name for p in tmp_path.iterdir()] == ["saved"]

    def test_force_spares_the_working_directory(self, model, tmp_path, monkeypatch):
        inside = tmp_path / "inside"
        inside.mkdir()
        monkeypatch.chdir(inside)
        with pytest.raises(CheckpointError, match="current working directory"):
            save(model, tmp_path, force=True)
        assert inside.exists()

    @pytest.mark.parametrize("taken", [False, True])
    def test_a_failure_leaves_no_trace(self, model, tmp_path, taken):
        target = tmp_path / "saved"
        if taken:
            target.mkdir()
            (target / "old.txt").write_text("old")

        class Broken:
            def save_pretrained(self, folder):
                assert (Path(folder) / "model.safetensors").exists()
                raise OSError("disk full")

        with pytest.raises(OSError, match="disk full"):
            save(model, target, tokenizer=Broken(), force=True)
        assert [p.name for p in tmp_path.rglob("*")] == (["saved", "old.txt"] if taken else [])

    def test_a_failed_move_puts_the_old_folder_back(self, model, tmp_path, monkeypatch):
        target = tmp_path / "saved"
        target.mkdir()
        (target / "old.txt").write_text("old")
        rename = Path.rename

        def failing(self, other):
            if self.name.endswith(".tmp"):
                raise OSError("no rename today")
            return rename(self, other)

        monkeypatch.setattr(Path, "rename", failing)
        monkeypatch.setattr("calipers.checkpoint.replace._exchange", lambda one, other: False)
        with pytest.raises(OSError, match="no rename today"):
            save(model, target, force=True)
        assert [p.name for p in tmp_path.rglob("*")] == ["saved", "old.txt"]

    def test_tokenizer_is_saved_beside(self, model, tmp_path):
        from tokenizers import Tokenizer, models
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?")
        save(model, tmp_path / "saved", tokenizer=tokenizer)
        assert AutoTokenizer.from_pretrained(tmp_path / "saved").get_vocab()["b"] == 1


class TestRefusals:
    def test_model_without_quantization(self, tmp_path):
        for call in (lambda m: save(m, tmp_path / "saved"), compressed_size):
            with pytest.raises(CheckpointError, match="LlamaForCausalLM has no quantized module"):
                call(tiny_llama())
        assert not (tmp_path / "saved").exists()

    def test_modules_that_are_not_frozen(self, tmp_path):
        model = quantize_min_max(tiny_llama(), "W4A16")
        layer = model.model.layers[1].mlp.up_proj
        layer.quantization_status = QuantizationStatus.CALIBRATION
        message = r"1 of 14 .* not frozen \(status calibration\).*model\.layers\.1\.mlp\.up_proj"
        with pytest.raises(CheckpointError, match=message):
            save(model, tmp_path / "saved")

    @pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
    def test_scales_that_mean_nothing(self, value, tmp_path):
        model = quantize_min_max(tiny_llama(), "W4A16")
        model.model.layers[0].self_attn.q_proj.weight_scale.data[0, 0] = value
        with pytest.raises(CheckpointError, match=r"1 of 14 .* model\.layers\.0\.self_attn\.q"):
            save(model, tmp_path / "saved")

    def test_missing_scale(self, tmp_path):
        model = quantize_min_max(tiny_llama(), "W4A16")
        del model.model.layers[0].self_attn.q_proj.weight_scale
        with pytest.raises(CheckpointError, match=r"lack a scale.*self_attn\.q_proj"):
            save(model, tmp_path / "saved")

    @pytest.mark.parametrize("key", ["weight_global_scale", "input_global_scale"])
    def test_unequal_global_scales_of_layers_that_engines_fuse(self, key, tmp_path):
        model = quantize_min_max(tiny_llama(torch.bfloat16), "NVFP4")
        for layer in ("o_proj", "k_proj"):  # the first is not fused with any other
            scale = getattr(model.model.layers[1].self_attn, layer).get_parameter(key)
            scale.data = torch.nextafter(scale.data, 2 * scale.data)
        attn = r"model\.layers\.1\.self_attn\."
        named = rf"{attn}q_proj \+ {attn}k_proj \+ {attn}v_proj \({key}\)$"
        with pytest.raises(CheckpointError, match=rf"1 have unequal global scales: .*: {named}"):
            save(model, tmp_path / "saved")
        assert list(tmp_path.iterdir()) == []

    def test_module_that_cannot_be_compressed_is_named(self, tmp_path):
        model = quantize_min_max(tiny_llama(), "W4A16")
        module = model.model.layers[0].mlp.up_proj
        module.weight_scale = torch.nn.Parameter(torch.ones(3, 3), requires_grad=False)
        with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.up_proj cannot be"):
            save(model, tmp_path / "saved")
        assert list(tmp_path.iterdir()) == []

    def test_not_a_transformers_model(self, tmp_path):
        with pytest.raises(CheckpointError, match="save_pretrained; got Linear"):
            save(torch.nn.Linear(2, 2), tmp_path / "saved")

    def test_weights_without_data(self, tmp_path):
        model = quantize_min_max(tiny_llama(), "W4A16")
        model.model.norm.to("meta")
        with pytest.raises(CheckpointError, match=r"model\.norm\.weight lies on the meta device"):
            save(model, tmp_path / "saved")


class TestSize:
    @pytest.mark.parametrize("preset", ["W4A16", "W4A16_ASYM", "FP8", "NVFP4", "UNQUANTIZED"])
    def test_is_what_gets_written(self, preset, tmp_path):
        model = quantize_min_max(tiny_llama(torch.bfloat16), preset)
        save(model, tmp_path / "saved")
        written = sum(t.nbytes for t in stored(tmp_path / "saved").values())
        assert compressed_size(model) == written

    def test_four_bit_weights_are_a_quarter(self):
        model = quantize_min_max(tiny_llama(torch.bfloat16), "W4A16")
        linear = sum(m.weight.nbytes for m in model.modules() if hasattr(m, "weight_scale"))
        other = sum(p.nbytes for n, p in model.named_parameters() if n.endswith("norm.weight"))
        other += model.model.embed_tokens.weight.nbytes  # tied to the head: counted once
        groups = linear // 2 // 128 * 2  # one bfloat16 scale for 128 weights
        shapes = 14 * 2 * 8  # weight_shape, two int64 for each module
        assert compressed_size(model) == linear // 4 + groups + shapes + other


class TestTies:
    @pytest.mark.parametrize("preset", ["W4A16", "W8A8", "FP8", "NVFP4"])
    def test_quantized_head_of_a_tied_embedding(self, preset, tmp_path):
        model = quantize_min_max(tiny_llama(torch.bfloat16), preset, ignore=())
        expected = logits(model)
        save(model, tmp_path / "saved")
        assert "model.embed_tokens.weight" in stored(tmp_path / "saved")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        assert loaded.config.tie_word_embeddings is False
        assert model.config.tie_word_embeddings is True
        assert_same_logits(loaded, expected)

    def test_three_layers_share_one_weight(self, tmp_path):
        model = tiny_llama(layers=3)
        first = model.model.layers[0].mlp.up_proj
        for layer in model.model.layers[1:]:
            layer.mlp.up_proj.weight = first.weight
        quantize_min_max(model, "W4A16")
        expected = logits(model)
        save(model, tmp_path / "saved")
        assert_same_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), expected)

    def test_three_layers_are_one_module(self, tmp_path):
        model = tiny_llama(layers=3)
        for layer in model.model.layers[1:]:
            layer.mlp = model.model.layers[0].mlp
            layer.input_layernorm = model.model.layers[0].input_layernorm
        quantize_min_max(model, "W8A8")
        expected = logits(model)
        save(model, tmp_path / "saved")
        keys = stored(tmp_path / "saved")
        assert {f"model.layers.{i}.mlp.up_proj.weight" for i in range(3)} <= keys.keys()
        assert compressed_size(model) == sum(t.nbytes for t in keys.values())
        assert_same_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), expected)

    def test_head_untied_in_memory_is_stored(self, tmp_path):
        model = quantize_min_max(tiny_llama(), "W4A16")
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 2)
        expected = logits(model)
        save(model, tmp_path / "saved")
        assert_same_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), expected)


class TestOffloading:
    @pytest.mark.parametrize("where", ["cpu", "disk"])
    def test_offloaded_model_saves_the_same(self, where, tmp_path):
        model = quantize_min_max(tiny_llama(), "W4A16")
        save(model, tmp_path / "plain")
        size = compressed_size(model)
        options = {}
        if where == "disk":
            (tmp_path / "offloaded").mkdir()
            options["offload_dir"] = str(tmp_path / "offloaded")
        for module in model.modules():
            if module._parameters:
                offload_module(module, "cpu", where, **options)
        save(model, tmp_path / "saved")
        assert compressed_size(model) == size
        plain, offloaded = stored(tmp_path / "plain"), stored(tmp_path / "saved")
        assert plain.keys() == offloaded.keys()
        assert all(torch.equal(plain[key], offloaded[key]) for key in plain)


def test_a_loaded_checkpoint_can_be_quantized_and_saved_again(tmp_path):
    """Its hf_quantizer would make save_pretrained write another state dict than ours."""
    save(quantize_min_max(tiny_llama(), "W8A8"), tmp_path / "one")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    logits(model)  # the first forward decompresses it
    for module in model.modules():
        if hasattr(module, "quantization_scheme"):
            del module.quantization_scheme
    quantize_min_max(model, "W4A16")
    expected = logits(model)
    save(model, tmp_path / "two")
    assert model.hf_quantizer is not None
    config = json.loads((tmp_path / "two" / "config.json").read_text())
    assert config["quantization_config"]["format"] == "pack-quantized"
    assert_same_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "two"), expected)
