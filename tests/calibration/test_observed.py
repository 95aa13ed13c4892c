"""One hook a module feeds all of its tensors; the first observer of a tensor decides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from torch import nn

from calipers.calibration import attach, calibrate
from calipers.calibration.observed import ObservedTensor
from calipers.calibration.plan import ObserverChoice, plan_observers
from calipers.calibration.run_plan import run_plan
from calipers.observers import IMatrixMSEObserver, Observer
from calipers.observers.hooks import Seen
from observers.samples import sample

ARGS = QuantizationArgs(num_bits=8)
SCHEME = QuantizationScheme(
    targets=["Linear"],
    weights=QuantizationArgs(num_bits=4, group_size=8),
    input_activations=ARGS,
    output_activations=ARGS,
)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 8))


def test_one_hook_for_each_side_feeds_all() -> None:
    with attach(model(), SCHEME, observer="imatrix_mse") as calibration:
        layer = calibration.model[0]
        kinds = [type(hook).__name__ for hook in layer._forward_pre_hooks.values()]
        assert sorted(kinds) == ["_CallHook", "_Hook"]
        assert len(layer._forward_hooks) == 1
        calibration.run([sample((5, 16))])
        observed = calibration.observed[0]
        assert observed.tokens == observed.weight_observer.num_input_tokens == 5
        assert set(observed.observers) == {"weight", "input", "output"}
        assert all(tensor.lacks is None for tensor in observed.tensors.values())
    assert not layer._forward_pre_hooks
    assert not layer._forward_hooks


def test_others_than_the_first_observer_see_the_same_and_decide_nothing() -> None:
    plan = plan_observers(model(), SCHEME, ObserverChoice("memoryless_minmax"), ())
    observed = plan.observed[0]
    tensor, weight = observed.tensors["input"], observed.tensors["weight"]
    tensor.observers.append(Observer.load_from_registry("minmax", "input", ARGS))
    weight.observers.append(Observer.load_from_registry("imatrix_mse", "weight", weight.args))
    observed.attach()
    with observed.whole_batch():
        observed.module(sample((5, 16)))
    observed.detach()
    first, second = tensor.observers
    assert float(first.max_vals) == float(second.past_max_vals)
    assert tensor.deciding is first
    assert weight.observers[1].num_input_tokens == 5


class SetsItsOwnHook(IMatrixMSEObserver):
    """Sees half of the inputs."""

    def attach(self, module: nn.Module) -> None:
        self.handle = module.register_forward_pre_hook(
            lambda _, args: self.observe_input(args[0][::2])
        )

    def detach(self, module: nn.Module) -> None:
        self.handle.remove()


def test_an_observer_that_sets_hooks_of_its_own_is_not_fed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = classmethod(lambda cls, name: SetsItsOwnHook)
    monkeypatch.setattr(Observer, "get_value_from_registry", found)
    scheme = QuantizationScheme(targets=["Linear"], weights=SCHEME.weights)
    with attach(model(), scheme) as calibration:
        calibration.run([sample((6, 16))])
        assert calibration.observed[0].weight_observer.num_input_tokens == 3
        assert calibration.observed[0].tokens == 6
    assert not calibration.model[0]._forward_pre_hooks


def test_a_weight_without_a_module() -> None:
    observer = Observer.load_from_registry("optimal", "weight", SCHEME.weights)
    tensor = ObservedTensor("layer", None, "weight", SCHEME.weights, [observer])
    assert (tensor.full_name, tensor.wants_data) == ("layer.weight", True)
    assert tensor.lacks == "its observer weighs by the layer's inputs and saw no token"
    tensor.see(Seen("input", sample((4, 16)), 4, unmasked=False))
    assert tensor.lacks is None


@pytest.mark.parametrize("data", [None, [sample((5, 16))]])
def test_a_plan_that_is_run_gives_what_calibrate_gives(data: Any) -> None:
    scheme = QuantizationScheme(targets=["Linear"], weights=SCHEME.weights)
    whole, planned = model(), model()
    calibrate(whole, scheme, data=data)
    plan = plan_observers(planned, scheme, ObserverChoice(has_data=data is not None), ())
    report = run_plan(planned, plan, data)
    assert len(report.modules) == 2
    for mine, other in zip(planned.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, other)
