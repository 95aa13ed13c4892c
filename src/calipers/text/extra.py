"""`import_extra`: packages that only some files need."""

from __future__ import annotations

import importlib
from typing import Any

from calipers.errors import CalipersError

__all__ = ["import_extra"]


def import_extra(module: str, what: str) -> Any:
    """Import a module of the extra `data`.

    Raises:
        CalipersError: It is not installed; says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise CalipersError(
            f"reading {what} needs the package {package}: pip install 'calipers[data]' ({error})"
        ) from None
