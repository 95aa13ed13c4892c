"""Checkpoints larger than memory: calibrated block by block, or quantized shard by shard."""

from calipers.streaming.quantize import StreamReport, quantize_checkpoint
from calipers.streaming.sizes import Sizes, measure_sizes

__all__ = ["Sizes", "StreamReport", "measure_sizes", "quantize_checkpoint"]
