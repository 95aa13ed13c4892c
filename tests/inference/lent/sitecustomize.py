"""Lets torchvision be imported beside a torch that it was not built for; run by Python's start.

vLLM imports torchvision before it looks at any model that sees, also where no image will come. The
wheels that pip finds are built for CUDA: beside torch for CPUs their operators do not load, and the
import ends in "operator torchvision::nms does not exist". Declared, they are never called.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


class _BeforeTorchvision:
    """Finds no module; the first time that torchvision is looked for it declares operators."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            _declare()


def _declare() -> None:
    import torch

    found = importlib.util.find_spec("torchvision")
    for place in (found and found.submodule_search_locations) or ():
        for library in Path(place).glob("_C*.so"):
            try:
                torch.ops.load_library(str(library))
            except (OSError, ImportError):
                kept.append(torch.library.Library("torchvision", "FRAGMENT"))
                kept[-1].define(f"nms{_SCHEMA}")
                kept[-1].define(f"qnms{_SCHEMA}")


#: What is declared lasts as long as these.
kept: list[Any] = []
sys.meta_path.insert(0, _BeforeTorchvision())
