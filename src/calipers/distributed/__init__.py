"""Ranks: processes that calibrate one model together, each with its share of the data."""

from calipers.distributed.joining import joined_ranks, split_by_size
from calipers.distributed.meeting import Ranks, share_of_rank
from calipers.distributed.reduce import reduce_statistics

__all__ = ["Ranks", "joined_ranks", "reduce_statistics", "share_of_rank", "split_by_size"]
