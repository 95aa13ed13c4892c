"""Token batches from text: files, datasets and Python values, for calibration and evaluation."""

from calipers.text.batches import read_batches

__all__ = ["read_batches"]
