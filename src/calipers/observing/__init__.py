"""Statistics of a model for any scheme to come: from data that runs once, or from an imatrix."""

from calipers.observing.imatrix import statistics_from_imatrix
from calipers.observing.observe import observe

__all__ = ["observe", "statistics_from_imatrix"]
