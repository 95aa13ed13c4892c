"""`checkpoint_names`: under which names a checkpoint stores modules of a transformers model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

__all__ = ["checkpoint_names"]


def checkpoint_names(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Module name to the name that its weight has in a checkpoint.

    The two differ where transformers renames weights when it loads a model (multimodal models whose
    checkpoints are older than their classes); `save_pretrained` renames them back.

    Args:
        model: Any model; without renamings every name stands for itself.
        names: Names of modules.
    """
    conversions: Any = getattr(model, "_weight_conversions", None) or []
    inverted = [each.reverse_transform() for each in reversed(conversions)]
    found = {}
    for name in names:
        stored = f"{name}.weight"
        for each in inverted:
            renamed, matched = each.rename_source_key(stored)
            stored = renamed if matched is not None else stored
        found[name] = stored.removesuffix(".weight")
    return found
