"""Replacing a folder: whatever is killed, and whenever, the old or the new one stands there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from calipers.checkpoint import replace
from calipers.checkpoint.replace import recover, refuse_unwritable, replacing

posix_only = pytest.mark.skipif(os.name != "posix", reason="sends SIGKILL, reads permissions")

# The module alone: torch would take seconds in each of many processes.
LOAD = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("replace_alone", sys.argv.pop())
replace = importlib.util.module_from_spec(spec)
spec.loader.exec_module(replace)
"""

# Kills itself at the n-th thing that it does to the file system, before or after doing it.
CHILD = """
import os, shutil, signal, sys
from pathlib import Path

place, step, after, exchange = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
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

if exchange == "without":
    replace._exchange = lambda one, other: False
else:
    replace._exchange = deadly(replace._exchange)
for name in ("mkdir", "rename", "replace", "rmdir", "unlink", "chmod"):
    setattr(os, name, deadly(getattr(os, name)))
shutil.rmtree = deadly(shutil.rmtree)
replace._copy_permissions = deadly(replace._copy_permissions)
with replace.replacing(place, force=True) as folder:
    for name in ("one", "two"):
        deadly(Path.write_text)(folder / name, "new")
print(done)
"""


def run_child(place: Path, step: int, after: str, exchange: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [
            sys.executable,
            "-c",
            LOAD + CHILD,
            str(place),
            str(step),
            after,
            exchange,
            replace.__file__,
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )


def fill(folder: Path, text: str) -> Path:
    folder.mkdir()
    for name in ("one", "two"):
        (folder / name).write_text(text)
    return folder


def content(folder: Path) -> set[str]:
    assert sorted(p.name for p in folder.iterdir()) == ["one", "two"]
    return {p.read_text() for p in folder.iterdir()}


def write(place: Path, text: str = "newest", *, force: bool = True) -> None:
    with replacing(place, force=force) as folder:
        for name in ("one", "two"):
            (folder / name).write_text(text)


@posix_only
@pytest.mark.parametrize("exchange", ["with", "without"])
def test_killed_at_any_step_the_old_or_the_new_folder_is_complete(tmp_path, exchange):
    whole = run_child(fill(tmp_path / "whole", "old"), 0, "before", exchange)
    assert whole.returncode == 0, whole.stderr
    steps = int(whole.stdout)
    assert steps >= 6
    seen = set()
    for step in range(1, steps + 1):
        for after in ("before", "after"):
            folder = tmp_path / f"{step}-{after}"
            folder.mkdir()
            place = fill(folder / "place", "old")
            killed = run_child(place, step, after, exchange)
            assert killed.returncode == -signal.SIGKILL, (step, killed.stderr)
            if exchange == "with":
                assert place.is_dir(), step
            else:
                recover(place)
            found = content(place)
            assert found in ({"old"}, {"new"}), (step, after)
            seen |= found
            write(place)
            assert content(place) == {"newest"}
            assert [p.name for p in folder.iterdir()] == ["place"], (step, after)
    assert seen == {"old", "new"}


@posix_only
def test_a_missing_folder_is_put_back(tmp_path):
    dead = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True
    )
    name = f".place.{int(dead.stdout)}-{replace._HOST}01234567.old"
    fill(tmp_path / name, "old")
    recover(tmp_path / "place")
    assert content(tmp_path / "place") == {"old"}


@posix_only
def test_nothing_is_put_back_while_another_process_is_at_work(tmp_path):
    child = hold(str(tmp_path / "place"))
    try:
        staging = Path(child.stdout.readline().strip())
        aside = staging.with_name(staging.name.replace(".tmp", ".old"))
        fill(aside, "old")
        recover(tmp_path / "place")
        assert not (tmp_path / "place").exists()
    finally:
        child.kill()
        child.communicate()


def hold(place: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", LOAD + HOLDER, place, replace.__file__],
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
        text=True,
    )


HOLDER = """
import sys
from pathlib import Path
with replace.replacing(Path(sys.argv[1]), force=True) as folder:
    (folder / "one").write_text("theirs")
    print(folder, flush=True)
    sys.stdin.readline()
"""


@posix_only
def test_the_folder_of_a_concurrent_save_stays(tmp_path):
    place = tmp_path / "place"
    child = hold(str(place))
    try:
        staging = Path(child.stdout.readline().strip())
        os.utime(staging, (0, 0))  # not by its age
        write(place)
        assert (staging / "one").read_text() == "theirs"
        child.stdin.write("\n")
        child.stdin.flush()
        child.wait(30)
    finally:
        child.kill()
        child.communicate()
    assert [p.read_text() for p in place.iterdir()] == ["theirs"]
    assert [p.name for p in tmp_path.iterdir()] == ["place"]


@posix_only
def test_leftovers_of_a_killed_process_are_removed_and_others_stay(tmp_path):
    child = hold(str(tmp_path / "place"))
    staging = Path(child.stdout.readline().strip())
    child.kill()
    child.communicate()
    assert staging.is_dir()
    old = fill(tmp_path / ".place.0123abcd.tmp", "of a version without numbers")
    os.utime(old, (0, 0))
    others = [".place.mine.tmp", ".other.0123abcd.tmp", ".place", "place.0123abcd.tmp"]
    for name in others:
        (tmp_path / name).mkdir()
    (tmp_path / ".place.0123abce.tmp").write_text("a file")
    write(tmp_path / "place")
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"place", ".place.0123abce.tmp", *others}


