"""Files of statistics: what passes over data taught about a model, for any scheme to come."""

from calipers.statistics_files.fingerprint import Fingerprint, weight_digest
from calipers.statistics_files.imatrix import write_imatrix
from calipers.statistics_files.manifest import Data, Manifest, Module, Options
from calipers.statistics_files.statistics import Statistics, read_statistics

__all__ = [
    "Data",
    "Fingerprint",
    "Manifest",
    "Module",
    "Options",
    "Statistics",
    "read_statistics",
    "weight_digest",
    "write_imatrix",
]
