"""`replacing`: a folder is replaced by a complete one in one step, or not at all."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import re
import shutil
import sys
import time
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from loguru import logger

__all__ = [
    "lock_folder",
    "move_folder",
    "recover",
    "refuse_unwritable",
    "remove_folder",
    "replacing",
]

_YOUNG = 60.0  # seconds in which a folder without a lock may still be about to get one
_LONG = 86400.0  # seconds after which a folder whose name tells no process is nobody's
#: Which machine this is, for folders that several write to.
_HOST = f"{zlib.crc32(platform.node().encode()):08x}"
_MARK = re.compile(r"((?P<pid>\d+)-(?P<host>[0-9a-f]{8}))?[0-9a-f]{8}\.(tmp|old)")
_EXCHANGE = 2  # RENAME_EXCHANGE of Linux, RENAME_SWAP of macOS
_AT_FDCWD = -100
_CANNOT = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM}


@contextmanager
def replacing(place: Path, *, force: bool) -> Iterator[Path]:
    """A new folder beside `place` to write into; it stands at `place` when the block has ended.

    A folder that stood there is exchanged for it in one step on Linux and macOS, and removed then.
    Where the file system cannot do that, it is renamed away first; a process killed just then
    leaves it beside `place`, and `recover` brings it back. On an exception the new folder is
    removed. What killed processes left is removed at the beginning.

    Args:
        place: Where the folder shall stand, without symbolic links. Its parent must exist; if it
            exists itself, it is a folder, whose permissions the new one gets.
        force: Whether a folder that is not empty may be replaced, one that came to be while the
            block ran included.

    Raises:
        OSError: The system refuses, or `place` is not empty and `force` is False.
    """
    recover(place)
    _remove_leftovers(place)
    staging = _beside(place, "tmp")
    lock = None
    try:
        # What will be private is not readable by others meanwhile.
        staging.mkdir(mode=0o700 if place.exists() else 0o777)
        lock = lock_folder(staging)
        yield staging
        move_folder(staging, place, force=force)
    finally:
        remove_folder(staging)
        if isinstance(lock, int):
            os.close(lock)


def recover(place: Path) -> None:
    """Bring back the folder that a killed process had renamed to put another one at `place`.

    Nothing happens where `place` exists, or where a process may still be at work on it.
    """
    if place.exists() or not place.parent.is_dir():
        return
    left = _leftovers(place)
    old = [each for each in left if each.suffix == ".old"]
    if old and not any(_is_held(each) for each in left):
        newest = max(old, key=lambda each: each.stat().st_mtime)
        newest.rename(place)
        logger.warning("{} was missing since a save was killed; it is put back", place)


def refuse_unwritable(place: Path) -> None:
    """Try whether `replacing` could make its folder beside `place`, and move it there.

    Nothing stays, and what killed processes left there is removed. Parents of `place` that are
    missing are not made.

    Raises:
        OSError: Says what cannot be done.
    """
    if place.is_mount():
        raise OSError(
            errno.EBUSY, "is a mount point, which no other folder can replace: choose one inside"
        )
    while not place.parent.exists():
        place = place.parent
    _remove_leftovers(place)
    trial = _beside(place, "tmp")
    trial.mkdir(mode=0o700)
    trial.rmdir()


def move_folder(staging: Path, place: Path, *, force: bool) -> None:
    """Let a complete folder stand at `place`, as at the end of `replacing`.

    A folder that stood there and could be exchanged for it lies at `staging` then.

    Raises:
        OSError: The system refuses, or `place` is not empty and `force` is False.
    """
    if not place.exists():
        staging.rename(place)
        return
    _copy_permissions(place, staging)
    if not force:
        if os.name == "nt":
            place.rmdir()
        staging.rename(place)  # over an empty folder, in one step; fails over any other
        return
    if _exchange(staging, place):
        return  # the old folder now has the staging's name, and is removed as it would be
    aside = _beside(place, "old")
    place.rename(aside)
    try:
        staging.rename(place)
    except BaseException:
        aside.rename(place)
        raise
    remove_folder(aside)


def _copy_permissions(old: Path, new: Path) -> None:
    """Mode bits, and the group where this user may give it; a mode that bars its owner aside."""
    status = old.stat()
    if os.name == "posix":
        with suppress(OSError):
            os.chown(new, -1, status.st_gid)
    new.chmod(status.st_mode & 0o7777)


def remove_folder(folder: Path) -> None:
    """Remove a folder as far as that can be done, one that cannot be written to included."""
    with suppress(OSError):
        folder.chmod(0o700)
    shutil.rmtree(folder, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step; False where the system or the file system cannot."""
    libc: Any = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None
    first, second = os.fsencode(one), os.fsencode(other)
    if sys.platform == "linux" and hasattr(libc, "renameat2"):
        failed = libc.renameat2(_AT_FDCWD, first, _AT_FDCWD, second, _EXCHANGE)
    elif sys.platform == "darwin" and hasattr(libc, "renamex_np"):
        failed = libc.renamex_np(first, second, _EXCHANGE)
    else:
        return False
    if not failed:
        return True
    code = ctypes.get_errno()
    if code in _CANNOT:
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))


def _beside(place: Path, suffix: str) -> Path:
    mark = f"{os.getpid()}-{_HOST}{uuid.uuid4().hex[:8]}"
    return place.with_name(f".{place.name}.{mark}.{suffix}")


def _leftovers(place: Path) -> list[Path]:
    ours = re.compile(re.escape(f".{place.name}.") + _MARK.pattern)
    return [p for p in place.parent.iterdir() if ours.fullmatch(p.name) and p.is_dir()]


def _remove_leftovers(place: Path) -> None:
    """Remove what killed processes left: folders of our names that no running process holds."""
    for folder in _leftovers(place):
        if not _is_held(folder):
            logger.info("removing {}, left by a save that was killed", folder)
            remove_folder(folder)


def _is_held(folder: Path) -> bool:
    """Whether a running process may be at work in a folder of our names.

    A process holds a lock on its folder. Between making and locking it, and where the file system
    has no locks, its number in the folder's name tells.
    """
    lock = lock_folder(folder)
    if lock == "taken":
        return True
    if lock != "unknown":
        os.close(lock)
        with suppress(OSError):
            return time.time() - folder.stat().st_ctime < _YOUNG and _may_be_running(folder)
    return _may_be_running(folder)


def _may_be_running(folder: Path) -> bool:
    """Whether the process that made a folder runs; a process of another machine may always."""
    mark = _MARK.search(folder.name)
    if mark is None or mark["pid"] is None:  # of a version that wrote no numbers
        return time.time() - folder.stat().st_mtime < _LONG
    if mark["host"] != _HOST or os.name != "posix":
        return True
    try:
        os.kill(int(mark["pid"]), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def lock_folder(folder: Path) -> int | Literal["taken", "unknown"]:
    """A descriptor that holds the folder until it is closed or the process ends.

    "taken" where another process holds it, "unknown" where the system or file system cannot tell.
    """
    if sys.platform == "win32":
        return "unknown"
    import fcntl

    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return "unknown"
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        return "taken" if isinstance(error, BlockingIOError) else "unknown"
    return descriptor
