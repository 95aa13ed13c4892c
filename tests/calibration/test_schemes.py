from __future__ import annotations

import json
from pathlib import Path

import pytest
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES

from calipers.calibration import resolve_config
from calipers.errors import SchemeError


def only_scheme(config: QuantizationConfig) -> QuantizationScheme:
    (scheme,) = config.config_groups.values()
    assert isinstance(scheme, QuantizationScheme)
    return scheme


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", PRESET_SCHEMES)
@pytest.mark.parametrize("change", [str.upper, str.lower, str.title])
def test_every_preset_resolves_whatever_its_case(name, change):
    assert only_scheme(resolve_config(change(name))) == preset_name_to_scheme(name, ["Linear"])


def test_a_scheme_becomes_one_group():
    scheme = QuantizationScheme(targets=["re:.*up"], weights=QuantizationArgs(num_bits=4))
    config = resolve_config(scheme, ignore=("a", "re:b"))
    assert only_scheme(config) == scheme
    assert config.ignore == ["a", "re:b"]


def test_the_config_of_the_caller_is_never_changed_nor_shared():
    args = QuantizationArgs(num_bits=4, observer_kwargs={"norm": 2.0})
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    given = QuantizationConfig(config_groups={"g": scheme}, ignore=["head"])
    before = given.model_dump()
    config = resolve_config(given)
    only_scheme(config).weights.observer_kwargs["norm"] = 3.0
    only_scheme(config).targets.append("Embedding")
    config.ignore.append("x")
    assert given.model_dump() == before
    only_scheme(resolve_config(scheme)).weights.num_bits = 8
    assert given.model_dump() == before


def test_presets_are_not_shared_either():
    only_scheme(resolve_config("W4A16")).weights.num_bits = 3
    assert only_scheme(resolve_config("W4A16")).weights.num_bits == 4


def test_ignore_is_added_to_that_of_the_config_once():
    given = QuantizationConfig(config_groups={"W4A16": ["Linear"]}, ignore=["lm_head", "a"])
    assert resolve_config(given, ignore=("b", "lm_head")).ignore == ["lm_head", "a", "b"]
    assert resolve_config(given, ignore=()).ignore == ["lm_head", "a"]
    assert resolve_config("W4A16", ignore="one").ignore == ["one"]


def test_a_config_of_a_finished_checkpoint_starts_anew():
    given = QuantizationConfig(
        config_groups={"W4A16": ["Linear"]}, quantization_status=QuantizationStatus.COMPRESSED
    )
    assert resolve_config(given).quantization_status == QuantizationStatus.INITIALIZED


def test_a_yaml_file_of_a_config(tmp_path):
    path = write(
        tmp_path / "recipe.yaml",
        """
        config_groups:
          four:
            targets: ["re:.*up_proj"]
            weights: {num_bits: 4, group_size: 32, observer: imatrix_mse}
          FP8: ["re:.*down_proj"]
        ignore: [lm_head]
        """,
    )
    config = resolve_config(path, ignore=())
    assert config.ignore == ["lm_head"]
    four = config.config_groups["four"]
    assert four.weights == QuantizationArgs(num_bits=4, group_size=32, observer="imatrix_mse")
    assert config.config_groups["FP8"] == preset_name_to_scheme("FP8", ["re:.*down_proj"])


def test_a_yaml_file_of_a_scheme_given_as_text(tmp_path):
    path = write(tmp_path / "w.yml", "weights: {num_bits: 3, group_size: 64}")
    scheme = only_scheme(resolve_config(str(path)))
    assert scheme.targets == ["Linear"]
    assert scheme.weights == QuantizationArgs(num_bits=3, group_size=64)


