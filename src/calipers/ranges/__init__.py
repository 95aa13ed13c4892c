"""Pure functions from tensors to ranges: they know no observer and no model."""

from calipers.ranges.histogram import (
    Histogram,
    count_patterns,
    percentile_range,
    search_histogram_range,
)
from calipers.ranges.layout import arrange, arrange_whole
from calipers.ranges.min_max import min_max
from calipers.ranges.optimal import search_optimal_scales
from calipers.ranges.qparams import range_of_qparams
from calipers.ranges.shrink_grid import ShrinkGrid, search_grid_ranges
from calipers.ranges.views import Arrangement, GroupedView

__all__ = [
    "Arrangement",
    "GroupedView",
    "Histogram",
    "ShrinkGrid",
    "arrange",
    "arrange_whole",
    "count_patterns",
    "min_max",
    "percentile_range",
    "range_of_qparams",
    "search_grid_ranges",
    "search_histogram_range",
    "search_optimal_scales",
]
