"""Observers of other packages and of files: entry points and `load_plugin`."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from calipers.errors import CalipersError, UnknownObserverError
from calipers.observers import Observer, plugins
from calipers.observers.plugins import load_entry_points, load_plugin

SOURCE = """
from calipers.observers import Observer

@Observer.register("{name}")
class Plugged(Observer):
    'From a file.'

    def get_min_max(self, observed):
        return observed.amin((0, -1)), observed.amax((0, -1))
"""


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No entry point was tried; modules that a test imports are forgotten."""
    monkeypatch.setattr(plugins, "_failures", None)
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.fixture
def offer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Installed packages with these entry points, and modules with this source."""

    def set_entry_points(points: dict[str, str], **sources: str) -> None:
        for name, source in sources.items():
            (tmp_path / f"{name}.py").write_text(source, encoding="utf-8")
        monkeypatch.syspath_prepend(tmp_path)
        info = tmp_path / "others-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: others\nVersion: 1.0\n")
        lines = "\n".join(f"{name} = {value}" for name, value in points.items())
        (info / "entry_points.txt").write_text(f"[calipers.observers]\n{lines}\n")
        assert len(importlib.metadata.entry_points(group="calipers.observers")) == len(points)

    return set_entry_points


def test_a_module_is_imported_when_an_unknown_name_is_asked_for(offer: Callable[..., None]):
    offer({"any": "offered_one"}, offered_one=SOURCE.format(name="plugged_one"))
    Observer.get_value_from_registry("minmax")
    assert "offered_one" not in sys.modules
    assert Observer.get_value_from_registry("plugged_one").__name__ == "Plugged"
    assert "offered_one" in sys.modules


def test_a_class_is_registered_under_the_name_of_its_entry_point(offer: Callable[..., None]):
    source = SOURCE.format(name="plugged_two") + "\nclass Bare(Observer):\n    pass\n"
    offer({"bare_two": "offered_two:Bare", "own": "offered_two:Plugged"}, offered_two=source)
    assert load_entry_points() == []
    assert Observer.get_value_from_registry("bare_two").__name__ == "Bare"
    assert Observer.get_value_from_registry("plugged_two").__name__ == "Plugged"
    with pytest.raises(UnknownObserverError):  # it has a name of its own
        Observer.get_value_from_registry("own")


def test_a_plugin_that_fails_is_named_and_hinders_no_other(offer: Callable[..., None]):
    offer(
        {"broken": "offered_bad", "number": "offered_three:SIZE", "good": "offered_three"},
        offered_bad="import nothing_of_that_name",
        offered_three=SOURCE.format(name="plugged_three") + "SIZE = 3\n",
    )
    assert Observer.get_value_from_registry("plugged_three").__name__ == "Plugged"
    with pytest.raises(UnknownObserverError) as caught:
        Observer.get_value_from_registry("pluged_three")
    message = str(caught.value)
    assert "Did you mean 'plugged_three'?" in message
    assert (
        "plugin 'broken' of others (offered_bad) cannot be loaded: ModuleNotFoundError: No module "
        "named 'nothing_of_that_name'."
    ) in message
    assert "plugin 'number' of others" in message
    assert "expected a module or an Observer class, got int" in message


def test_a_file_runs_once(tmp_path: Path):
    file = tmp_path / "mine.py"
    file.write_text(SOURCE.format(name="plugged_file"), encoding="utf-8")
    module = load_plugin(str(file))
    assert load_plugin(str(file)) is module
    assert Observer.get_value_from_registry("plugged_file") is module.Plugged


def test_a_file_may_have_the_name_of_a_module_that_there_is(tmp_path: Path):
    import json

    file = tmp_path / "json.py"
    file.write_text("VALUE = 7", encoding="utf-8")
    assert load_plugin(str(file)).VALUE == 7
    assert sys.modules["json"] is json


def test_a_module_of_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "beside_me.py").write_text("VALUE = 8", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    assert load_plugin("beside_me").VALUE == 8
    assert sys.path == path


@pytest.mark.parametrize(
    ("plugin", "message"),
    [
        ("none.py", r"^plugin none\.py: no such file$"),
        ("no/such/file", r"^plugin no/such/file: no such file$"),
        ("no_such_module", r"^plugin no_such_module: ModuleNotFoundError: No module named"),
        ("broken.py", r"^plugin broken\.py: ZeroDivisionError: division by zero$"),
        ("wrong.py", r"^plugin wrong\.py: SyntaxError: "),
        ("text/notes.txt", r"^plugin text/notes\.txt: ImportError: .* is no Python file$"),
    ],
)
def test_errors_name_the_plugin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plugin: str, message: str
):
    (tmp_path / "broken.py").write_text("1 / 0", encoding="utf-8")
    (tmp_path / "wrong.py").write_text("def", encoding="utf-8")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "notes.txt").write_text("notes", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CalipersError, match=message):
        load_plugin(plugin)
    assert "broken" not in sys.modules
