"""`example_inputs`: something that a model can be run on, where nobody gave any data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["example_inputs"]

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
