"""`replacing`: a folder is replaced by a complete one in one step, or not at all."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loguru import logger

__all__ = ["recover", "replacing"]

_YOUNG = 60.0  # seconds in which a folder without a lock may still be about to get one
_EXCHANGE = 2  # RENAME_EXCHANGE of Linux, RENAME_SWAP of macOS
_AT_FDCWD = -100
_CANNOT = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM}


@contextmanager
def replacing(place: Path) -> Iterator[Path]:
    """A new folder beside `place` to write into; it stands at `place` when the block has ended.

    A folder that stood there is exchanged for it in one step on Linux and macOS, and removed then.
    Where the file system cannot do that, it is renamed away first; a process killed just then
    leaves it beside `place`, and `recover` brings it back. On an exception the new folder is
    removed. What killed processes left is removed at the beginning.

    Args:
        place: Where the folder shall stand, without symbolic links. Its parent must exist; if it
            exists itself, it is a folder, whose permissions the new one gets.
    """
    recover(place)
    _remove_leftovers(place)
    staging = _beside(place, "tmp")
    lock = None
    try:
        staging.mkdir()
        lock = _lock(staging)
        yield staging
        _move(staging, place)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def recover(place: Path) -> None:
    """Bring back the folder that a killed process had renamed to put another one at `place`."""
    if place.exists() or not place.parent.is_dir():
        return
    left = _leftovers(place)
    old = [each for each in left if each.suffix == ".old"]
    if old and not any(_is_held(each) for each in left):
        newest = max(old, key=lambda each: each.stat().st_mtime)
        logger.warning("{} was missing since a save was killed; it is put back", place)
        newest.rename(place)


def _move(staging: Path, place: Path) -> None:
    if not place.exists():
        staging.rename(place)
        return
    staging.chmod(place.stat().st_mode & 0o7777)
    if _exchange(staging, place):
        return  # the old folder now has the staging's name, and is removed as it would be
    aside = _beside(place, "old")
    place.rename(aside)
    try:
        staging.rename(place)
    except BaseException:
        aside.rename(place)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step; False where the system or the file system cannot."""
    libc = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None
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
    return place.with_name(f".{place.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.{suffix}")


def _leftovers(place: Path) -> list[Path]:
    ours = re.compile(re.escape(f".{place.name}.") + r"(\d+-)?[0-9a-f]{8}\.(tmp|old)")
    return [p for p in place.parent.iterdir() if ours.fullmatch(p.name) and p.is_dir()]


def _remove_leftovers(place: Path) -> None:
    """Remove what killed processes left: folders of our names that no running process holds."""
    for folder in _leftovers(place):
        lock = _lock(folder)
        if lock is None:
            continue
        try:
            if not _may_be_in_use(folder):
                logger.info("removing {}, left by a save that was killed", folder)
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(lock)


def _is_held(folder: Path) -> bool:
    lock = _lock(folder)
    if lock is not None:
        os.close(lock)
    return lock is None


def _may_be_in_use(folder: Path) -> bool:
    """Whether a process of the folder's number runs that may not have locked it yet."""
    pid = re.search(r"\.(\d+)-[0-9a-f]{8}\.\w+$", folder.name)
    young = time.time() - folder.stat().st_mtime < _YOUNG
    return young and (pid is None or _is_running(int(pid[1])))


def _is_running(pid: int) -> bool:
    if os.name != "posix":
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def _lock(folder: Path) -> int | None:
    """A descriptor that holds the folder until it is closed or the process ends.

    None where another process holds it, or where nothing can be told.
    """
    if sys.platform == "win32":
        return None
    import fcntl

    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
