"""Weights of a model as each observer rounds them, after one run of the calibration data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from compressed_tensors.quantization import QuantizationArgs, fake_quantize
from torch import Tensor, nn

from benchmarks.quality.formats import Choice
from calipers.observers import Observer

__all__ = ["QParams", "Watched", "attach_all", "linears_of"]

#: Scale, zero point, and global scale where there is one.
QParams: TypeAlias = tuple[Tensor, Tensor, Tensor | None]


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
        """Name and fake-quantized weight of each module, in the weight's dtype."""
        for name, (scale, zero_point, global_scale) in self.qparams():
            weight = self.modules[name].weight.detach()
            yield name, fake_quantize(weight, scale, zero_point, self.args, global_scale)

    @torch.no_grad()
    def qparams(self) -> Iterator[tuple[str, QParams]]:
        """Name, scale, zero point and global scale of each module.

        Global scales (NVFP4) are each weight's own, for both packages.
        """
        find = self._peer_qparams if self.choice.peer else self._our_qparams
        for name, observer in self.observers.items():
            module = self.modules[name]
            yield name, find(observer, module, module.weight.detach())

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

    def _our_qparams(self, observer: Observer, module: nn.Linear, weight: Tensor) -> QParams:
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

    def _peer_qparams(self, observer: Any, module: nn.Linear, weight: Tensor) -> QParams:
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
