"""The API pages name every public name, and every public name says what it is."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator

import pytest

import calipers
from docs.pages import API

#: Rooms whose names belong to the command, or to our own searches, and to nobody who imports them.
PRIVATE = {"_guard", "_quiet", "cli", "engines", "formats", "grouping", "memory"}
ROOMS = sorted(
    module.name
    for module in pkgutil.iter_modules(calipers.__path__)
    if module.name not in PRIVATE and not module.name.startswith("_")
)


def documented(room: str) -> list[str]:
    page = (API / f"{room}.md").read_text(encoding="utf-8")
    return re.findall(rf"^::: calipers\.{room}\.(\w+)$", page, re.MULTILINE)


@pytest.mark.parametrize("room", ROOMS)
def test_documented_names_are_the_public_names(room: str) -> None:
    module = importlib.import_module(f"calipers.{room}")
    assert sorted(documented(room)) == sorted(module.__all__)


def test_the_front_page_names_the_public_names() -> None:
    page = (API / "index.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `calipers\.(\w+)` \|", page, re.MULTILINE)
    assert sorted(listed) == sorted(calipers.__all__)
    for name, target in re.findall(r"^\| `calipers\.(\w+)` \| \[`([\w.]+)`\]", page, re.MULTILINE):
        module, _, attribute = target.rpartition(".")
        assert getattr(calipers, name) is getattr(importlib.import_module(module), attribute)


def public_objects() -> Iterator[tuple[str, object]]:
    for room in (None, *ROOMS):
        module = importlib.import_module("calipers" if room is None else f"calipers.{room}")
        yield module.__name__, module
        for name in module.__all__:
            value = getattr(module, name)
            if not (inspect.isclass(value) or inspect.isfunction(value)):
                continue
            yield f"{module.__name__}.{name}", value
            if inspect.isclass(value):
                yield from _members(f"{module.__name__}.{name}", value)


def _members(path: str, cls: type) -> Iterator[tuple[str, object]]:
    for name, member in vars(cls).items():
        if name.startswith("_"):
            continue
        if isinstance(member, (staticmethod, classmethod)):
            member = member.__func__
        if inspect.isfunction(member) or isinstance(member, property):
            yield f"{path}.{name}", member


def test_every_public_object_has_a_docstring() -> None:
    found = dict(public_objects())
    assert len(found) > 60
    assert [path for path, each in found.items() if not (each.__doc__ or "").strip()] == []
