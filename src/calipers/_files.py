"""`replacing`: a file that is there as a whole, or as it was before."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["replacing"]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A place beside a file, for a block that writes it there.

    Once the block is done, what it wrote is on the disk and takes the place of the file in one
    step; where it fails, nothing of it stays.

    Raises:
        OSError: It cannot be written.
    """
    beside = path.with_name(f".{path.name}.tmp")
    try:
        yield beside
        with beside.open("rb+") as written:
            os.fsync(written.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
