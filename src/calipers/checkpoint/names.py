"""Under which names a checkpoint stores the modules of a transformers model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from calipers.calibration.experts import known_conversions

__all__ = ["are_renamed", "checkpoint_names"]


def checkpoint_names(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Module name to the name that its weight has in a checkpoint.

    The two differ where transformers renames weights when it loads a model (multimodal models whose
    checkpoints are older than their classes); `save_pretrained` renames them back.
    """
    conversions = _conversions(model)
    inverted = [each.reverse_transform() for each in reversed(conversions)]
    found = {}
    for name in names:
        stored = f"{name}.weight"
        for each in inverted:
            renamed, matched = each.rename_source_key(stored)
            stored = renamed if matched is not None else stored
        found[name] = stored.removesuffix(".weight")
    return found


def are_renamed(model: nn.Module) -> bool:
    """Whether transformers renames weights of such a model when it loads them.

    False for what is no transformers model, and where the installed transformers cannot tell.
    """
    return bool(known_conversions(model))


def _conversions(model: nn.Module) -> list[Any]:
    """What `save_pretrained` reverts: those used in loading, else those of the model's class."""
    used: list[Any] | None = getattr(model, "_weight_conversions", None)
    if used is not None:
        return used
    known = known_conversions(model)
    return [each for each in known if type(each).__name__ != "PrefixChange"]
