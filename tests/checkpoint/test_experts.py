"""Checkpoints hold experts one by one, under the names that the model's own checkpoints have."""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from loguru import logger
from safetensors.torch import load_file

import architectures
import calipers
from architectures import example_inputs, output_of, spread_weights
from calipers.checkpoint import find_load_problems
from docs.pages import read_table

MOE = ["qwen3_moe", "mixtral", "deepseek_v3", "glm4_moe", "qwen3_next", "jamba"]
#: Their own checkpoints hold all experts in one tensor, so transformers does not know them apart.
JOINED = ["granite_moe", "gpt_oss", "llama4"]


def calibrated(name: str, scheme: Any, ignore: Any = ()) -> Any:
    model = spread_weights(getattr(architectures, name)())
    data = [example_inputs(model, seed) for seed in range(3)]
    calipers.calibrate(model, scheme, data=data, ignore=ignore, on_missing="fallback")
    return model


def saved(model: Any, folder: Path) -> list[str]:
    """Save, and return the warnings of it."""
    warnings: list[str] = []
    sink = logger.add(lambda message: warnings.append(str(message)), level="WARNING")
    try:
        calipers.save(model, folder)
    finally:
        logger.remove(sink)
    return [each for each in warnings if "loading_experts" in each]


def loaded(model: Any, folder: Path, within: Any = nullcontext) -> Any:
    with within():
        return type(model).from_pretrained(folder)


@pytest.mark.parametrize("name", MOE)
def test_packed_integers_load_as_they_are(name: str, tmp_path: Path) -> None:
    model = calibrated(name, "W4A16", "re:.*mamba" if name == "jamba" else ())
    assert saved(model, tmp_path / "out") == []
    expected = output_of(model)
    assert torch.equal(output_of(loaded(model, tmp_path / "out")), expected)
    one_by_one = loaded(model, tmp_path / "out", calipers.loading_experts)
    assert torch.equal(output_of(one_by_one), expected)


@pytest.mark.parametrize(
    ("name", "path", "leaves"),
    [
        ("mixtral", "block_sparse_moe.experts.1", ("w1", "w2", "w3")),
        ("qwen3_moe", "mlp.experts.1", ("down_proj", "gate_proj", "up_proj")),
    ],
)
def test_names_are_those_of_the_models_own_checkpoints(
    name: str, path: str, leaves: tuple[str, ...], tmp_path: Path
) -> None:
    plain = getattr(architectures, name)()
    plain.save_pretrained(tmp_path / "plain")
    original = load_file(tmp_path / "plain" / "model.safetensors")
    saved(calibrated(name, "W4A16"), tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for leaf in leaves:
        key = f"model.layers.1.{path}.{leaf}.weight"
        assert key in original
        assert {f"{key}_packed", f"{key}_scale", f"{key}_shape"} <= stored.keys()
        assert tuple(stored[f"{key}_shape"]) == original[key].shape
    assert not [key for key in stored if "gate_up_proj" in key]


def test_from_a_checkpoint_on_disk_to_another(tmp_path: Path) -> None:
    plain = spread_weights(architectures.mixtral())
    plain.save_pretrained(tmp_path / "plain")
    model = type(plain).from_pretrained(tmp_path / "plain")
    calipers.calibrate(model, "W4A16", data=[example_inputs(model)])
    assert saved(model, tmp_path / "out") == []
    original = load_file(tmp_path / "plain" / "model.safetensors").keys()
    stored = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert {key.replace("_packed", "") for key in stored if ".experts." in key} >= {
        key for key in original if ".experts." in key
    }
    assert torch.equal(output_of(loaded(model, tmp_path / "out")), output_of(model))


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        *(("qwen3_moe", scheme) for scheme in ("W4A16", "W8A16", "W4A16_ASYM", "W8A8", "FP8")),
        *(("qwen3_moe", scheme) for scheme in ("NVFP4A16", "MXFP4A16", "MXFP8A16", "MXFP4")),
        ("granite_moe", "W4A16"),
        ("llama4", "W4A16"),
        ("llama4", "FP8"),
    ],
)
def test_what_calibrate_says_is_what_a_twin_shows(name: str, scheme: str) -> None:
    told: list[str] = []
    sink = logger.add(lambda message: told.append(str(message)), level="INFO")
    model = spread_weights(getattr(architectures, name)())
    data = None if scheme != "FP8" else [example_inputs(model)]
    calipers.calibrate(model, scheme, "memoryless_minmax", data)
    logger.remove(sink)
    found = find_load_problems(model)
    assert found.problems == {}
    assert any("calipers.loading_experts()" in each for each in told) == bool(found.experts)


