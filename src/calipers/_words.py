"""Words of messages: what was meant by an unknown name, what an error says in one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, get_args

from calipers.errors import CalipersError

__all__ = ["check_choice", "did_you_mean", "first_line", "listing"]


def check_choice(argument: str, given: object, choices: Any) -> None:
    """Refuse a value that is none of a Literal's.

    Raises:
        CalipersError: Lists the choices.
    """
    if given not in get_args(choices):
        known = ", ".join(get_args(choices))
        raise CalipersError(f"{argument} must be one of {known}, got {given!r}")


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """` Did you mean 'x'?`, or nothing where no known name is near."""
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its name where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def listing(names: Iterable[str], most: int) -> str:
    """`a, b and 3 more`: the first names, and how many others there are."""
    listed = list(names)
    rest = len(listed) - most
    return ", ".join(listed[:most]) + (f" and {rest} more" if rest > 0 else "")
