"""A staging folder that outlives a killed process: no step is lost, none is taken for another."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from calipers.checkpoint import journal, replace
from calipers.checkpoint.journal import join_staging, resumable

posix_only = pytest.mark.skipif(os.name != "posix", reason="sends SIGKILL, has locks on folders")


class Stopped(Exception):
    """What a command is left by."""


STEPS = ["one", "two", "three"]

# The two modules alone: torch would take seconds in each of many processes.
LOAD = """
import importlib, sys, types
for name in ("calipers", "calipers.checkpoint"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["calipers"].__path__ = []
sys.modules["calipers.checkpoint"].__path__ = [sys.argv.pop()]
journal = importlib.import_module("calipers.checkpoint.journal")
"""

# Kills itself at the n-th thing that it does to the file system, before or after doing it.
CHILD = """
import os, pathlib, shutil, signal
place, step, after = pathlib.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
done = 0

def deadly(function):
    def wrapped(*args, **kwargs):
        global done
        done += 1
        mine = done == step
        if mine and after == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            return function(*args, **kwargs)
        finally:
            if mine:
                os.kill(os.getpid(), signal.SIGKILL)
    return wrapped

for name in ("mkdir", "rename", "replace", "rmdir", "unlink", "chmod", "fsync"):
    setattr(os, name, deadly(getattr(os, name)))
shutil.rmtree = deadly(shutil.rmtree)
journal.move_folder.__globals__["_exchange"] = deadly(journal.move_folder.__globals__["_exchange"])
worked = []
with journal.resumable(place, {"scheme": "W4A16"}, force=True) as staging:
    for name in ("one", "two", "three"):
        if not staging.done(name):
            worked.append(name)
            write = deadly(lambda path: path.write_text(name * 1000))
            staging.write(name, {f"{name}.txt": write}, note=name)
        assert staging.note(name) == name
    deadly(pathlib.Path.write_text)(staging.folder / "index", "of all")
print(done, *worked)
"""


def run_child(place: Path, step: int, after: str) -> subprocess.CompletedProcess:
    folder = str(Path(journal.__file__).parent)
    return subprocess.run(
        [sys.executable, "-c", LOAD + CHILD, str(place), str(step), after, folder],
        capture_output=True,
        text=True,
        timeout=60,
    )


def content(place: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in place.iterdir()}


WHOLE = {f"{name}.txt": name * 1000 for name in STEPS} | {"index": "of all"}


@posix_only
@pytest.mark.parametrize(
    "old", [None, pytest.param({"one.txt": "old", "other": "old"}, marks=pytest.mark.slow)]
)
def test_killed_at_any_moment_it_goes_on_and_ends_with_the_same_files(tmp_path, old):
    def fill(name):
        folder = tmp_path / name
        folder.mkdir()
        place = folder / "place"
        if old is not None:
            place.mkdir()
            for each, text in old.items():
                (place / each).write_text(text)
        return place

    whole = run_child(fill("whole"), 0, "before")
    assert whole.returncode == 0, whole.stderr
    count, *worked = whole.stdout.split()
    assert worked == STEPS
    moments = int(count)
    assert moments > 20
    fewest = len(STEPS)
    for step in range(1, moments + 1, 1 if old is None else 2):
        after = "before" if step % 4 < 2 else "after"
        place = fill(f"{step}")
        killed = run_child(place, step, after)
        assert killed.returncode == -signal.SIGKILL, (step, killed.stderr)
        if place.exists():
            assert content(place) in (old, WHOLE), step
        again = run_child(place, 0, "before")
        assert again.returncode == 0, (step, again.stderr)
        assert content(place) == WHOLE, step
        assert [path.name for path in place.parent.iterdir()] == ["place"], step
        fewest = min(fewest, len(again.stdout.split()) - 1)
    assert fewest == 0  # killed after the last step nothing is done again


def test_after_an_exception_the_steps_stay_for_the_same_command_alone(tmp_path):
    place = tmp_path / "place"
    with suppress(Stopped), resumable(place, {"a": 1}, force=False) as staging:
        staging.write("one", {"one.bin": lambda path: path.write_bytes(b"1")}, note={"bytes": 1})
        staging.write("state", scratch={"state": lambda path: path.write_bytes(b"x")})
        (staging.folder / "torn").write_text("of no step")
        raise Stopped
    assert not place.exists()
    with resumable(place, {"a": 2}, force=False) as staging:
        assert not staging.done("one")
        with pytest.raises(KeyError, match="one"):
            staging.note("one")
        assert list(staging.folder.iterdir()) == []
        with suppress(Stopped), resumable(place, {"a": 1}, force=False) as first:
            assert first.done("one")
            assert first.note("one") == {"bytes": 1}
            assert (first.scratch / "state").read_bytes() == b"x"
            assert [path.name for path in first.folder.iterdir()] == ["one.bin"]
            raise Stopped
        (staging.folder / "two").write_text("2")
    # the place is written: what was on its way there is nobody's now
    assert [path.name for path in tmp_path.iterdir()] == ["place"]
    assert content(place) == {"two": "2"}


def test_nothing_stays_of_a_block_that_wrote_no_step(tmp_path):
    with suppress(Stopped), resumable(tmp_path / "place", {}, force=False):
        raise Stopped
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", ["missing", "other size", "same size"])
def test_a_step_whose_file_changed_is_not_done(tmp_path, change):
    place = tmp_path / "place"
    with suppress(Stopped), resumable(place, {}, force=False) as staging:
        for name in ("a", "b"):
            staging.write(name, {name: lambda path: path.write_text("12")})
        raise Stopped
    file = staging.folder / "a"
    if change == "missing":
        file.unlink()
    else:
        file.write_text("123" if change == "other size" else "34")
        os.utime(file, ns=(1, 1))
    with resumable(place, {}, force=False) as staging:
        assert not staging.done("a")
        assert staging.done("b")
        assert [path.name for path in staging.folder.iterdir()] == ["b"]


def test_a_step_that_cannot_be_written_is_not_done(tmp_path):
    with resumable(tmp_path / "place", {}, force=False) as staging:

        def fail(path):
            path.write_text("half")
            raise OSError("disk full")

        with pytest.raises(OSError, match="disk full"):
            staging.write("a/b", {"file": fail})
        assert not staging.done("a/b")
        assert list(staging.folder.iterdir()) == []


@posix_only
def test_the_same_command_does_not_run_twice_at_once(tmp_path):
    place = tmp_path / "place"
    with resumable(place, {"a": 1}, force=False) as staging:
        with (
            pytest.raises(OSError, match="another process is running the same command"),
            resumable(place, {"a": 1}, force=False),
        ):
            pass
        other = join_staging(place, {"a": 1})
        other.write("of another rank", {"file": lambda path: path.write_text("1")})
        assert staging.done("of another rank")
    assert content(place) == {"file": "1"}
    with pytest.raises(FileNotFoundError, match="no process"):
        join_staging(place, {"a": 1})


def test_a_place_that_is_taken_meanwhile_is_not_replaced_without_force(tmp_path):
    place = tmp_path / "place"
    with suppress(OSError), resumable(place, {}, force=False) as staging:
        staging.write("a", {"a": lambda path: path.write_text("new")})
        place.mkdir()
        (place / "old").write_text("old")
    assert content(place) == {"old": "old"}
    with resumable(place, {}, force=True) as staging:
        assert staging.done("a")
    assert content(place) == {"a": "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["place"]


@pytest.mark.parametrize("force", [False, True])
def test_a_place_may_be_one_file(tmp_path, force):
    place = tmp_path / "stats.safetensors"
    if force:
        place.write_text("old")
    with resumable(place, {}, force=force, one_file=True) as staging:
        staging.write("batch 1", scratch={"1": lambda path: path.write_text("1")})
        (staging.folder / place.name).write_text("new")
    assert place.read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == [place.name]
    with (
        pytest.raises(FileExistsError, match="meantime"),
        resumable(place, {}, force=False, one_file=True) as staging,
    ):
        (staging.folder / place.name).write_text("newer")
    assert place.read_text() == "new"


def test_saving_leaves_staging_of_killed_commands_alone(tmp_path):
    place = tmp_path / "place"
    with suppress(Stopped), resumable(place, {}, force=False) as staging:
        staging.write("a", {"a": lambda path: path.write_text("1")})
        raise Stopped
    with replace.replacing(place, force=False):
        pass
    with resumable(place, {}, force=True) as staging:
        assert staging.done("a")
