"""The text of a command: a file that was named, or what is embedded where none was."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from calipers.demo import CALIBRATION_TEXT, HELDOUT_TEXT
from calipers.text import read_batches
from calipers.text.files import require
from calipers.text.for_model import is_stream, read_samples
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

    def read(
        self,
        tokenizer: Any,
        sequence_length: int,
        samples: int | None,
        processor: Callable[[], Any] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> TokenizedText:
        """Read it in a model's tokens.

        Args:
            tokenizer: The model's.
            sequence_length: Most tokens of a sequence.
            samples: Most sequences; None takes all.
            processor: Loads the model's processor, asked for where a sample has images, videos or
                sounds; without it, of such samples the text alone is read.
            dtype: The model's, for images and sounds.

        Raises:
            CalipersError: As `read_batches`, or `read_samples`.
        """
        data = self.source if isinstance(self.source, Path) else self.source()
        if processor is None or is_stream(data):
            batches: list[Any] = list(
                read_batches(data, tokenizer, sequence_length=sequence_length, samples=samples)
            )
        else:
            batches = read_samples(
                data,
                tokenizer,
                processor,
                sequence_length=sequence_length,
                samples=samples,
                dtype=dtype,
            )
        return TokenizedText(self.name, batches)


@dataclass(frozen=True)
class TokenizedText:
    """Text in a model's tokens.

    Attributes:
        name: What it is called in output.
        batches: Token ids, shape (batch, tokens) each; of a sample with images, videos or sounds
            all arguments of the model.
    """

    name: str
    batches: list[Any]

    @property
    def sequences(self) -> int:
        """How many sequences it has."""
        return sum(1 if isinstance(each, Mapping) else len(each) for each in self.batches)

    @property
    def tokens(self) -> int:
        """How many tokens of text it has, the places of images among them."""
        ids = (x.get("input_ids") if isinstance(x, Mapping) else x for x in self.batches)
        return sum(each.numel() for each in ids if each is not None)

    @property
    def with_media(self) -> int:
        """How many of the sequences have images, videos or sounds."""
        return sum(isinstance(each, Mapping) for each in self.batches)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "text": self.name,
            "sequences": self.sequences,
            "tokens": self.tokens,
            "with_media": self.with_media,
        }

    def __str__(self) -> str:
        told = f"{self.name}: {self.sequences} sequences, {self.tokens:,} tokens"
        return f"{told}, {self.with_media} with images or sounds" if self.with_media else told


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
