"""`calipers observers`, `calipers schemes`, `--help`, `--version`."""

from __future__ import annotations

import importlib.metadata
import inspect
import os
from typing import Any

import pytest
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES

import calipers as package
from calipers import cli
from calipers.demo import MODEL_PATH
from calipers.observers import Observer
from cli.conftest import Calipers, succeeded

COMMANDS = (
    "calibrate",
    "quantize",
    "evaluate",
    "compare",
    "demo",
    "observers",
    "schemes",
    "doctor",
)


def registered() -> dict[str, type[Observer]]:
    """The observers of the package; tests register some of their own."""
    found = {
        name.replace("-", "_"): Observer.get_value_from_registry(name)
        for name in Observer.registered_names()
    }
    return {name: cls for name, cls in found.items() if cls.__module__.startswith("calipers.")}


def is_plain(text: str) -> bool:
    return "\x1b" not in text and not any("─" <= char <= "╿" for char in text)


def test_observers_as_json(calipers: Calipers) -> None:
    listed = {each["name"]: each for each in succeeded(calipers("observers", "--json"))}
    known = registered()
    assert known.keys() <= listed.keys()
    for name, cls in known.items():
        entry = listed[name]
        assert entry["needs_data"] is cls.needs_data
        assert entry["summary"] == inspect.getdoc(cls).splitlines()[0]
        options = {each["name"]: each for each in entry["options"]}
        defaults = {key: field.default for key, field in cls.Options.model_fields.items()}
        assert {key: each["default"] for key, each in options.items()} == defaults
        assert all(each["description"] for each in options.values())


def test_an_observer_without_a_docstring_is_listed(calipers: Calipers) -> None:
    if "silent-one" not in Observer.registered_names():
        Observer.register("silent_one")(type("SilentOne", (Observer,), {}))
    listed = {each["name"]: each for each in succeeded(calipers("observers", "--json"))}
    assert listed["silent_one"]["summary"] == ""


def test_observers_as_text(calipers: Calipers) -> None:
    result = calipers("observers")
    assert result.exit_code == 0
    assert is_plain(result.stdout)
    lines = {line.split()[0]: line.split() for line in result.stdout.splitlines() if line.strip()}
    for name, cls in registered().items():
        assert lines[name][1] == ("yes" if cls.needs_data else "no")
        for option, field in cls.Options.model_fields.items():
            shown = field.default
            shown = f"{shown:.4g}" if isinstance(shown, float) else str(shown)
            assert f"{option}={shown}" in lines[name]


def test_schemes_as_json(calipers: Calipers) -> None:
    listed: dict[str, Any] = succeeded(calipers("schemes", "--json"))
    assert listed.keys() == PRESET_SCHEMES.keys()
    assert listed["W4A16"]["weights"]["num_bits"] == 4
    assert listed["W4A16"]["weights"]["group_size"] == 128
    assert listed["FP8"]["input_activations"]["type"] == "float"
    assert "weights" not in listed["UNQUANTIZED"]


