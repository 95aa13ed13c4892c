"""`CallCounter`: which modules a forward calls, and which it passes by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from compressed_tensors.offload import get_execution_device
from compressed_tensors.offload.cache import OffloadCache
from compressed_tensors.offload.utils import send_tensors
from loguru import logger
from torch import nn
from torch.utils.hooks import RemovableHandle

from calipers.calibration.batches import eval_mode

__all__ = ["CallCounter", "find_never_called"]


class CallCounter:
    """Counts the calls of some modules and of the modules around them.

    Args:
        model: The model; hooks are set on it until `remove`.
        names: Names of the modules.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self._names = list(names)
        self._calls: Counter[str] = Counter()
        self._handles: list[RemovableHandle] = []
        watched = {*self._names, *(_parent(name) for name in self._names if name)}
        for name in sorted(watched):
            hook = _Count(self._calls, name)
            module = model.get_submodule(name)
            self._handles.append(module.register_forward_pre_hook(hook))

    @property
    def never_called(self) -> set[str]:
        """Modules that were not called although the module around them was.

        Where that one was not called either nothing is known: an expert without tokens, a vision
        tower without images.
        """
        return {
            name
            for name in self._names
            if name and not self._calls[name] and self._calls[_parent(name)]
        }

    def remove(self) -> None:
        """Take the hooks off; what was counted stays."""
        while self._handles:
            self._handles.pop().remove()


class _Count:
    """A forward hook; a class, so that a copied model can be pickled with it."""

    def __init__(self, calls: Counter[str], name: str) -> None:
        self._calls, self._name = calls, name

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._calls[self._name] += 1


def find_never_called(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Modules that the model's own example input passes by; none where it cannot be run.

    Run is a transformers model whose weights lie in memory, with `dummy_inputs`, or one image of
    zeros where that is its main input.
    """
    inputs = _example_inputs(model)
    if inputs is None or any(isinstance(m._parameters, OffloadCache) for m in model.modules()):
        return set()
    counter = CallCounter(model, names)
    try:
        with eval_mode(model), torch.no_grad():
            model(**send_tensors(inputs, device=get_execution_device(model, torch.device("cpu"))))
    except Exception as error:
        logger.debug("could not probe which layers run: {}: {}", type(error).__name__, error)
        return set()
    finally:
        counter.remove()
    return counter.never_called


def _example_inputs(model: Any) -> dict[str, Any] | None:
    config = getattr(model, "config", None)
    if getattr(model, "main_input_name", None) == "pixel_values":
        size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", None)
        if isinstance(size, int) and isinstance(channels, int):
            dtype = next(model.parameters()).dtype
            shape = (1, channels, size, size)
            return {"pixel_values": torch.zeros(shape, dtype=dtype, device="cpu")}
    inputs = getattr(model, "dummy_inputs", None)
    return dict(inputs) if isinstance(inputs, Mapping) else None


def _parent(name: str) -> str:
    return name.rpartition(".")[0]
