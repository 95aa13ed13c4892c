"""How our observers behave inside llmcompressor: the traps that recipes hold."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from torch import Tensor, nn

from integrations.peer import Small, build
from observers.samples import logged
from ranges.strategies import NVFP4

pytest.importorskip("llmcompressor")
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.quantization.calibration import (
    freeze_module_quantization,
    initialize_observer,
)
from llmcompressor.modifiers.utils.hooks import HooksMixin
from llmcompressor.observers import FusionHandler
from llmcompressor.pipelines.registry import CalibrationPipeline

from calipers.integrations.llmcompressor import install, uninstall

INT4: dict[str, Any] = {"num_bits": 4, "strategy": "group", "group_size": 16}


@pytest.fixture(autouse=True)
def _installed() -> Iterator[None]:
    install(replace=True)
    yield
    uninstall()


def quantized(weights: QuantizationArgs) -> nn.Linear:
    """A layer that a recipe has set up, with the observer of its weight attached."""
    layer = Small().up
    layer.quantization_scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    initialize_observer(layer, "weight")
    return layer


# -- a weight's observer becomes a memoryless one --------------------------------------------------


@pytest.mark.parametrize(
    ("name", "built"),
    [
        ("minmax", "MemorylessMinMaxObserver"),
        ("static_minmax", "MemorylessMinMaxObserver"),
        ("mse", "MemorylessMSEObserver"),
        ("calipers_mse", "MovingAverageMSEObserver"),
    ],
)
def test_weights_get_memoryless_observers(name: str, built: str) -> None:
    """With the options of the one that the recipe names, which the one built need not know."""
    options = {} if name == "static_minmax" else {"averaging_constant": 0.5}
    layer = quantized(QuantizationArgs(**INT4, observer=name, observer_kwargs=options))
    assert type(layer.weight_observer.inner).__name__ == built
    expected = build(name, QuantizationArgs(**INT4))(layer.weight).get_qparams()["scale"]
    assert torch.equal(layer.weight_observer(layer.weight).get_qparams()["scale"], expected)


def test_options_of_both_reach_the_one_built() -> None:
    options = {"averaging_constant": 0.5, "norm": 2.0}
    layer = quantized(QuantizationArgs(**INT4, observer="mse", observer_kwargs=options))
    assert layer.weight_observer.inner.options.norm == 2


@pytest.mark.parametrize("name", ["mse", "memoryless_mse", "Memoryless-MSE", "calipers_mse"])
def test_an_unknown_option_is_an_error(name: str) -> None:
    args = QuantizationArgs(**INT4, observer=name, observer_kwargs={"nrom": 2.0})
    with pytest.raises(ValueError, match=r"unknown option 'nrom' \(did you mean 'norm'\?\)"):
        quantized(args)


def test_min_max_built_in_place_of_another_takes_none_of_its_options() -> None:
    """AWQ searches with memoryless_minmax whatever observer, ours or not, the recipe names."""
    for named in ("memoryless_mse", "of_another_package"):
        args = QuantizationArgs(**INT4, observer=named, observer_kwargs={"norm": 2.0})
        assert build("memoryless_minmax", args).inner.options.model_dump() == {}


def test_the_callers_arguments_are_not_changed() -> None:
    args = QuantizationArgs(**INT4)
    from llmcompressor.observers import Observer

    Observer.load_from_registry("memoryless_mse", base_name="weight", args=args, norm=2.0)
    assert args.observer_kwargs == {}


# -- data ----------------------------------------------------------------------------------------


def pipeline_for(observer: str, **options: Any) -> str:
    weights = {**INT4, "observer": observer, "observer_kwargs": options}
    group = {"targets": ["Linear"], "weights": weights}
    modifier = QuantizationModifier(config_groups={"group_0": group})
    return type(CalibrationPipeline.from_modifiers([modifier])).__name__


@pytest.mark.parametrize("name", ["calipers_imatrix_mse", "Calipers-IMatrix-MSE", "IMATRIX-MSE"])
def test_an_observer_that_needs_data_gets_the_sequential_pipeline(name: str) -> None:
    assert pipeline_for(name) == "SequentialPipeline"
    uninstall()
    if not name.startswith(("calipers", "Calipers")):
        assert pipeline_for(name) == "DataFreePipeline", "llmcompressor has learnt of spellings"


@pytest.mark.parametrize("name", ["memoryless_mse", "calipers_memoryless_mse", "mse"])
def test_others_stay_data_free(name: str) -> None:
    assert pipeline_for(name) == "DataFreePipeline"


def test_a_modifier_made_before_installing_gets_data_too() -> None:
    uninstall()
    modifier = QuantizationModifier(
        targets="Linear", scheme="W4A16", weight_observer="calipers_imatrix_mse"
    )
    install()
    pipeline = CalibrationPipeline.from_modifiers([modifier])
    assert type(pipeline).__name__ == "SequentialPipeline"


def test_an_unknown_option_is_found_before_the_data_runs() -> None:
    with pytest.raises(ValueError, match="unknown option 'girth'"):
        pipeline_for("memoryless_mse", girth=1)


@pytest.mark.parametrize("name", ["imatrix_mse", "calipers_imatrix_mse"])
def test_inputs_are_seen_where_hooks_are_not_disabled(name: str) -> None:
    layer = quantized(QuantizationArgs(**INT4, observer=name))
    inner = layer.weight_observer.inner
    layer(torch.ones(2, 3, 32))
    assert inner.num_input_tokens == 6
    with HooksMixin.disable_hooks():
        layer(torch.ones(2, 3, 32))
    assert inner.num_input_tokens == 6
    layer(input=torch.ones(4, 32))
    assert inner.num_input_tokens == 10
    layer.weight_observer.detach(layer)
    layer(torch.ones(4, 32))
    assert inner.num_input_tokens == 10


def test_an_observer_of_activations_collects_no_inputs() -> None:
    observer = build("imatrix_mse", QuantizationArgs(strategy="tensor"), "input")
    layer = Small().up
    observer.attach(layer)
    assert not layer._forward_pre_hooks


def test_a_recipe_that_failed_leaves_nothing_that_the_next_one_feeds() -> None:
    """llmcompressor sets a new observer over the old one, whose hook would go on collecting."""
    layer = quantized(QuantizationArgs(**INT4, observer="imatrix_mse"))
    old = layer.weight_observer.inner
    initialize_observer(layer, "weight")
    layer(torch.ones(3, 32))
    assert old.num_input_tokens == 0
    assert layer.weight_observer.inner.num_input_tokens == 3
    assert len(layer._forward_pre_hooks) == 1


def test_freezing_takes_observer_and_hook_away() -> None:
    layer = quantized(QuantizationArgs(**INT4, observer="imatrix_mse"))
    layer.quantization_status = "calibration"
    freeze_module_quantization(layer)
    assert not layer._forward_pre_hooks
    assert not hasattr(layer, "weight_observer")


# -- observing again -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["memoryless_mse", "mse", "imatrix_mse", "calipers_imatrix_mse"])
@pytest.mark.parametrize("strict", [False, True])
def test_observing_again_after_the_qparams_were_taken(name: str, strict: bool) -> None:
    """As with a module that several layers share: inputs of all calls count."""
    options = {"strict": strict} if "imatrix" in name else {}
    layer = quantized(QuantizationArgs(**INT4, observer=name, observer_kwargs=options))
    observer = layer.weight_observer
    spread = torch.arange(1.0, 33)
    layer(torch.ones(3, 32) * spread)
    first = observer(layer.weight).get_qparams()["scale"]
    assert not observer.has_statistics
    assert torch.equal(observer(layer.weight).get_qparams()["scale"], first)
    layer(torch.ones(5, 32) * spread.flip(0))
    observer(layer.weight)
    again = observer.get_qparams()["scale"]
    if "imatrix" in name:
        assert observer.inner.num_input_tokens == 8
        assert not torch.equal(again, first)
    else:
        assert torch.equal(again, first)


def test_moving_averages_start_anew() -> None:
    observer = build("minmax", QuantizationArgs(num_bits=8, strategy="tensor"), "input")
    observer(torch.tensor([[100.0, -100.0]]))
    observer.get_qparams()
    observer(torch.tensor([[1.0, -1.0]]))
    assert observer.max_vals.item() == 1


def test_without_statistics_there_are_no_qparams() -> None:
    with pytest.raises(AssertionError, match="No statistics available"):
        build("minmax", QuantizationArgs(num_bits=8), "input").get_qparams()


def test_an_empty_batch_changes_nothing() -> None:
    observer = build("minmax", QuantizationArgs(num_bits=8, strategy="tensor"), "input")
    assert observer(torch.empty(0, 4)) is observer
    assert not observer.has_statistics


# -- fused groups, memory ------------------------------------------------------------------------


def test_fused_observers_share_a_global_scale() -> None:
    args = QuantizationArgs(**NVFP4)
    layers = [Small(seed).up for seed in range(3)]
    layers[1].weight.data *= 7
    observers = [build("memoryless_minmax", args) for _ in layers]
    FusionHandler.fuse(zip(observers, layers, strict=True))
    first = observers[0](layers[0].weight).get_qparams()["global_scale"]
    assert all(observer.has_statistics for observer in observers)
    others = [observer.get_qparams()["global_scale"] for observer in observers[1:]]
    expected = 448 * 6 / layers[1].weight.abs().max()
    for scale in (first, *others):
        assert torch.equal(scale, expected.reshape(1))
    assert not any(observer.has_statistics for observer in observers)


def test_the_observer_is_no_part_of_the_models_modules_or_state() -> None:
    layer = quantized(QuantizationArgs(**INT4, observer="imatrix_mse"))
    assert [name for name, _ in layer.named_modules()] == ["", "weight_observer"]
    assert list(layer.state_dict()) == ["weight"]


def test_a_range_is_not_held_once_it_was_used() -> None:
    layer = quantized(QuantizationArgs(**INT4, observer="memoryless_mse"))
    layer.weight_observer(layer.weight)
    shape = layer.weight_observer.min_vals.shape
    layer.weight_observer.get_qparams()
    held = [t for t in gc.get_referents(vars(layer.weight_observer.inner)) if isinstance(t, Tensor)]
    assert not [t for t in held if t.shape == shape]
    assert not hasattr(layer.weight_observer, "min_vals")


def test_nan_and_inf_are_left_out() -> None:
    value = torch.randn(4, 32)
    value[1, 3], value[2, 5] = torch.nan, torch.inf
    with logged("WARNING") as warned:
        scale = build("memoryless_minmax", QuantizationArgs(**INT4))(value).get_qparams()["scale"]
    assert scale.isfinite().all()
    assert len(warned) == 1


def test_ragged_groups_are_taken() -> None:
    observer = build("memoryless_minmax", QuantizationArgs(**INT4))
    assert observer(torch.randn(4, 40)).get_qparams()["scale"].shape == (4, 3)
