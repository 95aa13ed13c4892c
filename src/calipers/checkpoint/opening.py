"""How transformers opens a local folder: which class loads it, and what must not be missing."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from calipers._quiet import no_progress_bars
from calipers.checkpoint.loading import loading_experts
from calipers.errors import CalipersError

__all__ = ["class_to_load", "load_model", "load_tokenizer", "refuse_incomplete"]

#: An organisation and a name.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_model(path: Path, *, device: str | None = None, dtype: str = "auto") -> Any:
    """Load a model from a local directory; nothing is fetched.

    Args:
        path: A transformers directory. What its config calls by the name of a bare encoder or
            decoder (`BertModel`) is loaded as that, of a model that sees or hears as well
            (`Gemma3ForConditionalGeneration`) as that, anything else as a causal language model.
        device: Where to put it; None takes a GPU if there is one.
        dtype: "auto" for that of the checkpoint, or the name of a torch dtype.

    Raises:
        CalipersError: No such directory, no model in it, an unknown device or dtype, or weights
            that are missing or have other shapes: transformers makes up random ones.
    """
    if dtype not in _DTYPES:
        raise CalipersError(f"dtype: expected one of {', '.join(_DTYPES)}, got {dtype!r}")
    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise CalipersError(f"device {device!r} cannot be used: {error}") from None
    if not path.exists() and _HUB_ID.fullmatch(str(path)):
        raise CalipersError(
            f"{path}: no such directory. If it is a model of the Hugging Face Hub, download it "
            f"first, since nothing is fetched here: `hf download {path} --local-dir "
            f"{path.name}`, or huggingface_hub.snapshot_download({str(path)!r}), and give the "
            "directory"
        )
    if not (path / "config.json").is_file():
        raise CalipersError(f"{path}: expected a local transformers directory with a config.json")
    kind = class_to_load(path)
    with no_progress_bars(), loading_experts():
        model, info = kind.from_pretrained(
            path,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            local_files_only=True,
            output_loading_info=True,
        )
    refuse_incomplete(path, info)
    return model.to(place).eval()


def load_tokenizer(path: Path) -> Any:
    """Load the tokenizer of a local directory; nothing is fetched.

    Raises:
        CalipersError: It knows no tokens: transformers makes such a one where there are no files.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    if not tokenizer("text", add_special_tokens=False)["input_ids"]:
        raise CalipersError(f"{path}: no files of a tokenizer")
    return tokenizer


def class_to_load(path: Path) -> Any:
    """The class of transformers that loads what the config names, with its head if it has one."""
    import transformers
    from transformers.models.auto import modeling_auto as known

    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        names = set(config.get("architectures") or [])
    except (ValueError, AttributeError):
        return transformers.AutoModelForCausalLM  # it says what is wrong with the config
    for name in sorted(names):
        kind = getattr(transformers, name, None)
        if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
            return kind
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
