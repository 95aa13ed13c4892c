"""Writing compressed-tensors checkpoints of quantized models."""

from __future__ import annotations

from calipers.checkpoint.save import compressed_size, save

__all__ = ["compressed_size", "save"]
