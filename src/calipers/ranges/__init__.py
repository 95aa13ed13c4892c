"""Pure functions from tensors to ranges: they know no observer and no model."""

from calipers.ranges.grid import search_grid_ranges
from calipers.ranges.identities import range_of_qparams
from calipers.ranges.layout import arrange, arrange_whole
from calipers.ranges.min_max import min_max
from calipers.ranges.optimal import search_optimal_scales
from calipers.ranges.shrink import ShrinkGrid
from calipers.ranges.views import Arrangement, GroupedView

__all__ = [
    "Arrangement",
    "GroupedView",
    "ShrinkGrid",
    "arrange",
    "arrange_whole",
    "min_max",
    "range_of_qparams",
    "search_grid_ranges",
    "search_optimal_scales",
]
