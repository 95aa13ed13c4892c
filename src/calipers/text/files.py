"""`open_samples`: the samples of a file or of a saved dataset, one after the other."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from calipers.errors import CalipersError
from calipers.text.datasets import open_saved, saved_split
from calipers.text.extra import import_extra
from calipers.text.samples import Sample, is_sample, text_columns

__all__ = ["decode", "open_samples", "require"]

#: Rows that are read at once.
_ROWS = 64
#: What pyarrow's own errors derive from.
_ARROW_ERRORS = (ValueError, OSError, NotImplementedError)
#: Longest field of a .csv file; the module's own limit of 128 KiB is short for a text.
_FIELD = 2**30


def open_samples(path: Path, media: Sequence[str] = ()) -> Iterator[Sample]:
    """Iterate over the samples of a path; no more of it is read than is asked for (but of .json).

    Args:
        path: .jsonl, .json, .csv or .parquet, or a folder that `datasets` saved, where a split
            other than "train" is written behind a colon: "folder:test".
        media: Columns of a saved dataset that are kept beside those of text.

    Raises:
        CalipersError: No such file, of another kind, not UTF-8, or not what its name says.
    """
    require(path)
    saved = saved_split(path)
    if saved is not None:
        return open_saved(*saved, media)
    return _READERS[path.suffix.lower()](path)


def require(path: Path) -> None:
    """Refuse a path that is neither .txt nor of a kind that `open_samples` reads.

    Raises:
        CalipersError: No such file, or of another kind.
    """
    if saved_split(path) is not None:
        return
    if not path.exists():
        raise CalipersError(f"{path}: no such file")
    if not path.is_file() or path.suffix.lower() not in (".txt", *_READERS):
        raise CalipersError(
            f"{path}: expected a .txt, {', '.join(sorted(_READERS))} file, or a folder saved by "
            "datasets' save_to_disk"
        )


def decode(data: bytes, path: Path, position: int = 0) -> str:
    """UTF-8 to text, without the mark that some editors put at the beginning of a file.

    Raises:
        CalipersError: Names the file and the byte; `position` is that of the data in the file.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = data[error.start]
        raise CalipersError(
            f"{path}: not UTF-8: byte 0x{byte:02x} at position {position + error.start}; "
            "save the file as UTF-8"
        ) from None
    return text.removeprefix("\ufeff") if position == 0 else text


def _lines(path: Path) -> Iterator[str]:
    position = 0
    with path.open("rb") as file:
        for line in file:
            yield decode(line, path, position)
            position += len(line)


def _read_jsonl(path: Path) -> Iterator[Sample]:
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise CalipersError(f"{where}: not JSON: {error}") from None
            yield Sample(value, where)


def _read_json(path: Path) -> Iterator[Sample]:
    try:
        value = json.loads(decode(path.read_bytes(), path))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # one object a line under this name, as `datasets` writes it
            yield from _read_jsonl(path)
            return
        raise CalipersError(f"{path}, line {error.lineno}: not JSON: {error}") from None
    entries = value.get("data", value) if isinstance(value, dict) else value
    if is_sample(entries):
        entries = [entries]
    if not isinstance(entries, list):
        raise CalipersError(
            f"{path}: expected a list of samples, or an object with such a list under 'data'"
        )
    for number, entry in enumerate(entries, start=1):
        yield Sample(entry, f"{path}, sample {number}")


def _read_csv(path: Path) -> Iterator[Sample]:
    rows = csv.reader(_lines(path), strict=True)
    columns = _next_row(rows, path)
    if columns is None:
        return
    text_columns(columns, str(path))
    while True:
        first = rows.line_num + 1
        row = _next_row(rows, path)
        if row is None:
            return
        where = f"{path}, line {first}"
        if row and len(row) != len(columns):
            raise CalipersError(
                f"{where}: expected {len(columns)} fields, got {len(row)}; "
                "put a text with commas into double quotes"
            )
        if row:
            yield Sample(dict(zip(columns, row, strict=True)), where)


def _next_row(rows: Any, path: Path) -> list[str] | None:
    # The limit is one of the whole process: it is put back before anybody else can read.
    limit = csv.field_size_limit(_FIELD)
    try:
        row: list[str] | None = next(rows, None)
    except csv.Error as error:
        raise CalipersError(f"{path}, line {rows.line_num}: not CSV: {error}") from None
    finally:
        csv.field_size_limit(limit)
    return row


def _read_parquet(path: Path) -> Iterator[Sample]:
    parquet = import_extra("pyarrow.parquet", "a .parquet file")
    try:
        file = parquet.ParquetFile(path)
    except _ARROW_ERRORS as error:
        raise CalipersError(f"{path}: not a parquet file: {error}") from None
    with file:
        columns = text_columns(file.schema_arrow.names, str(path))
        number = 0
        for rows in _tables(file, columns, path):
            for row in rows.to_pylist():
                number += 1
                yield Sample(row, f"{path}, row {number}")


def _tables(file: Any, columns: list[str], path: Path) -> Iterator[Any]:
    try:
        yield from file.iter_batches(batch_size=_ROWS, columns=columns)
    except _ARROW_ERRORS as error:
        raise CalipersError(f"{path}: cannot be read: {error}") from None


_READERS: dict[str, Callable[[Path], Iterator[Sample]]] = {
    ".csv": _read_csv,
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
