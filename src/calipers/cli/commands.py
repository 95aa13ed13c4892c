"""How every command takes its arguments: near names for unknown options, `-h`, Ctrl-C."""

from __future__ import annotations

import shutil
import sys
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from calipers._words import did_you_mean

__all__ = ["CONTEXT", "Command", "Group"]

CONTEXT = {"help_option_names": ["-h", "--help"]}
#: Below this many columns the framed help cuts names of options.
_WIDTH_OF_FRAMES = 80


class _Plain:
    """What single commands and the group share; the first of their bases."""

    rich_markup_mode: Any
    help: str | None

    def parse_args(self, ctx: Any, args: Any) -> Any:
        """As the base, with the one option that an unknown one is nearest to."""
        try:
            return super().parse_args(ctx, args)  # type: ignore[misc]
        except Exception as error:
            # click's NoSuchOption, or typer's own copy of it, which it does not export
            if type(error).__name__ == "NoSuchOption":
                unknown: Any = error
                params = self.get_params(ctx)  # type: ignore[attr-defined]
                known = [name for each in params for name in each.opts if name.startswith("-")]
                if near := did_you_mean(unknown.option_name, known):
                    unknown.message = f"No such option: {unknown.option_name}.{near}"
                unknown.possibilities = None
            raise

    def invoke(self, ctx: Any) -> Any:
        """As the base; an interrupt is told in one word."""
        try:
            return super().invoke(ctx)  # type: ignore[misc]
        except KeyboardInterrupt:
            sys.stderr.write("interrupted\n")
            raise typer.Exit(130) from None

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """As the base, without frames where they would leave no room for names."""
        mode, text = self.rich_markup_mode, self.help
        columns = shutil.get_terminal_size().columns
        if columns < _WIDTH_OF_FRAMES:
            self.rich_markup_mode = None
            formatter.width = columns - 2
            # A paragraph of its own, or its first line is joined with the heading.
            self.help = (text or "").replace("Examples:\n", "Examples:\n\n")
        try:
            super().format_help(ctx, formatter)  # type: ignore[misc]
        finally:
            self.rich_markup_mode, self.help = mode, text


class Command(_Plain, TyperCommand):
    """A command."""


class Group(_Plain, TyperGroup):
    """The command of commands."""
