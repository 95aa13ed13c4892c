"""Import compressed_tensors without its changes to loguru.

Depending on version and environment, importing compressed_tensors removes every sink that the user
has set up and turns its own messages on. Both are the user's to decide.
"""

from __future__ import annotations

import importlib
import sys

from loguru import logger


def import_compressed_tensors() -> None:
    """Import compressed_tensors; sinks and switched-off names of loguru stay as they are."""
    if "compressed_tensors" in sys.modules:
        return
    held = ("remove", "enable", "disable")
    for name in held:
        setattr(logger, name, lambda *args, **kwargs: None)
    try:
        importlib.import_module("compressed_tensors")
    finally:
        for name in held:
            delattr(logger, name)  # the instance attributes: the methods show again


import_compressed_tensors()