@pytest.mark.parametrize(
    "options",
    [
        {"scheme": None, "kv_cache": "FP8"},
        {"scheme": "FP8_DYNAMIC", "ignore": "Llama4TextExperts"},
    ],
)
def test_experts_that_transformers_takes_apart_are_stored_apart(
    options: dict[str, Any], tmp_path: Path
) -> None:
    """Whatever is quantized: of one tensor they would come back random."""
    model = spread_weights(architectures.llama4())
    experts = model.model.layers[0].feed_forward.experts
    calipers.calibrate(model, data=[example_inputs(model)], **options)
    calipers.save(model, tmp_path / "out")
    assert model.model.layers[0].feed_forward.experts is experts
    read = type(model).from_pretrained(tmp_path / "out")
    gate, up = experts.gate_up_proj.transpose(1, 2).chunk(2, dim=1)
    for number, each in enumerate(read.model.layers[0].feed_forward.experts):
        assert torch.equal(each.gate_proj.weight, gate[number])
        assert torch.equal(each.up_proj.weight, up[number])
        assert torch.equal(each.down_proj.weight, experts.down_proj[number].T)
    apart = (output_of(read) - output_of(model)).abs().max()
    assert apart < 1e-4  # it adds up in another order


def test_layers_that_engines_fuse_share_their_global_scale() -> None:
    model = calibrated("mixtral", "NVFP4")
    expert = model.model.layers[0].mlp.experts[1]
    for name in ("weight_global_scale", "input_global_scale"):
        assert torch.equal(getattr(expert.w1, name), getattr(expert.w3, name))
        assert not torch.equal(getattr(expert.w1, name), getattr(expert.w2, name))


@pytest.mark.parametrize("name", JOINED)
@pytest.mark.parametrize("scheme", ["W4A16", "FP8"])
def test_what_is_joined_in_its_own_checkpoints(name: str, scheme: str, tmp_path: Path) -> None:
    model = calibrated(name, scheme)
    warnings = saved(model, tmp_path / "out")
    assert bool(warnings) == (name != "llama4")  # which transformers itself takes apart
    keys = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert [key for key in keys if ".experts.1.up_proj.weight" in key]
    expected = output_of(model)
    found = output_of(loaded(model, tmp_path / "out", calipers.loading_experts))
    if name == "gpt_oss":  # whose weights are stored transposed: sums have another order
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    else:
        assert torch.equal(found, expected)
    if name == "llama4":
        assert torch.equal(output_of(loaded(model, tmp_path / "out")), expected)


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("scheme", ["W4A16", "FP8_DYNAMIC"])
def test_experts_left_alone_in_one_layer_or_in_all(name: str, scheme: str, tmp_path: Path) -> None:
    for ignore in ("re:.*layers.0.*experts", "re:.*experts"):
        model = calibrated(name, scheme, ignore)
        folder = tmp_path / str(len(ignore))
        saved(model, folder)
        found = output_of(loaded(model, folder, calipers.loading_experts))
        torch.testing.assert_close(found, output_of(model), rtol=0, atol=1e-5)


PAGE = Path(__file__).parents[2] / "docs" / "experts.md"


def rows_of_the_page() -> list[tuple[str, str]]:
    """Schemes of the table of loaders, each with what it says of a plain `from_pretrained`."""
    rows = read_table(PAGE.read_text("utf-8"), "scheme")
    return [(scheme, cells[1]) for cells in rows for scheme in re.findall(r"`(\w+)`", cells[0])]


@pytest.mark.parametrize(("scheme", "plain"), rows_of_the_page())
def test_schemes_of_the_page_load_as_it_says(scheme: str, plain: str, tmp_path: Path) -> None:
    base = architectures.mixtral()
    model = spread_weights(type(base)._from_config(base.config, dtype=torch.bfloat16).eval())
    data = [example_inputs(model, seed) for seed in range(3)]
    calipers.calibrate(model, scheme, data=data)
    warnings = saved(model, tmp_path / "out")
    expected = output_of(model)
    one_by_one = loaded(model, tmp_path / "out", calipers.loading_experts)
    assert torch.equal(output_of(one_by_one), expected)
    if plain.startswith("exact"):
        assert warnings == []
        assert torch.equal(output_of(loaded(model, tmp_path / "out")), expected)
        return
    (warning,) = warnings
    assert "inside `with calipers.loading_experts():` alone" in warning
    if "loads without a word" in plain:
        assert not torch.equal(output_of(loaded(model, tmp_path / "out")), expected)
    else:
        with pytest.raises(RuntimeError, match="encountered some issues during automatic conver"):
            loaded(model, tmp_path / "out")


@pytest.mark.parametrize("scheme", ["FP8_DYNAMIC", "W8A8", "W4A16_ASYM", "FP8"])
def test_other_schemes_are_exact_in_float32_as_well(scheme: str, tmp_path: Path) -> None:
    model = calibrated("mixtral", scheme)
    assert len(saved(model, tmp_path / "out")) == 1
    found = output_of(loaded(model, tmp_path / "out", calipers.loading_experts))
    assert torch.equal(found, output_of(model))
