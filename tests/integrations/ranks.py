"""Two ranks of a distributed run, one of which sees nothing: run by test_llmcompressor_ranks.py.

Prints, for each rank, what every observer holds after the ranks were brought together, as JSON.
"""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from compressed_tensors.quantization import QuantizationArgs
from torch import nn

from calipers.integrations.llmcompressor import install
from integrations.peer import build


def observed(name: str, rank: int, starved: int, base_name: str = "input") -> Any:
    """An observer that has seen batches `1, 2` (rank 0) or `3` (rank 1), unless it is starved."""
    args = QuantizationArgs(num_bits=8, strategy="tensor" if base_name == "input" else "channel")
    observer = build(name, args, base_name)
    if base_name == "weight":
        layer = nn.Linear(2, 2, bias=False)
        observer.attach(layer)
        if rank != starved:
            layer(torch.tensor([[1.0, rank + 2.0]]))
        observer.sync_activation_stats()
        return observer
    for size in ((1.0, 2.0), (3.0,))[rank]:
        if rank != starved:
            observer(torch.tensor([[size, -size]]))
    observer.sync_activation_stats()
    return observer


def main(store: str, rank: int) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    install(replace=True)
    held: dict[str, Any] = {}
    for starved in (-1, 0, 1):
        for name in ("static_minmax", "minmax", "memoryless_minmax", "mse"):
            observer = observed(name, rank, starved)
            held[f"{name} {starved}"] = [observer.min_vals.item(), observer.max_vals.item()]
            observer.get_qparams()
        weight = observed("imatrix_mse", rank, starved, "weight")
        held[f"imatrix_mse {starved}"] = weight.inner.input_square_sum.tolist()
    nothing = build("minmax", QuantizationArgs(num_bits=8, strategy="tensor"), "input")
    nothing.sync_activation_stats()
    held["nothing"] = nothing.has_statistics
    dist.destroy_process_group()
    print("HELD " + json.dumps(held))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
