"""Where the native library is kept: a folder that nobody else can put a library into."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import stat
import tempfile
from pathlib import Path

__all__ = ["cache_folder", "distrust", "folder_state"]

_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def cache_folder(*, writable: bool = False) -> tuple[Path, str | None]:
    """The folder for the library, made where it is missing, and why it is not the usual one.

    The usual one is `$CALIPERS_CACHE`, else `calipers` in the user's cache folder. Where another
    user could change what is in it, or it cannot be made, it is a private folder of this process
    that is removed at its end.

    Args:
        writable: Whether a library will be put there: a folder that cannot be written is then
            replaced too.

    Raises:
        OSError: There is no place for a private folder either.
    """
    problem = None
    try:
        folder = Path(_usual_folder())
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        problem = distrust(folder)
        if problem is None and writable and not os.access(folder, os.W_OK | os.X_OK):
            problem = f"{folder} cannot be written"
        if problem is None:
            return folder, None
    except OSError as error:
        problem = f"it cannot be made: {error}"
    folder = _private_folder()
    worse = distrust(folder)
    if worse is not None:
        raise OSError(f"no safe place for the native library: {problem}; {worse}")
    return folder, problem


def folder_state() -> tuple[str, int]:
    """The usual folder, and a number that changes as files come and go."""
    folder = ""
    try:
        folder = _usual_folder()
        return folder, os.stat(folder).st_mtime_ns
    except OSError:
        return folder, 0


def distrust(path: Path) -> str | None:
    """Why another user may change a folder or a file; None where none can.

    It must be this user's and writable by no other. Above it, no folder may let everybody rename
    what is in it, and no symbolic link may be another user's (but for the system's).
    """
    if not hasattr(os, "geteuid"):
        return None
    found = os.lstat(path)
    if stat.S_ISLNK(found.st_mode):
        problem = _distrust_link(path, found)
        if problem is not None:
            return problem
        found = os.stat(path)
    if found.st_uid != os.geteuid():
        return f"{path} is owned by user {found.st_uid}, not by {os.geteuid()}"
    if found.st_mode & _BY_OTHERS:
        return f"{path} can be written by other users: chmod go-w would change that"
    for link in _links_above(path):
        problem = _distrust_link(link, os.lstat(link))
        if problem is not None:
            return problem
    for parent in path.resolve().parents:
        mode = parent.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            return f"everybody can rename folders in {parent}"
    return None


def _distrust_link(path: Path, found: os.stat_result) -> str | None:
    if found.st_uid in (0, os.geteuid()):
        return None
    return f"{path} is a symbolic link of user {found.st_uid}"


def _links_above(path: Path) -> list[Path]:
    return [parent for parent in path.absolute().parents if parent.is_symlink()]


def _usual_folder() -> str:
    asked = os.environ.get("CALIPERS_CACHE")
    if asked:
        return asked
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if home.startswith("~"):
        raise OSError("the user has no home")
    return os.path.join(home, "calipers")


@functools.lru_cache(maxsize=1)
def _private_folder() -> Path:
    folder, owner = Path(tempfile.mkdtemp(prefix="calipers-")), os.getpid()

    def remove() -> None:
        if os.getpid() == owner:  # a forked process must not take it from its parent
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return folder
