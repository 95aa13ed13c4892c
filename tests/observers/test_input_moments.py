"""What inputs teach is held beside the observer: saved, merged and taken back along with it."""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import nn

import calipers
from calipers.observers import Observer
from calipers.observers.hooks import remove_hooks
from calipers.observers.input_moments import InputMoments, InputObserver
from observers.samples import assert_same, assert_same_state, sample

GROUP = QuantizationArgs(num_bits=4, strategy="group", group_size=8)


def build(name: str = "imatrix_mse", **options: object) -> InputObserver:
    observer = Observer.load_from_registry(name, "weight", GROUP, **options)
    assert isinstance(observer, InputObserver)
    return observer


@pytest.mark.parametrize("objective", ["imatrix", "hessian"])
def test_observers_of_modules_with_the_same_inputs_may_share(objective: str) -> None:
    apart = [build("optimal", objective=objective) for _ in range(2)]
    first, second = (build("optimal", objective=objective) for _ in range(2))
    second.moments = first.moments
    weights, inputs = [sample((4, 16), seed) for seed in (1, 2)], sample((40, 16), 3)
    first.observe_input(inputs)
    for observer in apart:
        observer.observe_input(inputs)
    for observer, alone, weight in zip((first, second), apart, weights, strict=True):
        assert_same(observer(weight), alone(weight))
        assert_same_state(observer.state(), alone.state())
    copied = copy.deepcopy([first, second])
    assert copied[0].moments is copied[1].moments
    assert copied[0].moments is not first.moments


def test_a_scale_follows_from_weight_moments_and_arguments() -> None:
    seen, given = build(), build()
    seen.observe_input(sample((40, 16), 3))
    given.moments = copy.deepcopy(seen.moments)
    assert_same(given(sample((4, 16))), seen(sample((4, 16))))


def test_moments_alone_are_saved_and_merged() -> None:
    halves, whole = [InputMoments(), InputMoments()], InputMoments()
    batches = [torch.randint(-8, 9, (4, 16)).float() for _ in range(2)]
    for half, batch in zip(halves, batches, strict=True):
        half.observe(batch)
        whole.observe(batch)
    halves[0].merge_statistics(halves[1])
    assert_same_state(halves[0].state(), whole.state())
    loaded = InputMoments()
    loaded.load_state(whole.state())
    assert_same_state(loaded.state(), whole.state())
    assert loaded.num_input_tokens == 8


def test_a_merge_that_is_refused_changes_neither() -> None:
    observer, other = build(), build()
    for each, cols in ((observer, 16), (other, 24)):
        each.observe_input(sample((4, cols)))
        each(sample((4, cols)))
    state = observer.state()
    with pytest.raises(ValueError, match="cannot merge input_square_sum"):
        observer.merge(other)
    assert_same_state(observer.state(), state)


@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))]
)
def test_copies_learn_apart(duplicate) -> None:
    observer = build()
    observer.observe_input(sample((4, 16)))
    duplicate(observer).observe_input(sample((4, 16)))
    assert observer.num_input_tokens == 4


def test_values_left_out_of_inputs_and_of_weights_are_counted_together() -> None:
    observer = build()
    bad = sample((4, 16))
    bad[0, 0] = torch.nan
    observer.observe_input(bad)
    observer(bad)
    assert observer.num_nonfinite == int(observer.state()["num_nonfinite"]) == 2
    loaded = build()
    loaded.load_state(observer.state())
    assert loaded.num_nonfinite == 2


def test_inputs_are_called_after_the_observer() -> None:
    observer = build()
    observer.name = "model.layers.0.up_proj.weight"
    with pytest.raises(ValueError, match=r"^inputs of model\.layers\.0\.up_proj: "):
        observer.observe_input("text")


def test_one_file_sets_hooks() -> None:
    root = Path(calipers.__file__).parent
    setting = [
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if re.search(r"\bregister_forward_(pre_)?hook\(", path.read_text("utf-8"))
    ]
    assert setting == ["observers/hooks.py"]


def test_hooks_of_others_stay() -> None:
    module = nn.Linear(4, 4)
    module.register_forward_hook(lambda *_: None)
    remove_hooks(module, object())
    assert len(module._forward_hooks) == 1
