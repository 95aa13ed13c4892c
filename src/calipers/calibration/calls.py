"""Which modules a forward calls, and what a model can be run on where nobody gave any data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from compressed_tensors.offload import get_execution_device
from compressed_tensors.offload.cache import OffloadCache
from compressed_tensors.offload.utils import send_tensors
from loguru import logger
from torch import Tensor, nn

from calipers.calibration.batches import eval_mode, uncompiled
from calipers.observers.hooks import add_call_hook, remove_hooks

__all__ = ["CallCounter", "example_inputs", "find_never_called"]


class _Calls(Counter[int]):
    """Calls by the id of the module; a copy of one module takes no other along with it."""

    def add(self, module: nn.Module) -> None:
        self[id(module)] += 1


class CallCounter:
    """Counts the calls of some modules and of the modules around them.

    Args:
        model: The model; hooks are set on it until `remove`.
        names: Names of the modules.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self._names = [name for name in names if name]
        watched = sorted({*self._names, *map(_parent, self._names)})
        self._modules = {name: model.get_submodule(name) for name in watched}
        self._calls = _Calls()
        for module in self._modules.values():
            add_call_hook(module, self._calls.add)

    @property
    def never_called(self) -> set[str]:
        """Modules that were not called although the module around them was.

        Where that one was not called either nothing is known: an expert without tokens, a vision
        tower without images.
        """
        calls = self.counts()
        return {name for name in self._names if not calls[name] and calls[_parent(name)]}

    def counts(self) -> dict[str, int]:
        """Calls so far, by module name."""
        return {name: self._calls[id(module)] for name, module in self._modules.items()}

    def set_counts(self, counts: Mapping[str, int]) -> None:
        """Take over calls by module name, in place of those counted."""
        self._calls.clear()
        self._calls.update({id(self._modules[name]): calls for name, calls in counts.items()})

    def count(self, name: str) -> tuple[int, int]:
        """Calls of a module, and of the module around it; 0 of one that is not counted."""
        modules = (self._modules.get(each) for each in (name, _parent(name)))
        calls, outer = (0 if each is None else self._calls[id(each)] for each in modules)
        return calls, outer

    def restore(self, name: str, calls: int, outer_calls: int) -> None:
        """Put calls of a module and of the module around it in place of those counted."""
        for each, count in ((name, calls), (_parent(name), outer_calls)):
            if each in self._modules:
                self._calls[id(self._modules[each])] = count

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Let the calls inside of the block count, or, where it raises, none of them."""
        before = self._calls.copy()
        try:
            yield
        except BaseException:
            self._calls.clear()
            self._calls.update(before)
            raise

    def run_example(self, model: nn.Module) -> bool:
        """Count the calls that the model's own example input makes.

        Run is a model whose weights lie in memory, and for which `example_inputs` are known.

        Returns:
            Whether it ran; where it did not, or failed, nothing is counted.
        """
        inputs = example_inputs(model)
        if inputs is None or any(isinstance(m._parameters, OffloadCache) for m in model.modules()):
            return False
        device = get_execution_device(model, torch.device("cpu"))
        try:
            with self.whole(), eval_mode(model), torch.no_grad(), uncompiled(model):
                model(**send_tensors(inputs, device=device))
        except Exception as error:
            logger.debug("could not probe which layers run: {}: {}", type(error).__name__, error)
            return False
        return True

    def remove(self) -> None:
        """Take the hooks off; what was counted stays."""
        for module in self._modules.values():
            remove_hooks(module, self._calls)


def find_never_called(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Modules that the model's own example input passes by; none where it cannot be run."""
    counter = CallCounter(model, names)
    try:
        counter.run_example(model)
    finally:
        counter.remove()
    return counter.never_called


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


_TOKENS = 12
_FIRST, _LAST = 3, 60  # past the special tokens of most vocabularies


def example_inputs(model: Any) -> dict[str, Tensor] | None:
    """Random inputs of the kind that a model takes: token ids, an image or a sound.

    What the model takes is read from `main_input_name` and the config, as transformers' models have
    them; where these do not tell, from `dummy_inputs`. The numbers are the same each time.

    Args:
        model: Any model; its weights are not touched.

    Returns:
        Keyword arguments of its forward, on the CPU; None where nothing is known.
    """
    config = getattr(model, "config", None)
    inputs = _inputs_by_name(getattr(model, "main_input_name", None), config)
    dummies = getattr(model, "dummy_inputs", None)
    if isinstance(dummies, Mapping) and set(dummies) > set(inputs or ()):
        inputs = dict(dummies)
    if inputs is None:
        return None
    if getattr(config, "is_encoder_decoder", False):
        inputs.setdefault("decoder_input_ids", _ids(config))
    dtype = getattr(model, "dtype", torch.float32)
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}


def _inputs_by_name(main: Any, config: Any) -> dict[str, Tensor] | None:
    if config is None:
        return None
    if main == "input_ids":
        return {main: _ids(config)}
    size = getattr(config, "image_size", None)
    if main == "pixel_values" and size is not None:
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        return {main: _noise(1, getattr(config, "num_channels", 3), height, width)}
    bins = getattr(config, "num_mel_bins", None)
    if main == "input_features" and bins is not None:
        return {main: _noise(1, bins, 2 * getattr(config, "max_source_positions", 50))}
    if main == "input_values":
        return {main: _noise(1, 4000)}
    return None


def _ids(config: Any) -> Tensor:
    size = getattr(config, "vocab_size", None)
    last = min(_LAST, size) if isinstance(size, int) else _LAST
    first = min(_FIRST, max(last - 1, 0))
    shape = (1, _TOKENS)
    ids: Tensor = torch.randint(
        first, max(last, 1), shape, generator=_generator(), dtype=torch.int64, device="cpu"
    )
    return ids


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=_generator(), dtype=torch.float32, device="cpu")


def _generator() -> torch.Generator:
    return torch.Generator(device="cpu").manual_seed(1)
