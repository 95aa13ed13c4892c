"""What the commands ask of a local transformers model beside itself: its processor, memory."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from calipers._words import first_line
from calipers.errors import CalipersError
from calipers.text.processors import is_processor

__all__ = ["find_processor", "peak_memory_bytes"]

#: One of them lies in the folder of a model that has a processor.
_PROCESSOR_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)


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