@posix_only
def test_where_there_are_no_locks_the_process_tells(tmp_path, monkeypatch):
    monkeypatch.setattr(replace, "lock_folder", lambda folder: "unknown")
    dead = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True
    )
    mine = tmp_path / f".place.{os.getpid()}-{replace._HOST}01234567.tmp"
    theirs = tmp_path / f".place.{int(dead.stdout)}-00000000{'0' * 8}.tmp"
    gone = tmp_path / f".place.{int(dead.stdout)}-{replace._HOST}01234567.tmp"
    for each in (mine, theirs, gone):
        each.mkdir()
    write(tmp_path / "place")
    assert (mine.exists(), theirs.exists(), gone.exists()) == (True, True, False)


@posix_only
@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("mode", [0o700, 0o750, 0o777, 0o2755, 0o555])
def test_permissions_stay(tmp_path, mode, exchange, monkeypatch):
    if not exchange:
        monkeypatch.setattr(replace, "_exchange", lambda one, other: False)
    place = fill(tmp_path / "place", "old")
    place.chmod(mode)
    write(place)
    assert place.stat().st_mode & 0o7777 == mode
    assert content(place) == {"newest"}
    assert [p.name for p in tmp_path.iterdir()] == ["place"]


@posix_only
def test_an_empty_folder_keeps_its_permissions(tmp_path):
    place = tmp_path / "place"
    place.mkdir(mode=0o700)
    write(place, force=False)
    assert place.stat().st_mode & 0o7777 == 0o700
    assert content(place) == {"newest"}


@posix_only
def test_a_private_folder_is_private_while_it_is_written(tmp_path):
    place = fill(tmp_path / "place", "old")
    place.chmod(0o700)
    with replacing(place, force=True) as folder:
        assert folder.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("before", ["missing", "empty"])
def test_without_force_a_folder_that_came_to_be_meanwhile_stays(tmp_path, before):
    place = tmp_path / "place"
    if before == "empty":
        place.mkdir()
    context = replacing(place, force=False)
    (context.__enter__() / "one").write_text("new")
    place.mkdir(exist_ok=True)
    (place / "theirs").write_text("theirs")
    with pytest.raises(OSError, match="not empty"):
        context.__exit__(None, None, None)
    assert [p.name for p in tmp_path.rglob("*")] == ["place", "theirs"]


@pytest.mark.skipif(sys.platform not in ("linux", "darwin"), reason="no exchange in one step")
def test_this_system_exchanges_in_one_step(tmp_path):
    one, other = fill(tmp_path / "a", "1"), fill(tmp_path / "b", "2")
    assert replace._exchange(one, other)
    assert (content(one), content(other)) == ({"2"}, {"1"})


def test_an_exception_leaves_all_as_it_was(tmp_path):
    place = fill(tmp_path / "place", "old")
    with pytest.raises(KeyError), replacing(place, force=True) as folder:
        raise KeyError((folder / "one").write_text("new"))
    assert content(place) == {"old"}
    assert [p.name for p in tmp_path.iterdir()] == ["place"]


class TestRefuseUnwritable:
    def test_nothing_stays_where_it_can_be_written(self, tmp_path):
        refuse_unwritable(tmp_path / "a" / "b")
        refuse_unwritable(fill(tmp_path / "c", "old"))
        assert sorted(p.name for p in tmp_path.iterdir()) == ["c"]

    @posix_only
    def test_what_a_process_left_that_was_killed_at_it_is_removed(self, tmp_path):
        dead = subprocess.run(
            [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True
        )
        name = f".place.{{}}-{replace._HOST}01234567.tmp"
        gone, mine = (tmp_path / name.format(pid) for pid in (int(dead.stdout), os.getpid()))
        for each in (gone, mine):
            each.mkdir()
        refuse_unwritable(tmp_path / "place")
        assert [p.name for p in tmp_path.iterdir()] == [mine.name]

    def test_a_file_among_the_parents(self, tmp_path):
        (tmp_path / "file").write_text("mine")
        with pytest.raises(OSError, match=r"Not a directory|cannot find"):
            refuse_unwritable(tmp_path / "file" / "out")

    def test_a_name_that_is_too_long(self, tmp_path):
        # the name itself would fit, that of the folder beside it does not
        with pytest.raises(OSError, match="name too long"):
            refuse_unwritable(tmp_path / ("n" * 250))

    @pytest.mark.skipif(sys.platform != "linux", reason="/proc, where nobody can write")
    def test_a_place_where_nobody_can_write(self):
        with pytest.raises(OSError, match="proc"):
            refuse_unwritable(Path("/proc/out"))
        with pytest.raises(OSError, match="mount point"):
            refuse_unwritable(Path("/proc"))

    @pytest.mark.skipif(os.name != "posix" or os.getuid() == 0, reason="nothing bars root")
    def test_a_parent_without_permission(self, tmp_path):
        tmp_path.chmod(0o500)
        try:
            with pytest.raises(PermissionError):
                refuse_unwritable(tmp_path / "out")
        finally:
            tmp_path.chmod(0o700)


def test_an_old_lock_free_folder_of_this_process_counts_as_left(tmp_path, monkeypatch):
    left = tmp_path / f".place.{os.getpid()}-{replace._HOST}01234567.tmp"
    left.mkdir()
    write(tmp_path / "place")
    assert left.exists()  # so young that it may not be locked yet
    monkeypatch.setattr(replace, "_YOUNG", 0.0)
    time.sleep(0.02)
    write(tmp_path / "place")
    assert not left.exists()
