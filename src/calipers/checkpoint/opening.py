"""How transformers opens a local folder: which class loads it, and what must not be missing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from calipers.errors import CalipersError

__all__ = ["class_to_load", "refuse_incomplete"]


def class_to_load(path: Path) -> Any:
    """The class of transformers that loads what the config names, with its head if it has one."""
    import transformers
    from transformers.models.auto import modeling_auto as known

    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        names = set(config.get("architectures") or [])
    except (ValueError, AttributeError):
        return transformers.AutoModelForCausalLM  # it says what is wrong with the config
    # transformers before 5 does not have it
    if names & _values(getattr(known, "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES", {})):
        return transformers.AutoModelForMultimodalLM
    if names & _values(known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        return transformers.AutoModelForCausalLM
    # Sentence encoders are bare.
    bare = names & _values(known.MODEL_MAPPING_NAMES)
    return transformers.AutoModel if bare else transformers.AutoModelForCausalLM


def _values(mapping: Mapping[str, Any]) -> set[str]:
    """Names of classes; some kinds of models have several."""
    return {
        name
        for value in mapping.values()
        for name in ([value] if isinstance(value, str) else value)
    }


def refuse_incomplete(path: Path, info: Mapping[str, Any]) -> None:
    """Refuse weights that are missing or have other shapes: transformers makes up random ones.

    Args:
        path: The folder.
        info: What `from_pretrained` tells with `output_loading_info`.

    Raises:
        CalipersError: Names one of them.
    """
    # A pooler comes after the last hidden state: sentence encoders are often saved without it.
    missing = [name for name in info["missing_keys"] if "pooler." not in name]
    missing += [each[0] for each in info["mismatched_keys"]]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CalipersError(
            f"{path}: lacks weights that the model needs, or has them in other shapes: "
            f"{min(missing)}{more}"
        )
