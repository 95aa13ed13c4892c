"""`Samples`: tokens of a module's values that observers are judged by, of batches held out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import NamedTuple

import torch
from torch import Tensor

from calipers.grouping import ATTENTION_NAMES
from calipers.memory import plain_tensor
from calipers.observers.hooks import Seen

__all__ = ["TOKENS", "Sample", "Samples", "is_held_out"]

#: Tokens kept of each value.
TOKENS = 64
#: Batches that they are taken from, at most.
_CHUNKS = 16
#: One batch in so many is held out.
_EVERY = 8


def is_held_out(number: int) -> bool:
    """Whether a batch is held out, by its number from 0: the second, the tenth, and so on.

    The second rather than the last: how many there will be is not known of a generator.
    """
    return number % _EVERY == 1


class Sample(NamedTuple):
    """Tokens of one value.

    Args:
        tokens: Shape (tokens, features), of an attention state (tokens, heads, head_dim).
        held_out: Whether they are of batches that no observer saw.
    """

    tokens: Tensor
    held_out: bool


@dataclass
class _Kept:
    """Tokens of one side: a chunk of each batch, or of every second, fourth ... of very many."""

    held_out: bool
    most: int = TOKENS
    chunks: list[Tensor] = field(default_factory=list)
    _batches: int = 0
    _stride: int = 1

    def add(self, tokens: Tensor) -> None:
        self._batches += 1
        if (self._batches - 1) % self._stride:
            return
        self.chunks.append(tokens)
        if len(self.chunks) > _CHUNKS:
            self.chunks = self.chunks[::2]
            self._stride *= 2
        most = self.most // len(self.chunks)
        self.chunks = [_spread(each, most) for each in self.chunks]


class Samples:
    """Tokens of the values of one module, by side, evenly spread over the batches held out.

    Until a batch that is held out shows a value, tokens of the first that the observers saw stand
    in for it. Where none is held out, tokens are of the first batch and of those that would be.

    Args:
        sides: The sides whose tokens are wanted.
        holds_out: Whether batches are held out; without it a quarter of the tokens is kept.

    Attributes:
        held_out: Whether the batch that runs is held out.
    """

    def __init__(self, sides: Iterable[str], *, holds_out: bool = True) -> None:
        self.held_out = False
        self._takes_all = False
        self._holds_out = holds_out
        self._most = TOKENS if holds_out else TOKENS // 4
        self._sides = frozenset(sides)
        self._kept: dict[str, _Kept] = {}
        self._waiting: dict[str, list[Tensor]] = {}

    def begin_batch(self, number: int) -> None:
        """Start a batch; until it ends nothing of it is kept."""
        chosen = is_held_out(number)
        self.held_out = self._holds_out and chosen
        self._takes_all = not self._holds_out and (chosen or number == 0)
        self._waiting = {}

    def see(self, seen: Seen) -> None:
        """Take tokens of a value, where they are wanted."""
        wanted = self.held_out or self._takes_all or seen.side not in self._kept
        if wanted and seen.side in self._sides:
            value = plain_tensor(seen.value)
            by_token = _by_token(value, state=seen.side in ATTENTION_NAMES)
            self._waiting.setdefault(seen.side, []).append(_spread(by_token, self._most))

    def end_batch(self) -> None:
        """Keep what the batch showed."""
        for side, chunks in self._waiting.items():
            if side not in self._kept or self._kept[side].held_out != self.held_out:
                self._kept[side] = _Kept(self.held_out, self._most)
            self._kept[side].add(_spread(torch.cat(chunks), self._most))
        self._waiting = {}

    def undo_batch(self) -> None:
        """Forget what came since `begin_batch`."""
        self._waiting = {}

    def kept(self) -> dict[str, tuple[bool, list[Tensor]]]:
        """What is kept by side: whether it is held out, and tokens of each batch, on the CPU."""
        return {
            side: (each.held_out, [chunk.cpu() for chunk in each.chunks])
            for side, each in self._kept.items()
        }

    def set_kept(self, found: Sequence[Mapping[str, tuple[bool, list[Tensor]]]]) -> None:
        """Keep what was kept of shares of the data, in place of what is kept here.

        Args:
            found: Of each share what `kept` gave. Batches take turns: the first of each share, the
                second of each, as they were dealt out.
        """
        self._kept = {}
        for side in sorted({side for each in found for side in each}):
            shares = [each[side] for each in found if side in each]
            held_out = any(flag for flag, _ in shares)
            chunks = [own for flag, own in shares if flag is held_out]
            if not held_out and self._holds_out:
                chunks = chunks[:1]  # of the first batch alone, as in `see`
            self._kept[side] = kept = _Kept(held_out, self._most)
            for turn in zip_longest(*chunks):
                for chunk in turn:
                    if chunk is not None:
                        kept.add(chunk)

    def of(self, side: str) -> Sample | None:
        """What is kept of one side, less tokens with NaN or Inf; None where nothing is."""
        kept = self._kept.get(side)
        if kept is None:
            return None
        tokens = torch.cat([each.to(kept.chunks[0].device) for each in kept.chunks])
        tokens = tokens[tokens.isfinite().flatten(1).all(dim=1)]
        return Sample(tokens, kept.held_out) if len(tokens) else None


def _by_token(value: Tensor, *, state: bool) -> Tensor:
    """Tokens first: (tokens, features), or (tokens, heads, head_dim) of an attention state."""
    if not state:
        return value.reshape(-1, value.shape[-1]) if value.dim() else value.reshape(1, 1)
    if value.dim() == 4:  # (batch, heads, tokens, head_dim)
        return value.transpose(1, 2).flatten(0, 1)
    return value.transpose(-3, -2)  # (heads, tokens, head_dim)


def _spread(tokens: Tensor, most: int = TOKENS) -> Tensor:
    """At most so many tokens, evenly spread; a copy, so that nothing else is kept alive."""
    count = len(tokens)
    if count <= most:
        return tokens.clone()
    index = torch.arange(most, dtype=torch.int64, device=tokens.device) * count // most
    return tokens.index_select(0, index)
