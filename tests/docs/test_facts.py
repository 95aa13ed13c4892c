"""What the pages state about options and defaults is what the code has."""

from __future__ import annotations

import importlib
import re

import pytest
import typer

from calipers.cli import app
from calipers.observers import Observer
from docs.pages import ROOT, read_table

README = ROOT / "README.md"
COMMAND_LINE = ROOT / "docs" / "command-line.md"


def shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def registered() -> dict[str, type[Observer]]:
    """The observers of the package, aliases included; tests register some of their own."""
    names = (*Observer.registered_names(), *Observer.registered_aliases())
    found = {name.replace("-", "_"): Observer.get_value_from_registry(name) for name in names}
    return {name: cls for name, cls in found.items() if cls.__module__.startswith("calipers.")}


def test_observer_table_of_the_readme() -> None:
    listed = {}
    for names, options, needs_data, summary in read_table(README.read_text("utf-8"), "name"):
        assert summary
        for name in re.findall(r"`(\w+)`", names):
            listed[name] = (re.findall(r"`(\w+)=([^`]+)`", options), needs_data)
    assert listed == {
        name: (
            [(option, shown(field.default)) for option, field in cls.Options.model_fields.items()],
            "yes" if cls.needs_data else "no",
        )
        for name, cls in registered().items()
    }


def test_rooms_of_the_readme_exist() -> None:
    rows = read_table(README.read_text("utf-8"), "room")
    rooms = [re.findall(r"`([^`]+)`", row[0])[0] for row in rows]
    assert len(rooms) == 12
    assert all((ROOT / room).is_dir() for room in rooms)


def test_links_of_the_readme_exist() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README.read_text("utf-8"))
    assert links
    assert all((ROOT / link).exists() for link in links)


def commands() -> dict[str, typer.core.TyperCommand]:
    return typer.main.get_command(app).commands


def test_command_line_page_lists_the_commands() -> None:
    rows = read_table(COMMAND_LINE.read_text("utf-8"), "command")
    listed = [re.findall(r"`calipers (\w+)`", row[0])[0] for row in rows]
    assert listed == list(commands())


@pytest.mark.parametrize(
    "command",
    ["calibrate", "evaluate", "compare", "coverage", "demo", "observers", "schemes", "doctor"],
)
def test_command_line_page_lists_the_options(command: str) -> None:
    _, section = COMMAND_LINE.read_text("utf-8").split(f"\n## calipers {command}\n")
    section = section.split("\n## ")[0]
    listed = []
    for name, default, summary in read_table(section, "option"):
        assert summary
        listed.append((name.strip("`").split(), default.strip("`")))
    options = [p for p in commands()[command].params if p.opts[0].startswith("--")]
    expected = []
    for option in options:
        value = option.metavar if option.metavar and not option.is_flag else None
        default = option.default() if callable(option.default) else option.default
        plain = "" if default is None or default is False or default == [] else str(default)
        expected.append(([option.opts[0], *([value] if value else [])], plain))
    assert listed == expected


def test_json_fields_of_the_command_line_page() -> None:
    """The fields are those that the tests of the command hold it to."""
    fields = importlib.import_module("cli.test_calibrate").FIELDS
    rows = read_table(COMMAND_LINE.read_text("utf-8"), "field")
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row[0])} == fields
