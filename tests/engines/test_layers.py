"""Engines know no search, and nothing outside of their package tells them apart."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import calipers

ROOT = Path(calipers.__file__).parent
ENGINES = ROOT / "engines"
FILES = sorted(ROOT.rglob("*.py"))


def nodes(path: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("path", sorted(ENGINES.rglob("*.py")), ids=lambda path: path.stem)
def test_engines_know_tensors_and_formats_alone(path: Path) -> None:
    for node in nodes(path):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("calipers."):
            _, package, *_ = (node.module or "").split(".")
            assert package in ("engines", "errors", "formats", "grouping", "memory")


def test_groupings_know_no_search() -> None:
    for node in nodes(ROOT / "grouping.py"):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("calipers."):
            assert (node.module or "").split(".")[1] == "memory"


def test_engines_are_told_apart_in_their_package_alone() -> None:
    for path in FILES:
        if ENGINES in path.parents:
            continue
        for node in nodes(path):
            if isinstance(node, ast.Compare):
                compared = [node.left, *node.comparators]
                values = {each.value for each in compared if isinstance(each, ast.Constant)}
                assert not values & {"native", "triton", "eager"}, f"{path}:{node.lineno}"


def test_no_file_imports_a_private_name_of_another() -> None:
    for path in FILES:
        for node in nodes(path):
            if isinstance(node, ast.ImportFrom) and node.module != "calipers":
                private = [each.name for each in node.names if each.name.startswith("_")]
                module = node.module or ""
                assert not private or not module.startswith("calipers"), f"{path}: {private}"
