"""Local transformers models for the commands: loading, sizes, memory."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from calipers._quiet import no_progress_bars
from calipers.errors import CalipersError

__all__ = ["load_model", "load_tokenizer", "model_bytes", "peak_memory_bytes"]

#: An organisation and a name.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_model(path: Path, *, device: str | None, dtype: str) -> Any:
    """Load a causal language model from a local directory; nothing is fetched.

    Args:
        path: A transformers directory.
        device: Where to put it; None takes a GPU if there is one.
        dtype: "auto" for that of the checkpoint, or the name of a torch dtype.

    Raises:
        CalipersError: No such directory, no model in it, or an unknown device or dtype.
    """
    from transformers import AutoModelForCausalLM

    if dtype not in _DTYPES:
        raise CalipersError(f"dtype: expected one of {', '.join(_DTYPES)}, got {dtype!r}")
    place = _device(device)
    if not path.exists() and _HUB_ID.fullmatch(str(path)):
        raise CalipersError(
            f"{path}: no such directory. If it is a model of the Hugging Face Hub, download it "
            f"first, since nothing is fetched here: `hf download {path} --local-dir "
            f"{path.name}`, or huggingface_hub.snapshot_download({str(path)!r}), and give the "
            "directory"
        )
    if not (path / "config.json").is_file():
        raise CalipersError(f"{path}: expected a local transformers directory with a config.json")
    with no_progress_bars():
        model: Any = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            local_files_only=True,
        )
    return model.to(place).eval()


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise CalipersError(f"device {name!r} cannot be used: {error}") from None
    return device


def load_tokenizer(path: Path) -> Any:
    """Load the tokenizer of a local directory; nothing is fetched."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    # Among what is saved with the tokenizer; where it is loaded next is nobody's business here.
    getattr(tokenizer, "init_kwargs", {}).pop("local_files_only", None)
    return tokenizer


def model_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and buffers of a model, shared ones counted once."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def peak_memory_bytes() -> int:
    """Most memory held by this process so far: of the GPU where one is used, else resident."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
