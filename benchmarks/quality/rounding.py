"""Weights of a model as each observer rounds them, after one run of the calibration data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, fake_quantize
from torch import Tensor, nn

from benchmarks.quality.formats import Choice
from calipers.observers import Observer

__all__ = ["Watched", "attach_all", "linears_of"]


def linears_of(model: nn.Module, ignore: tuple[str, ...] = ()) -> dict[str, nn.Linear]:
    """The Linear modules of a model by name."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    return {name: module for name, module in found.items() if name not in ignore}


@dataclass
class Watched:
    """One observer on each Linear, for one format."""

    kind: str
    choice: Choice
    args: QuantizationArgs
    modules: dict[str, nn.Linear]
    observers: dict[str, Any] = field(default_factory=dict)

    def attach(self) -> None:
        """Build the observers and let them see what they want of their modules' inputs."""
        for name, module in self.modules.items():
            observer = self._build(module)
            observer.attach(module)
            self.observers[name] = observer

    def detach(self) -> None:
        """Stop seeing inputs."""
        for name, observer in self.observers.items():
            observer.detach(self.modules[name])

    @torch.no_grad()
    def rounded(self) -> Iterator[tuple[str, Tensor]]:
        """Name and fake-quantized weight of each module, in the weight's dtype.

        Global scales (NVFP4) are each weight's own, for both packages.
        """
        for name, observer in self.observers.items():
            weight = self.modules[name].weight.detach()
            qparams = self._peer_qparams if self.choice.peer else self._our_qparams
            scale, zero_point, global_scale = qparams(observer, self.modules[name], weight)
            yield name, fake_quantize(weight, scale, zero_point, self.args, global_scale)

    def _build(self, module: nn.Linear) -> Any:
        if self.choice.peer:
            from llmcompressor.observers import Observer as PeerObserver

            # Its observers write their options into the arguments they are given.
            args = self.args.model_copy(update={"observer_kwargs": {}})
            return PeerObserver.load_from_registry(
                self.choice.name, base_name="weight", args=args, **self.choice.options
            )
        return Observer.load_from_registry(
            self.choice.name, "weight", self.args, module, **self.choice.options
        )

    def _our_qparams(
        self, observer: Observer, module: nn.Linear, weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        global_scale = None
        if self.args.strategy == "tensor_group":
            global_scale = observer.get_global_scale(weight)
            module.weight_global_scale = global_scale
        try:
            scale, zero_point = observer(weight)
        finally:
            if global_scale is not None:
                del module.weight_global_scale
        return scale, zero_point, global_scale

    def _peer_qparams(
        self, observer: Any, module: nn.Linear, weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        observer(weight)
        found = observer.get_qparams()
        return found["scale"], found["zero_point"], found["global_scale"]


def attach_all(
    modules: dict[str, nn.Linear],
    kinds: dict[str, QuantizationArgs],
    choices: list[Choice],
    run: Callable[[], object],
) -> list[Watched]:
    """Observers of every format and choice made for it, after one run of the data for all."""
    watched = []
    for kind, args in kinds.items():
        for choice in choices:
            each = Watched(kind, choice, args, modules)
            if choice.fits(kind):
                each.attach()
                watched.append(each)
    run()
    for each in watched:
        each.detach()
    return watched
