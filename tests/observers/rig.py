"""What every part of the contract suite builds its observers with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor, nn

from calipers.observers import Observer
from observers.samples import DEVICES, GLOBAL_SCALE, Case


class ObserverRig:
    """Members that a subclass of the suite sets, and how observers are built from them."""

    #: The name under which the observer is registered.
    name: ClassVar[str]
    #: What it keeps of several batches: "last": the last one alone; "all": everything, so that any
    #: split and any order give the same; "average": a moving average, in which the order matters.
    remembers: ClassVar[Literal["last", "all", "average"]]
    #: All options and their defaults; None leaves them unchecked.
    defaults: ClassVar[Mapping[str, Any] | None] = None
    #: Options under which the suite runs it (to spare time).
    options: ClassVar[Mapping[str, Any]] = {}
    #: Whether it wants to see inputs of its module before a weight (`Observer.needs_data`).
    needs_data: ClassVar[bool] = False

    device: torch.device
    #: Observers hold their module weakly.
    modules: list[nn.Module]

    @pytest.fixture(autouse=True, params=DEVICES)
    def _on_each_device(self, request: pytest.FixtureRequest) -> None:
        self.device = torch.device(request.param)
        self.modules = []

    @property
    def cls(self) -> type[Observer]:
        return Observer.get_value_from_registry(self.name)

    def module(self, case: Case) -> nn.Module:
        """A module with the global scale that `case` needs."""
        module = nn.Module()
        if case.strategy == "tensor_group":
            scale = torch.tensor([GLOBAL_SCALE], device=self.device)
            module.register_buffer(f"{case.base_name}_global_scale", scale)
        self.modules.append(module)
        return module

    def build(
        self,
        case: Case,
        *,
        module: nn.Module | None = None,
        args: QuantizationArgs | None = None,
        **options: Any,
    ) -> Observer:
        """A fresh observer for `case`, on a module of its own unless one is given."""
        return Observer.load_from_registry(
            self.name,
            case.base_name,
            args or case.args(),
            module or self.module(case),
            **{**self.options, **options},
        )

    def value(self, case: Case, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        return case.value(seed, dtype=dtype, device=self.device)

    def batches(self, case: Case, count: int = 4, dtype: torch.dtype = torch.float32) -> list[Any]:
        """Batches of such ranges that the last one, all of them and an average tell apart."""
        factors = (1, 2, 1.5, 0.75, 1.25)[:count]
        return [self.value(case, seed, dtype) * factor for seed, factor in enumerate(factors)]
