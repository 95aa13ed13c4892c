"""Pure functions from tensors to ranges: they know no observer and no model."""

from calipers.grouping import Grouping, Groups, group_values
from calipers.ranges.histogram import (
    Histogram,
    count_patterns,
    percentile_range,
    search_histogram_range,
)
from calipers.ranges.min_max import min_max
from calipers.ranges.optimal import search_optimal_scales
from calipers.ranges.qparams import range_of_qparams
from calipers.ranges.shrink_grid import ShrinkGrid, search_grid_ranges

__all__ = [
    "Grouping",
    "Groups",
    "Histogram",
    "ShrinkGrid",
    "count_patterns",
    "group_values",
    "min_max",
    "percentile_range",
    "range_of_qparams",
    "search_grid_ranges",
    "search_histogram_range",
    "search_optimal_scales",
]
