"""calipers: observers that measure tensors and pick quantization scales."""

from calipers import _guard as _guard  # first: importing compressed_tensors must not touch loguru

# isort: split
from calipers.errors import (
    CalipersError,
    CheckpointError,
    MissingDataError,
    SchemeError,
    UnknownObserverError,
)
from calipers.observers import Observer

__version__ = "0.1.0"

__all__ = [
    "CalipersError",
    "CheckpointError",
    "MissingDataError",
    "Observer",
    "SchemeError",
    "UnknownObserverError",
    "__version__",
]