def test_what_a_config_dumps_can_be_read_again(tmp_path):
    given = resolve_config("NVFP4")
    path = write(tmp_path / "dump.json", json.dumps(given.model_dump(mode="json")))
    assert only_scheme(resolve_config(path)).weights.group_size == 16


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ("W4A61", r"unknown scheme 'W4A61'\. Did you mean 'W4A16'\? Presets: .*W4A16.*NVFP4"),
        ("fp8-dynamic", r"Did you mean 'FP8_DYNAMIC'\?"),
        ("zzz", r"unknown scheme 'zzz'\. Presets: "),
        ("no/such.yaml", r"no such scheme file: no/such\.yaml"),
        ("missing.yml", r"no such scheme file: missing\.yml"),
        (Path("W4A16"), r"no such scheme file: W4A16"),
    ],
)
def test_unknown_names_and_files(scheme, message):
    with pytest.raises(SchemeError, match=message):
        resolve_config(scheme)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "must hold a mapping .* got list"),
        ("a: [", "is not valid YAML"),
        (
            "weights: {num_bit: 4}",
            r"weights\.num_bit: unknown field\. Did you mean 'num_bits'\? "
            r"Fields of a QuantizationArgs: num_bits, type, ",
        ),
        ("wieghts: {}", r"wieghts: unknown field\. Did you mean 'weights'\?.*QuantizationScheme"),
        (
            "config_groups: {g: {targets: [Linear], weights: {groups: 4}}}",
            r"config_groups\.g\.weights\.groups: unknown field",
        ),
        ("{config_groups: {}, ignored: [a]}", r"ignored: unknown field\. Did you mean 'ignore'\?"),
        ("config_groups: [a]", "config_groups must be a mapping, got list"),
        (
            "config_groups: {W4A61: [Linear]}",
            r"Unknown preset scheme name W4A61.*Did you mean 'W4A16'\?",
        ),
        ("weights: {num_bits: four}", r"weights\.num_bits: .*valid integer"),
        ("weights: {num_bits: 5, type: float}", r"Only num_bits in"),
        ("weights: {strategy: token}", "Cannot perform static token quantization"),
        ("input_activations: {strategy: channel}", "strategy is not supported for activation"),
        ("{config_groups: {}, kv_cache_scheme: {nub_bits: 8}}", r"kv_cache_scheme\.nub_bits: unk"),
    ],
)
def test_bad_files_say_what_is_wrong(tmp_path, text, message):
    path = write(tmp_path / "bad.yaml", text)
    with pytest.raises(SchemeError, match=message) as caught:
        resolve_config(path)
    assert "bad.yaml" in str(caught.value)


def test_all_bad_fields_are_told_at_once(tmp_path):
    path = write(tmp_path / "bad.yaml", "{wieghts: 1, weights: {num_bit: 4, grop_size: 3}}")
    with pytest.raises(SchemeError) as caught:
        resolve_config(path)
    for field in ("wieghts", "weights.num_bit", "weights.grop_size"):
        assert f"\n  {field}: unknown field" in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "default_stage: {default_modifiers: {GPTQModifier: {scheme: W4A16}}}",
        "quant_stage: {quant_modifiers: {QuantizationModifier: {targets: [Linear]}}}",
        "[{SmoothQuantModifier: {}}, {GPTQModifier: {}}]",
        "GPTQModifier: {scheme: W4A16, targets: [Linear]}",
    ],
)
def test_a_recipe_of_llmcompressor_is_sent_where_it_belongs(tmp_path, text):
    path = write(tmp_path / "recipe.yaml", text)
    with pytest.raises(SchemeError) as caught:
        resolve_config(path)
    assert str(caught.value).startswith(f"{path} is a recipe of llmcompressor (")
    assert "Modifier), not a scheme" in str(caught.value)
    assert "calipers.integrations.llmcompressor.install()" in str(caught.value)


def test_a_file_may_hold_a_kv_cache_scheme_alone(tmp_path):
    path = write(tmp_path / "cache.yaml", "kv_cache_scheme: {num_bits: 8, type: float}")
    config = resolve_config(path)
    assert config.config_groups == {}
    assert config.kv_cache_scheme == QuantizationArgs(num_bits=8, type="float")


@pytest.mark.parametrize(
    ("word", "kind", "strategy"),
    [
        ("FP8", "float", "tensor"),
        ("fp8-head", "float", "attn_head"),
        ("int8", "int", "tensor"),
        ("Int8_Head", "int", "attn_head"),
    ],
)
def test_words_for_a_cache(word, kind, strategy):
    args = resolve_config("W4A16", kv_cache=word).kv_cache_scheme
    assert (args.num_bits, args.type, args.strategy) == (8, kind, strategy)
    assert args.symmetric
    assert args.dynamic is False


def test_a_cache_that_is_asked_for_replaces_that_of_the_config():
    given = QuantizationConfig(config_groups={}, kv_cache_scheme=QuantizationArgs(num_bits=8))
    mine = QuantizationArgs(num_bits=8, type="float")
    resolved = resolve_config(given, kv_cache=mine)
    assert resolved.kv_cache_scheme == mine
    assert resolved.kv_cache_scheme is not mine
    assert given.kv_cache_scheme.type == "int"
    assert resolve_config(given).kv_cache_scheme == given.kv_cache_scheme
    assert resolve_config(None, kv_cache="FP8").config_groups == {}


def test_what_is_no_cache_is_refused():
    with pytest.raises(
        SchemeError, match=r"unknown word 'fp9'\. Did you mean 'FP8'\? Known: FP8, F"
    ):
        resolve_config("W4A16", kv_cache="fp9")
    with pytest.raises(SchemeError, match=r"kv_cache must be QuantizationArgs or one of .*got int"):
        resolve_config("W4A16", kv_cache=8)
    with pytest.raises(SchemeError, match=r"\(None only with a kv_cache\), got NoneType"):
        resolve_config(None)


def test_other_types_are_refused():
    with pytest.raises(SchemeError, match=r"scheme must be .* got QuantizationArgs"):
        resolve_config(QuantizationArgs())
    with pytest.raises(SchemeError, match=r"ignore must hold .* got int"):
        resolve_config("W4A16", ignore=[1])
