"""`calipers inspect`: what a statistics file holds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.filesize import decimal

from calipers.calibration.targets import kind_of
from calipers.cli import options
from calipers.cli.console import plain_errors, print_json, print_lines, print_table
from calipers.grouping import BASE_NAMES
from calipers.statistics_files import Data, Manifest, Statistics

__all__ = ["inspect", "print_statistics"]

_NUMBERS = ("count", "fewest tokens", "most tokens", "without", "size")


def inspect(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A statistics file.")],
    json: options.Json = False,
) -> None:
    """Show what a statistics file holds: of which model, from which data, and of which modules.

    The whole file is read, and refused where it is damaged.

    Examples:
      calipers inspect stats.safetensors

      calipers inspect stats.safetensors --json
    """
    with plain_errors():
        found = Statistics.load(file)
        size = file.stat().st_size
    if json:
        told = found.manifest.model_dump(mode="json")
        states = {key: sorted(kinds) for key, kinds in sorted(found.states.items())}
        print_json({"file": str(file), "bytes": size, **told, "states": states})
    else:
        print_statistics(str(file), size, found)


def print_statistics(name: str, size: int, found: Statistics) -> None:
    """Print a table of the kinds of modules, and what the file says about itself."""
    manifest = found.manifest
    groups: dict[str, list[str]] = defaultdict(list)
    for module in manifest.modules:
        groups[kind_of(module)].append(module)
    print_table(
        name,
        ("modules", *_NUMBERS, "statistics"),
        [_row(found, kind, names) for kind, names in groups.items()],
        right=_NUMBERS,
    )
    print_lines(_lines(manifest, size))


def _row(found: Statistics, kind: str, names: list[str]) -> tuple[str, ...]:
    tokens = [found.modules[name].tokens for name in names]
    held: dict[str, None] = {}
    size = 0
    for name in names:
        for key, kinds in _states_of(found, name).items():
            for each, state in kinds.items():
                held[f"{key} {each}"] = None
                size += sum(value.numel() * value.dtype.itemsize for value in state.values())
    numbers = (len(names), min(tokens), max(tokens), tokens.count(0))
    return (kind, *map(str, numbers), decimal(size), ", ".join(held))


def _states_of(found: Statistics, name: str) -> dict[str, Mapping[str, Any]]:
    """Base name to the states by kind, of one module."""
    keys = {base: f"{name}.{base}" for base in BASE_NAMES}
    return {base: found.states[key] for base, key in keys.items() if key in found.states}


def _data(each: Data) -> str:
    return f"{each.name or 'batches'}: {each.batches:,} batches, sha256 {each.sha256[:16]}"


def _lines(manifest: Manifest, size: int) -> list[tuple[str, str]]:
    options = manifest.options
    products = {None: "none", 0: "of whole rows"}.get(
        options.products, f"of groups of {options.products} columns"
    )
    lines = [
        ("model", f"{manifest.fingerprint.kind}, fingerprint {manifest.fingerprint.digest[:16]}"),
        *[("data", _data(each)) for each in manifest.data],
        ("products", products),
        ("padding", "left out" if options.use_attention_mask else "counted"),
    ]
    if options.all_experts:
        lines.append(("experts", "every one saw every token"))
    never = [name for name, each in manifest.modules.items() if each.outer_calls and not each.calls]
    if never:
        lines.append(("never called", ", ".join(never)))
    versions = ", ".join(f"{name} {' and '.join(v)}" for name, v in manifest.versions.items())
    return [*lines, ("made with", versions), ("size", decimal(size))]
