"""`--plugin`, of every command that names observers."""

from __future__ import annotations

from typing import Annotated

import typer

from calipers.observers.plugins import load_plugin

__all__ = ["Plugins", "load_plugins"]

Plugins = Annotated[
    list[str] | None,
    typer.Option(
        "--plugin",
        metavar="MODULE_OR_FILE.py",
        help="Import this first: it registers observers of your own; may be repeated.",
    ),
]


def load_plugins(plugins: list[str] | None) -> None:
    """Import all that was given with `--plugin`.

    Raises:
        CalipersError: One that cannot be imported, by name.
    """
    for plugin in plugins or ():
        load_plugin(plugin)
