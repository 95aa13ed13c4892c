"""The embedded texts: documents to calibrate with, and others to judge by.

Both parts mix English prose, dialogue, source code, tables and prose of other languages. They share
no work; what they were taken from stands in `data/README.md`.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

from calipers._words import check_choice

__all__ = ["Document", "calibration_texts", "heldout_texts", "read_documents"]

_DATA = Path(__file__).parent / "data"
Part: TypeAlias = Literal["calibration", "heldout"]


class Document(NamedTuple):
    """One embedded text and what it is.

    Attributes:
        kind: "prose", "dialogue", "code" or "table".
        language: A code such as "en" or "ja"; for code and tables their notation, such as "python"
            or "csv".
        source: The work it was taken from, as listed in the README beside the data; "written" for a
            text that was written for this project.
        text: The text itself, 0.5 to 14 KB, half of the documents above 5 KB.
    """

    kind: str
    language: str
    source: str
    text: str


def calibration_texts() -> list[str]:
    """Texts to calibrate a language model with, one string per document.

    The kinds alternate, so that the first documents, however many, are a mixture like the whole.
    """
    return [document.text for document in read_documents("calibration")]


def heldout_texts() -> list[str]:
    """Texts to measure with, of other works than `calibration_texts` and mixed as those are."""
    return [document.text for document in read_documents("heldout")]


def read_documents(part: Part) -> list[Document]:
    """Read the documents of one part with their labels.

    Nothing is read before this is called, and nothing is kept afterwards. The documents have a
    fixed order, in which the kinds alternate.

    Raises:
        CalipersError: Another part.

    Example:
        >>> documents = read_documents("heldout")
        >>> sorted({document.kind for document in documents})
        ['code', 'dialogue', 'prose', 'table']
    """
    check_choice("part", part, Part)
    with gzip.open(_DATA / f"{part}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [Document(**json.loads(line)) for line in lines]