def test_schemes_as_text(calipers: Calipers) -> None:
    result = calipers("schemes")
    assert result.exit_code == 0
    assert is_plain(result.stdout)
    lines = {line.split()[0]: line.split() for line in result.stdout.splitlines() if line.strip()}
    assert lines.keys() >= PRESET_SCHEMES.keys()
    assert lines["W4A16"] == ["W4A16", "int4", "group", "128", "-", "no"]
    assert lines["W4A16_ASYM"][-3:] == ["asymmetric", "-", "no"]
    assert lines["FP8_BLOCK"][1:4] == ["float8", "block", "128x128"]
    assert {name for name in PRESET_SCHEMES if lines[name][-1] == "yes"} == {"FP8", "NVFP4"}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_examples(calipers: Calipers, command: str) -> None:
    result = calipers(command, "--help")
    assert result.exit_code == 0
    assert "Examples:" in result.stdout
    assert result.stdout.count(f"calipers {command}") >= 2
    assert "\x1b" not in result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_of_a_narrow_help_begin_below_their_heading(
    calipers: Calipers, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr("shutil.get_terminal_size", lambda *a: os.terminal_size((60, 24)))
    lines = [line.strip() for line in calipers(command, "-h").stdout.splitlines()]
    assert any(line.startswith(f"calipers {command}") for line in lines[lines.index("Examples:") :])
    assert max(map(len, lines)) <= 60


@pytest.mark.parametrize("args", [(), ("--help",)])
def test_help_lists_the_commands(calipers: Calipers, args: tuple[str, ...]) -> None:
    result = calipers(*args)
    for command in COMMANDS:
        assert f" {command} " in result.output


def test_no_command_is_a_usage_error(calipers: Calipers) -> None:
    assert calipers().exit_code == 2
    result = calipers("quantise")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "quantise" in result.stderr


@pytest.mark.parametrize(
    ("args", "meant"),
    [
        (("calibrate", "--sheme", "W4A16"), "Did you mean '--scheme'?"),
        (("calibrate", "--activation-obsever=mse"), "Did you mean '--activation-observer'?"),
        (("observers", "--jsn"), "Did you mean '--json'?"),
        (("--versoin",), "Did you mean '--version'?"),
        (("calibrat",), "Did you mean 'calibrate'?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_was_meant_is_named(calipers: Calipers, args: tuple[str, ...], meant: str) -> None:
    result = calipers(*args)
    assert result.exit_code == 2
    assert meant in " ".join(result.stderr.split())


def test_where_nothing_is_near_nothing_is_named(calipers: Calipers) -> None:
    result = calipers("calibrate", "--zzzz")
    assert result.exit_code == 2
    assert "No such option: --zzzz" in result.stderr
    assert "mean" not in result.stderr


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)])
def test_short_help(calipers: Calipers, command: tuple[str, ...]) -> None:
    result = calipers(*command, "-h")
    assert result.exit_code == 0
    assert result.stdout == calipers(*command, "--help").stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_narrow_help_cuts_nothing(
    calipers: Calipers, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = calipers(command, "--help").stdout
    monkeypatch.setenv("COLUMNS", "60")
    narrow = calipers(command, "--help").stdout
    assert "…" not in narrow
    assert max(map(len, narrow.splitlines())) <= 60
    options = {word for word in wide.split() if word.startswith("--")}
    assert options
    assert options <= set(narrow.split())


@pytest.mark.parametrize("command", COMMANDS)
def test_an_interrupt_is_told(
    calipers: Calipers, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    for place in (
        "ways.load_model",
        "compare.load_model",
        "demo.load_model",
        "evaluate.load_model",
        "listings.print_table",
        "doctor.print_table",
        "quantize.SourceCheckpoint",
    ):
        monkeypatch.setattr(f"calipers.cli.{place}", interrupt)
    needed = {"evaluate": [MODEL_PATH], "quantize": ["--dry-run"]}
    result = calipers(command, *needed.get(command, []))
    assert result.exit_code == 130
    assert result.stdout == ""
    assert result.stderr == "interrupted\n"


def test_version(calipers: Calipers) -> None:
    assert calipers("--version").stdout == f"{package.__version__}\n"


def test_the_command_is_installed() -> None:
    scripts = importlib.metadata.entry_points(group="console_scripts", name="calipers")
    assert [script.load() for script in scripts] == [cli.app]


def test_doctor_says_what_is_chosen_and_why(
    calipers: Calipers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CALIPERS_ENGINE")
    found = succeeded(calipers("doctor", "--json"))
    usable = [each["name"] for each in found["engines"] if each["usable"]]
    assert found["engine"] == usable[-1]
    assert found["reason"] == "the fastest one that works here"
    monkeypatch.setenv("CALIPERS_ENGINE", "eager")
    assert succeeded(calipers("doctor", "--json"))["engine"] == "eager"
    text = calipers("doctor")
    assert text.exit_code == 0
    assert is_plain(text.stdout)
    assert "eager: CALIPERS_ENGINE=eager" in " ".join(text.stdout.split())


def test_doctor_refuses_an_engine_that_there_is_not(
    calipers: Calipers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CALIPERS_ENGINE", "warp")
    result = calipers("doctor")
    assert result.exit_code == 1
    assert "engine must be one of eager, native, triton, got 'warp'" in result.stderr
