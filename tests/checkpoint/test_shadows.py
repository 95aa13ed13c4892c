"""Checkpoints whose modules have scales by different observers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import calipers
from attention_models import batches, logits, make

IMATRIX = ("optimal:objective=imatrix", "optimal:objective=imatrix,negative_scales=true")


@pytest.mark.parametrize(
    ("scheme", "kv_cache", "weights", "activations"),
    [
        ("W4A16", None, (*IMATRIX, "memoryless_minmax", "imatrix_mse"), ()),
        ("FP8", "FP8_HEAD", ("memoryless_minmax",), ("histogram", "mse")),
    ],
)
def test_the_best_of_each_module_comes_back_to_the_last_bit(
    scheme: str,
    kv_cache: str | None,
    weights: tuple[str, ...],
    activations: tuple[str, ...],
    tmp_path: Path,
) -> None:
    model = make("llama", hidden_size=128, head_dim=32, intermediate_size=256)
    before = logits(model)
    report = calipers.calibrate(
        model,
        scheme,
        "optimal" if scheme == "FP8" else "memoryless_mse",
        [*batches(), *batches()],
        kv_cache=kv_cache,
        shadow=weights,
        activation_shadow=activations,
        pick="best",
    )
    rows = [row for each in report for rows in each.shadows.values() for row in rows]
    assert len({row.observer for row in rows if row.chosen}) > 1
    assert not torch.equal(logits(model), before)
    calipers.save(model, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    groups = config["quantization_config"]["config_groups"]
    # one group, as without shadows: engines want one scheme of layers that they fuse
    assert len([each for each in groups.values() if each["weights"]]) == 1
    scales = [module.weight_scale for module in model.modules() if hasattr(module, "weight_scale")]
    assert any(bool((scale < 0).any()) for scale in scales) is (scheme == "W4A16")
    loaded, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(logits(loaded), logits(model))
