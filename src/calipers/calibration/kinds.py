"""Modules of one kind, whose names differ by numbers alone, told in one place instead of many."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

__all__ = ["ModuleProblem", "group_problems", "kind_of", "list_kinds"]

#: Kinds named in one line of an error; a model of unnumbered names may have very many.
_LISTED = 12


class ModuleProblem(NamedTuple):
    """One module and one reason why it cannot take its scheme."""

    name: str
    reason: str


def kind_of(name: str) -> str:
    """The name with `*` for each number: `layers.3.mlp` is of the kind `layers.*.mlp`."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def list_kinds(names: Iterable[str]) -> str:
    """Kinds with their counts, `layers.*.mlp (30)`; a module alone in its kind by its own name."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for name in names:
        kinds[kind_of(name)].append(name)
    told = [
        members[0] if len(members) == 1 else f"{kind} ({len(members)})"
        for kind, members in kinds.items()
    ]
    if len(told) > _LISTED:
        told[_LISTED:] = [f"and {len(told) - _LISTED} other kinds"]
    return ", ".join(told)


def group_problems(problems: Iterable[ModuleProblem | str]) -> Iterator[str]:
    """One line for each reason, naming all modules that share it.

    Lines that are no problems of single modules stay as they are, in their place.
    """
    # A dict keeps the order in which reasons were first met.
    lines: dict[tuple[str, bool], list[str]] = defaultdict(list)
    for each in problems:
        if isinstance(each, ModuleProblem):
            lines[each.reason, True].append(each.name)
        else:
            lines[each, False].append("")
    for (text, of_modules), names in lines.items():
        yield f"{list_kinds(names)}: {text}" if of_modules else text
