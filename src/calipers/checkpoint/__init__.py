"""Writing compressed-tensors checkpoints of quantized models."""

from calipers.checkpoint.load_check import LoadCheck, check_load, find_load_problems
from calipers.checkpoint.loading import loading_experts
from calipers.checkpoint.save import compressed_size, save

__all__ = [
    "LoadCheck",
    "check_load",
    "compressed_size",
    "find_load_problems",
    "loading_experts",
    "save",
]
