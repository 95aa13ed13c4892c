"""Datasets of the package `datasets`: those in memory, and folders that it saved."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from calipers.errors import CalipersError
from calipers.text.extra import import_extra
from calipers.text.samples import Sample, text_columns

__all__ = ["dataset_columns", "is_dataset", "iterate_dataset", "open_saved", "saved_split"]

_CLASSES = ("Dataset", "IterableDataset", "DatasetDict", "IterableDatasetDict")
#: One of them lies in every folder that `save_to_disk` writes.
_MARKS = ("dataset_dict.json", "state.json")


def is_dataset(value: object) -> bool:
    """Whether a value is of one of the package's classes; the package is not imported for it."""
    package = sys.modules.get("datasets")
    kinds = (getattr(package, name, None) for name in _CLASSES)
    return isinstance(value, tuple(kind for kind in kinds if isinstance(kind, type)))


def dataset_columns(dataset: Any) -> list[str]:
    """Columns of a dataset, of the first split where it has several; none where it cannot tell."""
    if isinstance(dataset, Mapping):
        dataset = next(iter(dataset.values()), None)
    return list(getattr(dataset, "column_names", None) or ())


def saved_split(path: Path) -> tuple[Path, str | None] | None:
    """The folder that `save_to_disk` wrote and the split meant by a path; None for other paths."""
    if path.is_dir():
        return (path, None) if any((path / mark).is_file() for mark in _MARKS) else None
    head, colon, split = str(path).rpartition(":")
    if colon and split and not path.exists() and Path(head).is_dir():
        return Path(head), split
    return None


def open_saved(folder: Path, split: str | None, media: Sequence[str] = ()) -> Iterator[Sample]:
    """Iterate over a folder that `save_to_disk` wrote; its files are mapped, not read whole.

    Raises:
        CalipersError: `datasets` is not installed, the folder cannot be read, there is no such
            split, or no column holds samples.
    """
    datasets = import_extra("datasets", "a saved dataset")
    try:
        dataset = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise CalipersError(f"{folder}: no dataset that can be loaded: {error}") from None
    return iterate_dataset(dataset, str(folder), split, media)


def iterate_dataset(
    dataset: Any, name: str, split: str | None = None, media: Sequence[str] = ()
) -> Iterator[Sample]:
    """Iterate over the rows of a dataset, as plain Python values.

    Of several splits None takes "train", or the only one. `name` is what errors call the dataset.
    Columns of `media` are kept beside those of text, and make up for them.

    Raises:
        CalipersError: There is no such split (lists them), or no column holds samples.
    """
    if isinstance(dataset, Mapping):
        wanted = split or ("train" if len(dataset) != 1 else next(iter(dataset)))
        if wanted not in dataset:
            raise CalipersError(
                f"{name}: no split {wanted!r}; it has {', '.join(map(str, dataset)) or 'none'}"
            )
        dataset, name = dataset[wanted], f"{name}:{wanted}"
    elif split is not None:
        raise CalipersError(f"{name}: is one dataset without splits, so there is no {split!r}")
    columns = dataset_columns(dataset)
    if columns:  # a streamed one may not know before its first row
        kept = [each for each in columns if each in media]
        dataset = dataset.select_columns(kept + text_columns(columns, name, needed=not kept))
    rows = dataset.with_format(None)
    return (Sample(row, f"{name}, row {number}") for number, row in enumerate(rows, start=1))
