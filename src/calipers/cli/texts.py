"""The text of a command: a file that was named, or what is embedded where none was."""

from __future__ import annotations

from collections.abc import Callable
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
        source: Its file; or, for an embedded text, the function that reads its documents.
        given: Whether the user named it.
    """

    name: str
    source: Path | Callable[[], list[str]]
    given: bool

    def read(self, tokenizer: Any, sequence_length: int, samples: int | None) -> TokenizedText:
        """Read it in a model's tokens.

        Raises:
            CalipersError: As `read_batches`.
        """
        data = self.source if isinstance(self.source, Path) else self.source()
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
    return _text(given, "calibration text", CALIBRATION_TEXT if demo else calibration_texts)


def heldout_text(given: Path | None, *, demo: bool = False) -> Text:
    """Text to judge by, of other sources than `calibration_text`; otherwise as that."""
    return _text(given, "held-out text", HELDOUT_TEXT if demo else heldout_texts)


def _text(given: Path | None, words: str, source: Path | Callable[[], list[str]]) -> Text:
    if given is not None:
        require(given)
        return Text(str(given), given, given=True)
    whose = "the demo model's" if isinstance(source, Path) else "embedded"
    return Text(f"{whose} {words}", source, given=False)
