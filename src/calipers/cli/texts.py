"""The text of a command: a file that was named, or what is embedded where none was."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from calipers.demo import CALIBRATION_TEXT, HELDOUT_TEXT
from calipers.text import read_batches
from calipers.text.files import require
from calipers.texts import calibration_texts, heldout_texts

__all__ = ["Text", "TokenizedText", "calibration_text", "heldout_text"]


@dataclass(frozen=True)
class Text:
    """Text that is yet to be read.

    Attributes:
        name: What it is called in output.
        file: Where it is; None for an embedded text.
        part: The embedded text, "calibration" or "heldout", where there is no file.
        given: Whether the user named it.
    """

    name: str
    file: Path | None
    part: str
    given: bool

    def read(self, tokenizer: Any, *, sequence_length: int, samples: int | None) -> TokenizedText:
        """Read it in a model's tokens.

        Raises:
            CalipersError: As `read_batches`.
        """
        data: Path | list[str]
        if self.file is not None:
            data = self.file
        else:
            data = calibration_texts() if self.part == "calibration" else heldout_texts()
        batches = read_batches(data, tokenizer, sequence_length=sequence_length, samples=samples)
        return TokenizedText(self.name, batches)


@dataclass(frozen=True)
class TokenizedText:
    """Text in a model's tokens.

    Attributes:
        name: What it is called in output.
        batches: Token ids, shape (batch, tokens) each.
    """

    name: str
    batches: list[Tensor]

    @property
    def sequences(self) -> int:
        """How many sequences it has."""
        return sum(len(each) for each in self.batches)

    @property
    def tokens(self) -> int:
        """How many tokens it has."""
        return sum(each.numel() for each in self.batches)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"text": self.name, "sequences": self.sequences, "tokens": self.tokens}

    def __str__(self) -> str:
        return f"{self.name}: {self.sequences} sequences, {self.tokens:,} tokens"


def calibration_text(given: Path | None, *, demo: bool = False) -> Text:
    """Text to calibrate with: the file that was given, that of the demo model, or the embedded one.

    Raises:
        CalipersError: There is no such file.
    """
    return _text(given, "calibration", CALIBRATION_TEXT if demo else None)


def heldout_text(given: Path | None, *, demo: bool = False) -> Text:
    """Text to judge by, of other sources than `calibration_text`.

    Raises:
        CalipersError: There is no such file.
    """
    return _text(given, "heldout", HELDOUT_TEXT if demo else None)


def _text(given: Path | None, part: str, of_demo: Path | None) -> Text:
    if given is not None:
        require(given)
        return Text(str(given), given, part, given=True)
    words = {"calibration": "calibration text", "heldout": "held-out text"}[part]
    if of_demo is not None:
        return Text(f"the demo model's {words}", of_demo, part, given=False)
    return Text(f"embedded {words}", None, part, given=False)
