"""Local transformers models for the commands: loading, sizes, memory."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from calipers._quiet import no_progress_bars
from calipers._words import first_line
from calipers.checkpoint.loading import loading_experts
from calipers.checkpoint.opening import class_to_load, refuse_incomplete
from calipers.errors import CalipersError
from calipers.text.processors import is_processor

__all__ = ["find_processor", "load_model", "load_tokenizer", "peak_memory_bytes"]

#: An organisation and a name.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_DTYPES = ("auto", "float32", "bfloat16", "float16")
#: One of them lies in the folder of a model that has a processor.
_PROCESSOR_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)


def load_model(path: Path, *, device: str | None, dtype: str) -> Any:
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


def find_processor(path: Path) -> Callable[[], Any] | None:
    """What loads the processor of a local directory; None where there are no files of one."""
    if not any((path / name).is_file() for name in _PROCESSOR_FILES):
        return None
    return partial(_load_processor, path)


def _load_processor(path: Path) -> Any:
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(path, local_files_only=True)
    except Exception as error:  # whatever transformers and its plug-ins raise
        raise CalipersError(
            f"{path}: samples with images, videos or sounds need the model's processor, which "
            f"does not load: {first_line(error)}"
        ) from None
    if not is_processor(processor):
        raise CalipersError(
            f"{path}: samples with images, videos or sounds need a processor that takes text as "
            f"well; the model's is {type(processor).__name__}"
        )
    return processor


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
