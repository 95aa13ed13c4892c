"""The examples run end to end, and recipes that go wrong end clearly."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from calipers.demo import MODEL_PATH

pytest.importorskip("llmcompressor")
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier

from calipers.errors import MissingDataError
from calipers.integrations.llmcompressor import install, uninstall

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "side_by_side")
ROW = re.compile(r"^  (float|observers of \w+) +perplexity +([\d.]+)", re.MULTILINE)


def test_there_are_examples() -> None:
    assert {"gptq", "nvfp4", "w4a16", "w8a8_static"} <= set(NAMES)


SLOW = {"gptq", "nvfp4", "w8a8_static"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in NAMES]
)
def test_example(name: str, tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), "--out", str(tmp_path)]
    done = subprocess.run(
        [*command, "--samples", "8"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = {row: float(value) for row, value in ROW.findall(done.stdout)}
    assert list(found) == ["float", "observers of llmcompressor", "observers of calipers"]
    # Both start from the same recipe: what calipers finds is no worse than half a percent.
    assert found["observers of calipers"] < 1.005 * found["observers of llmcompressor"]
    assert found["observers of calipers"] < 1.05 * found["float"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "calipers")
    logits = loaded(torch.arange(8).unsqueeze(0)).logits
    assert logits.isfinite().all()


# -- recipes that go wrong -----------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    uninstall()


def recipe(observer: str = "imatrix_mse", **options: object) -> QuantizationModifier:
    weights = {
        "num_bits": 4,
        "strategy": "group",
        "group_size": 32,
        "observer": observer,
        "observer_kwargs": options,
    }
    group = {"targets": ["re:.*layers.0.*proj"], "weights": weights}
    return QuantizationModifier(config_groups={"group_0": group})


def batches(number: int = 1) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 1000, (number, 16), generator=generator)
    return DataLoader([{"input_ids": row} for row in ids], batch_size=1)


def scales_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items() if k.endswith("weight_scale")}


def fresh() -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(MODEL_PATH)


def test_an_unknown_option_ends_the_recipe_before_it_measures() -> None:
    model = fresh()
    with install(replace=True), pytest.raises(ValueError, match="unknown option 'nrom'"):
        oneshot(model=model, recipe=recipe(nrom=2), dataset=batches())
    assert not [name for name, _ in model.named_modules() if name.endswith("_observer")]


def test_after_a_recipe_that_failed_half_way_the_next_one_gives_what_it_should(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = fresh()
    model = fresh()
    with install(replace=True):
        oneshot(model=expected, recipe=recipe(), dataset=batches(2))
    from calipers.observers import IMatrixMSEObserver

    def fail(*args: object) -> None:
        raise RuntimeError("half way")

    with monkeypatch.context() as patch:
        patch.setattr(IMatrixMSEObserver, "measure", fail)
        with install(replace=True), pytest.raises(RuntimeError, match="half way"):
            oneshot(model=model, recipe=recipe(), dataset=batches(2))
    with install(replace=True):
        oneshot(model=model, recipe=recipe(), dataset=batches(2))
    found = scales_of(model)
    assert len(found) == 7
    assert {k: v.tolist() for k, v in found.items()} == {
        k: v.tolist() for k, v in scales_of(expected).items()
    }
    assert not [m for m in model.modules() if m._forward_pre_hooks]


def test_an_observer_that_needs_data_is_told_so_without_any() -> None:
    wanted = r"observer 'calipers_imatrix_mse' measures weights by the inputs .*: give it a dataset"
    with install(replace=True), pytest.raises(MissingDataError, match=wanted):
        oneshot(model=fresh(), recipe=recipe("calipers_imatrix_mse"))


def test_uninstalling_while_observers_are_attached(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run goes on with the observers that it has; the next one gets llmcompressor's."""
    expected, model = fresh(), fresh()
    with install(replace=True):
        oneshot(model=expected, recipe=recipe(), dataset=batches(2))
    install(replace=True)
    start = QuantizationModifier.on_calibration_start

    def start_and_uninstall(self: QuantizationModifier, *args: object, **kwargs: object) -> None:
        start(self, *args, **kwargs)
        uninstall()

    monkeypatch.setattr(QuantizationModifier, "on_calibration_start", start_and_uninstall)
    oneshot(model=model, recipe=recipe(), dataset=batches(2))
    found, wanted = scales_of(model), scales_of(expected)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


# -- observers that llmcompressor lacks ------------------------------------------------------------


def test_optimal_weighs_errors_by_the_data_of_the_recipe() -> None:
    by_inputs, plain, again = fresh(), fresh(), fresh()
    with install():
        oneshot(model=by_inputs, recipe=recipe("optimal"), dataset=batches(2))
        oneshot(model=again, recipe=recipe("optimal"), dataset=batches(2))
        oneshot(model=plain, recipe=recipe("optimal", objective="mse"))
        with pytest.raises(MissingDataError, match="'optimal' measures weights by the inputs"):
            oneshot(model=fresh(), recipe=recipe("optimal"))
    found, once_more, others = scales_of(by_inputs), scales_of(again), scales_of(plain)
    assert len(found) == 7
    assert all(torch.equal(found[key], once_more[key]) for key in found)
    assert all(not torch.equal(found[key], others[key]) for key in found)


def test_histogram_of_static_activations() -> None:
    model = fresh()
    inputs = {"num_bits": 8, "strategy": "tensor", "dynamic": False, "observer": "histogram"}
    weights = {"num_bits": 8, "strategy": "channel"}
    group = {
        "targets": ["re:.*layers.0.*proj"],
        "weights": weights,
        "input_activations": inputs,
    }
    with install():
        modifier = QuantizationModifier(config_groups={"group_0": group})
        oneshot(model=model, recipe=modifier, dataset=batches(2))
    scales = [v for k, v in model.state_dict().items() if k.endswith("input_scale")]
    assert len(scales) == 7
    assert all(bool((scale > 0).all() and scale.isfinite().all()) for scale in scales)
