"""Modules that read the same tensor: observers learn from it once, and what each would alone."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import calipers
from calipers.calibration.session import Calibration
from calipers.observers import Observer, StaticMinMaxObserver, hooks
from calipers.observers.input_moments import InputMoments
from tests.architectures import llama
from tests.observers.samples import logged

#: Scheme, observer of weights, of activations, options.
CASES = [
    ("FP8", "memoryless_minmax", "static_minmax"),
    ("FP8", "memoryless_minmax", "minmax"),
    ("INT8", "memoryless_minmax", "histogram"),
    ("NVFP4", "imatrix_mse", "static_minmax"),
    ("W4A16", "imatrix_mse", None),
    ("W4A16", "optimal", None),
    ("W4A16", "optimal:hessian", None),
]


class Block(nn.Module):
    """q and k read the same; k is called twice; `changed` reads what was changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(32, 32, bias=False) for _ in range(3))
        self.copied, self.changed = (nn.Linear(32, 32, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.q(x) + self.k(x) + self.v(x)
        y = y + self.k(x.flip(0))
        x = x.clone()
        y = y + self.copied(x)
        x.mul_(3)
        return y + self.changed(x)


class Mine(StaticMinMaxObserver):
    """An observer of a user's own that remembers more than it declares."""

    calls: ClassVar[list[str]] = []

    def observe(self, observed: Tensor, *args: Any, **kwargs: Any) -> None:
        self.calls.append(self.name)
        super().observe(observed, *args, **kwargs)


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(5)
    return make()


def states(calibration: Calibration) -> dict[str, dict[str, Tensor]]:
    found = {}
    for module in calibration.observed:
        for base_name, observer in module.observers.items():
            found[f"{module.name}.{base_name}"] = observer.state()
    return found


def attached(model: nn.Module, case: tuple[str, str, str | None]) -> Calibration:
    scheme, (weights, _, objective), activations = case[0], case[1].partition(":"), case[2]
    return calipers.attach(
        model,
        scheme,
        observer=weights,
        observer_options={"objective": objective} if objective else None,
        activation_observer=activations,
        scheme_options={"group_size": 16} if scheme == "W4A16" else {},
    )


def calibrated(model: nn.Module, case: tuple[str, str, str | None], batches: Any) -> Calibration:
    with attached(model, case) as calibration:
        calibration.run(batches)
        return calibration


def assert_same(found: Any, expected: Any) -> None:
    assert found.keys() == expected.keys()
    for name, state in found.items():
        assert state.keys() == expected[name].keys()
        for key, value in state.items():
            assert torch.equal(value, expected[name][key]), (name, key)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A context in which nothing is shared."""
    with monkeypatch.context() as patch:
        patch.setattr(hooks, "updates_of", lambda value, mask: None)
        yield patch


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_each_observer_holds_what_it_would_hold_alone(
    case: tuple[str, str, str | None], alone: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, 60, (3, 2, 16), generator=generator)
    masks = torch.ones_like(ids)
    masks[1, 0, :5] = 0
    batches = [
        {"input_ids": each, "attention_mask": mask} for each, mask in zip(ids, masks, strict=True)
    ]
    inputs = [torch.randn(4, 32, generator=generator) for _ in range(3)]
    expected = states(calibrated(seeded(llama), case, batches))
    of_block = states(calibrated(seeded(Block), case, inputs))
    alone.undo()
    calibration = calibrated(seeded(llama), case, batches)
    assert_same(states(calibration), expected)
    assert_same(states(calibrated(seeded(Block), case, inputs)), of_block)


@pytest.mark.parametrize(
    ("case", "kind", "method"),
    [(CASES[0], Observer, "_look_at"), (CASES[6], InputMoments, "_add_products")],
    ids=["extremes", "products"],
)
def test_what_several_modules_read_is_learnt_from_once(
    case: tuple[str, str, str | None], kind: type, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = seeded(llama)
    layers = model.config.num_hidden_layers
    called: list[int] = []
    original = getattr(kind, method)

    def counted(self: Any, *args: Any) -> Any:
        called.append(1)
        return original(self, *args)

    monkeypatch.setattr(kind, method, counted)
    with attached(model, case) as calibration:
        for batches in (1, 2):
            calibration.run([torch.arange(1, 17).unsqueeze(0)])
            # q, k and v read one tensor, gate and up one, o and down one each
            assert len(called) == batches * 4 * layers
        observers = {each.name: each.observers for each in calibration.observed}
        if kind is InputMoments:
            names = [f"model.layers.0.self_attn.{each}_proj" for each in "qk"]
            held = [observers[name]["weight"].moments for name in names]
            assert held[0].input_products is held[1].input_products
            assert held[0].input_sketch is held[1].input_sketch


def test_a_class_of_a_users_own_sees_every_value() -> None:
    Mine.calls.clear()
    Observer.register("mine_of_shared_inputs")(Mine)
    calibrated(
        seeded(Block), ("FP8", "memoryless_minmax", "mine_of_shared_inputs"), [torch.ones(2, 32)]
    )
    assert sorted(Mine.calls) == sorted(
        f"{each}.input" for each in ("q", "k", "k", "v", "copied", "changed")
    )


def test_each_module_tells_of_values_left_out() -> None:
    value = torch.ones(2, 32)
    value[0, 0] = torch.nan
    with logged("WARNING") as lines:
        calibrated(seeded(Block), CASES[0], [value])
    for name in "qkv":
        assert sum(f"{name}.input: left out" in each for each in lines) == 1


def test_nothing_of_a_value_outlives_it() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            died.append(weakref.ref(y.untyped_storage()))
            self.q(y)
            del y
            gc.collect()
            alive.append(died[-1]() is not None)
            return x

    died: list[Any] = []
    alive: list[bool] = []
    calibrated(Reader(), CASES[0], [torch.ones(2, 32)])
    assert alive == [False]
