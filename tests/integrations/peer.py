"""What the tests of the llmcompressor integration share."""

from __future__ import annotations

from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import nn

#: llmcompressor's own names, all served by calipers after `install(replace=True)`.
NAMES = (
    "memoryless_minmax",
    "static_minmax",
    "minmax",
    "memoryless_mse",
    "mse",
    "nvfp4_expanded_mse",
    "fouroversix",
    "imatrix_mse",
    "nvfp4_expanded_imatrix",
)
MIN_MAX = NAMES[:3]


class Small(nn.Module):
    """Two layers, small enough that a recipe takes no time."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.up = nn.Linear(32, 64, bias=False)
        self.down = nn.Linear(64, 32, bias=False)
        for layer in (self.up, self.down):
            layer.weight.data.normal_(generator=generator)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


def copy_of(args: QuantizationArgs) -> QuantizationArgs:
    """Arguments of its own for each observer: llmcompressor's write into theirs."""
    return args.model_copy(update={"observer_kwargs": dict(args.observer_kwargs)})


def build(name: str, args: QuantizationArgs, base_name: str = "weight", **options: Any) -> Any:
    """The observer that llmcompressor's registry has under a name at this moment."""
    from llmcompressor.observers import Observer

    return Observer.load_from_registry(name, base_name=base_name, args=copy_of(args), **options)
