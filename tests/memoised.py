"""What the package memoises: tables that must not depend on where they are first asked for."""

from __future__ import annotations

import sys

__all__ = ["forget_tables"]


def forget_tables() -> None:
    """Let all tables of number formats, groupings and `calipers.ranges` be computed anew."""
    for name, module in list(sys.modules.items()):
        if name.startswith(("calipers.formats", "calipers.grouping", "calipers.ranges")):
            for member in vars(module).values():
                getattr(member, "cache_clear", lambda: None)()
