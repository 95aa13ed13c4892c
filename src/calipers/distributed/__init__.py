"""Ranks: processes that calibrate one model together, each with its share of the data."""

from calipers.distributed.meeting import Ranks, share_of_rank
from calipers.distributed.reduce import reduce_statistics

__all__ = ["Ranks", "reduce_statistics", "share_of_rank"]
