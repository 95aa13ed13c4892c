"""`resumable`: a place is replaced by complete files; a killed command goes on where it stopped."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from loguru import logger

from calipers.checkpoint.replace import lock_folder, move_folder, recover, remove_folder

__all__ = ["Staging", "join_staging", "resumable"]

#: Of the layout of a staging folder. Another number is another command.
_VERSION = 1
#: What a file holds that is given to `Staging.write`: called with the path to write to.
Writer = Callable[[Path], object]


class Staging:
    """Files that are on their way to a place, and a journal of the steps that are complete.

    It lies beside the place, under a name that follows from the place and the fingerprint of the
    command. Steps may be written by several threads, and by several processes that `join_staging`,
    each step by one of them.

    Attributes:
        folder: What it holds stands at the place at the end. Files that no step names are removed
            when a command goes on: write through `write`, or at the end what is written anew by
            every run.
        scratch: What it holds is dropped at the end: statistics of a step, say.
    """

    def __init__(self, part: Path) -> None:
        self._part = part
        self._journal = part / "journal"
        self.folder = part / "files"
        self.scratch = part / "scratch"

    def done(self, key: str) -> bool:
        """Whether a step is complete, in this run or in one that was killed."""
        return self._record(key).is_file()

    def note(self, key: str) -> Any:
        """What was noted with a step that is complete.

        Raises:
            KeyError: It is not complete.
        """
        try:
            return json.loads(self._record(key).read_text(encoding="utf-8"))["note"]
        except FileNotFoundError:
            raise KeyError(key) from None

    def write(
        self,
        key: str,
        files: Mapping[str, Writer] | None = None,
        *,
        scratch: Mapping[str, Writer] | None = None,
        note: Any = None,
    ) -> None:
        """Write the files of a step, and then that it is complete.

        Each file is written under a temporary name and renamed when its bytes are on the disk.

        Args:
            key: Name of the step; one that is complete already is written over.
            files: By name in `folder`; each is called with the path to write to.
            scratch: By name in `scratch`.
            note: Anything that JSON holds; `note` gives it back.

        Raises:
            OSError: The system refuses to write. The step is not complete then.
        """
        sizes: dict[str, list[int]] = {}
        for folder, writers in ((self.folder, files or {}), (self.scratch, scratch or {})):
            for name, write in writers.items():
                path = folder / name
                _write_whole(path, write)
                sizes[str(path.relative_to(self._part))] = _mark(path)
        record = json.dumps({"files": sizes, "note": note})
        _write_whole(self._record(key), lambda path: path.write_text(record, encoding="utf-8"))

    def _record(self, key: str) -> Path:
        return self._journal / f"{quote(key, safe=' ')}.json"

    def _settle(self) -> int:
        """Drop what is not whole: steps whose files changed, files of no step; count the steps."""
        for folder in (self._journal, self.folder, self.scratch):
            folder.mkdir(exist_ok=True)
        kept: set[Path] = set()
        steps = 0
        for record in sorted(self._journal.iterdir()):
            marks = _read_marks(record)
            paths = {self._part / name: mark for name, mark in (marks or {}).items()}
            if marks is None or any(_mark(path) != mark for path, mark in paths.items()):
                record.unlink()
            else:
                kept |= paths.keys()
                steps += 1
        for folder in (self.folder, self.scratch):
            for path in sorted(folder.rglob("*"), reverse=True):
                if path.is_dir() and not path.is_symlink():
                    with suppress(OSError):
                        path.rmdir()  # fails where it holds something
                elif path not in kept:
                    path.unlink()
        return steps

    def _is_empty(self) -> bool:
        return not self._journal.is_dir() or not any(self._journal.iterdir())


@contextmanager
def resumable(
    place: Path, fingerprint: Mapping[str, Any], *, force: bool, one_file: bool = False
) -> Iterator[Staging]:
    """A staging folder whose files stand at `place` when the block has ended.

    Where a process was killed inside of the block, or left it by an exception, the steps that it
    had written are found complete by the next one with the same place and fingerprint. What it left
    there is not touched by a command of another fingerprint, until such a one has written `place`.
    While the block runs no other process can enter it.

    Args:
        place: Where the folder shall stand, without symbolic links. Its parent must exist.
        fingerprint: Everything that the files depend on, as JSON holds it: options, the state of
            the source, versions. Steps are never taken over from another one.
        force: Whether what is at `place` may be replaced, as in `replacing`.
        one_file: `place` is a file: that of its name in the staging's folder is moved there, which
            the block must write.

    Raises:
        OSError: Another process is at work on it, the system refuses, or `place` is not empty and
            `force` is False. The steps stay.
    """
    recover(place)
    part = _part_of(place, fingerprint)
    lock = _enter(part, place)
    try:
        staging = Staging(part)
        steps = staging._settle()
        _write_whole(
            part / "fingerprint.json",
            lambda path: path.write_text(_text_of(fingerprint), encoding="utf-8"),
        )
        if steps:
            logger.info("going on after {} steps that are complete in {}", steps, part)
        _tell_of_others(place, part, fingerprint)
        try:
            yield staging
            if one_file:
                _move_file(staging.folder / place.name, place, force=force)
            else:
                move_folder(staging.folder, place, force=force)
        except BaseException:
            if staging._is_empty():
                remove_folder(part)
            else:
                logger.warning("the steps done so far stay in {}: the same command goes on", part)
            raise
        remove_folder(part)
        _remove_others(place)
    finally:
        if lock is not None:
            os.close(lock)


def join_staging(place: Path, fingerprint: Mapping[str, Any]) -> Staging:
    """The staging of a process that is inside of `resumable` now, for others that work with it.

    Nothing is cleaned up or moved here.

    Raises:
        FileNotFoundError: There is none.
    """
    part = _part_of(place, fingerprint)
    if not (part / "journal").is_dir():
        raise FileNotFoundError(errno.ENOENT, "no process has prepared this folder", str(part))
    return Staging(part)


def _part_of(place: Path, fingerprint: Mapping[str, Any]) -> Path:
    digest = hashlib.sha256(_text_of(fingerprint).encode()).hexdigest()[:16]
    return place.with_name(f".{place.name}.{digest}.part")


def _text_of(fingerprint: Mapping[str, Any]) -> str:
    whole = {"version": _VERSION, **fingerprint}
    return json.dumps(whole, indent=2, sort_keys=True) + "\n"


def _enter(part: Path, place: Path) -> int | None:
    """Make and lock a staging folder; None where the file system has no locks."""
    while True:
        # What will be private is not readable by others meanwhile.
        part.mkdir(mode=0o700 if place.exists() else 0o777, exist_ok=True)
        lock = lock_folder(part)
        if lock == "taken":
            raise OSError(
                errno.EBUSY, "another process is running the same command, and works in", str(part)
            )
        if lock == "unknown":
            if part.exists():
                return None
            continue
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), part.stat()):
                return lock
        os.close(lock)  # of a folder that another process removed when it was done


def _write_whole(path: Path, write: Writer) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # The ending stays: some writers go by it.
    temporary = path.with_name(f".writing-{path.name}")
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _mark(path: Path) -> list[int]:
    """What tells a file from another one that stands in its place; [] where there is none."""
    try:
        status = path.stat()
    except OSError:
        return []
    return [status.st_size, status.st_mtime_ns]


def _read_marks(record: Path) -> dict[str, list[int]] | None:
    try:
        return dict(json.loads(record.read_text(encoding="utf-8"))["files"])
    except (ValueError, KeyError, TypeError, OSError):
        return None


def _move_file(file: Path, place: Path, *, force: bool) -> None:
    if force:
        file.replace(place)
        return
    if place.exists():
        raise FileExistsError(errno.EEXIST, "came to be in the meantime", str(place))
    file.rename(place)


def _others(place: Path) -> list[Path]:
    start = f".{place.name}."
    return [
        path
        for path in place.parent.iterdir()
        if path.name.startswith(start)
        and path.name.endswith(".part")
        and len(path.name) == len(start) + len("0123456789abcdef.part")
        and path.is_dir()
    ]


def _tell_of_others(place: Path, part: Path, fingerprint: Mapping[str, Any]) -> None:
    own = json.loads(_text_of(fingerprint))
    for other in _others(place):
        if other == part or Staging(other)._is_empty():
            continue
        with suppress(ValueError, OSError):
            theirs = json.loads((other / "fingerprint.json").read_text(encoding="utf-8"))
            differ = [
                key for key in sorted({*own, *theirs}) if own.get(key, own) != theirs.get(key, own)
            ]
            logger.info(
                "{} was left by another command, which differs in {}: it is not used",
                other,
                ", ".join(differ),
            )


def _remove_others(place: Path) -> None:
    """Remove what killed commands left for a place that now is written."""
    for other in _others(place):
        lock = lock_folder(other)
        if isinstance(lock, int):
            logger.info("removing {}, left by a command that was killed", other)
            shutil.rmtree(other, ignore_errors=True)
            os.close(lock)
