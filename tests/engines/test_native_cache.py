"""The library in the cache: damaged ones are built anew, and those of others are never loaded."""

from __future__ import annotations

import ctypes
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from calipers.cli import app
from calipers.engines import dispatch
from calipers.engines.native import build, cache


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound library, compiled once."""
    folder = tmp_path_factory.mktemp("compiled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CALIPERS_CACHE", str(folder))
        forget()
        build.library()
    forget()
    (made,) = folder.iterdir()
    return made


def forget() -> None:
    for cached in (build.library, build.compiler, build._is_there, cache._private_folder):
        cached.cache_clear()
    dispatch._warn_once.cache_clear()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache."""
    monkeypatch.setattr(dispatch, "_failures", {})
    monkeypatch.setattr(build, "_failed_compiler", None)
    monkeypatch.delenv("CALIPERS_ENGINE", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    place = tmp_path / "cache"
    place.mkdir(mode=0o700)
    monkeypatch.setenv("CALIPERS_CACHE", str(place))
    forget()
    yield place
    forget()


@pytest.fixture
def building(compiled: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Compiling copies the library that is there; the list says how often."""
    calls: list[str] = []

    def copy(command: str, made: Path) -> None:
        calls.append(command)
        made.write_bytes(compiled.read_bytes())

    monkeypatch.setattr(build, "_compile", copy)
    return calls


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """What was loaded into this process."""
    paths: list[Path] = []
    real = ctypes.CDLL

    def load(path: str) -> ctypes.CDLL:
        paths.append(Path(path))
        return real(path)

    monkeypatch.setattr(build, "ctypes", SimpleNamespace(CDLL=load))
    return paths


def doctor() -> tuple[dict, str]:
    found = CliRunner().invoke(app, ["doctor", "--json"], catch_exceptions=False)
    text = CliRunner().invoke(app, ["doctor"], catch_exceptions=False)
    return json.loads(found.stdout), " ".join(text.stdout.split())


def damage(made: Path, how: str) -> None:
    content = made.read_bytes()
    changed = {
        "truncated": content[: len(content) // 2],
        "empty": b"",
        "junk": b"junk" * 1000,
        "one byte": content[:-1] + bytes([content[-1] ^ 1]),
    }
    made.write_bytes(changed[how])


@pytest.mark.parametrize("how", ["truncated", "empty", "junk", "one byte"])
def test_a_damaged_library_is_built_anew(
    how: str, folder: Path, compiled: Path, building: list[str], loaded: list[Path]
) -> None:
    there = folder / compiled.name
    there.write_bytes(compiled.read_bytes())
    damage(there, how)
    assert not build.is_built()
    build.library().min_max  # noqa: B018  the symbol is there
    assert len(building) == 1
    assert loaded == [there]
    assert there.read_bytes() == compiled.read_bytes()


def test_a_sound_library_is_only_loaded(
    folder: Path, compiled: Path, building: list[str], loaded: list[Path]
) -> None:
    (folder / compiled.name).write_bytes(compiled.read_bytes())
    assert build.is_built()
    build.library()
    assert loaded == [folder / compiled.name]
    assert not building


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("exit 0", "wrote no library"),
        (': > "$out"', "wrote an empty file"),
        ('echo junk > "$out"', "cannot be loaded"),
        ('head -c 5000 "$GOOD" > "$out"', "cannot be loaded"),
    ],
    ids=["nothing", "empty", "junk", "truncated"],
)
def test_a_compiler_that_lies(
    script: str,
    told: str,
    folder: Path,
    compiled: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    loaded: list[Path],
) -> None:
    liar = tmp_path / "liar"
    liar.write_text(
        '#!/bin/sh\nwhile [ $# -gt 0 ]; do [ "$1" = -o ] && out=$2; shift; done\n' + script + "\n"
    )
    liar.chmod(0o755)
    monkeypatch.setenv("CXX", str(liar))
    monkeypatch.setenv("GOOD", str(compiled))
    report, _ = doctor()
    (native,) = [each for each in report["engines"] if each["name"] == "native"]
    assert not native["usable"]
    assert told in native["why"]
    assert report["engine"] == "eager"
    assert not loaded
    assert list(folder.iterdir()) == []
    # With a compiler that works the engine is there again, in the same process.
    monkeypatch.delenv("CXX")
    monkeypatch.setattr(
        build, "_compile", lambda command, made: made.write_bytes(compiled.read_bytes()) and None
    )
    assert dispatch.native_problem(torch.device("cpu")) is None
    build.library()
    assert build.is_built()


def assert_built_elsewhere(
    folder: Path, told: str, building: list[str], loaded: list[Path]
) -> None:
    build.library()
    (made,) = loaded
    assert len(building) == 1
    assert folder not in made.parents
    assert made.parent.stat().st_uid == os.geteuid()
    assert stat.S_IMODE(made.parent.stat().st_mode) == 0o700
    report, text = doctor()
    assert report["cache"]["folder"] == str(made.parent)
    assert told in report["cache"]["problem"]
    assert told in text
    assert len(building) == 1


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777, 0o1777])
def test_a_folder_that_others_can_write(
    mode: int, folder: Path, compiled: Path, building: list[str], loaded: list[Path]
) -> None:
    (folder / compiled.name).write_bytes(compiled.read_bytes())
    folder.chmod(mode)
    assert_built_elsewhere(folder, "can be written by other users", building, loaded)


def test_a_library_that_others_can_write(
    folder: Path, compiled: Path, building: list[str], loaded: list[Path]
) -> None:
    there = folder / compiled.name
    there.write_bytes(compiled.read_bytes())
    there.chmod(0o666)
    assert not build.is_built()
    build.library()
    assert len(building) == 1
    assert not stat.S_IMODE(there.stat().st_mode) & 0o022


def test_a_link_in_place_of_a_library(
    folder: Path, compiled: Path, building: list[str], loaded: list[Path]
) -> None:
    (folder / compiled.name).symlink_to(compiled)
    assert not build.is_built()
    build.library()
    assert len(building) == 1
    assert not (folder / compiled.name).is_symlink()


root = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give files away"
)


@root
def test_a_folder_of_another_user(
    folder: Path, compiled: Path, building: list[str], loaded: list[Path]
) -> None:
    (folder / compiled.name).write_bytes(compiled.read_bytes())
    os.chown(folder, 12345, 12345)
    assert_built_elsewhere(folder, "is owned by user 12345", building, loaded)


@root
def test_a_library_of_another_user(
    folder: Path, compiled: Path, building: list[str], loaded: list[Path]
) -> None:
    there = folder / compiled.name
    there.write_bytes(compiled.read_bytes())
    os.chown(there, 12345, 12345)
    build.library()
    assert len(building) == 1
    assert there.stat().st_uid == os.geteuid()


@root
def test_a_symlink_of_another_user(
    folder: Path,
    compiled: Path,
    building: list[str],
    loaded: list[Path],
    tmp_path: Path,
    monkeypatch,
) -> None:
    (folder / compiled.name).write_bytes(compiled.read_bytes())
    link = tmp_path / "link"
    link.symlink_to(folder)
    os.chown(link, 12345, 12345, follow_symlinks=False)
    monkeypatch.setenv("CALIPERS_CACHE", str(link))
    assert_built_elsewhere(folder, "is a symbolic link of user 12345", building, loaded)


def test_a_fallback_beside_what_others_left_in_the_shared_temporary_folder(
    folder: Path,
    compiled: Path,
    building: list[str],
    loaded: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The cache cannot be made; a folder of the old fixed kind in the temporary one is no place."""
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    planted = shared / "calipers"
    planted.mkdir()
    planted.chmod(0o777)
    (planted / compiled.name).write_bytes(compiled.read_bytes())
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.delenv("CALIPERS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    monkeypatch.setenv("TMPDIR", str(shared))
    assert_built_elsewhere(planted, "cannot be made", building, loaded)
    assert loaded[0].parent.parent == shared
    # A shared folder without the sticky bit: everybody could put another in its place.
    shared.chmod(0o777)
    forget()
    with pytest.raises(build.BuildError, match="no safe place"):
        build.library()


def test_doctor_tells_the_folder(folder: Path, building: list[str]) -> None:
    report, text = doctor()
    assert report["cache"] == {"folder": str(folder), "problem": None}
    assert str(folder) in text
