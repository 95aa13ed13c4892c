"""Checkpoints that are quantized shard by shard, without a model in memory."""

from calipers.streaming.quantize import StreamReport, quantize_checkpoint

__all__ = ["StreamReport", "quantize_checkpoint"]
