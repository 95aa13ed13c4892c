"""How far a model's predictions are from those of another: KL divergence, top-1 agreement."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from calipers.evaluation import ratio

__all__ = ["Agreement", "ReferenceLogits"]

#: Bytes of logits that are kept of a model.
MAX_BYTES = 2**30


@dataclass(frozen=True)
class Agreement:
    """How a model's predictions of the next token agree with those of a reference.

    Attributes:
        kl: Mean over tokens of the KL divergence sum p log(p / q) of its distribution q from the
            reference's p, nats; at least 0 but for rounding.
        kl_error: Its standard error over sequences; None for a single one.
        top1: Share of tokens whose most likely next token is the same.
        top1_error: Likewise.
        sequences: Sequences that it was taken over.
        tokens: Tokens that it was taken over, spread evenly over each sequence.
    """

    kl: float
    kl_error: float | None
    top1: float
    top1_error: float | None
    sequences: int
    tokens: int

    def to_dict(self) -> dict[str, float | int | None]:
        """All of it, ready for JSON."""
        return asdict(self)


class ReferenceLogits:
    """Logits of a reference, to which those of other models are compared.

    `keep` and `compare` are what `evaluate_losses` takes as `see`, so that no pass over the text
    is run for this alone. Where the logits of all tokens would be too many bytes, as many tokens of
    each sequence are kept as fit, evenly spread.

    Args:
        sequences: How many sequences will come.
        max_bytes: Most bytes that are kept, on the CPU and in the logits' own dtype; one token of
            each sequence in any case.

    Example:
        >>> reference = ReferenceLogits(sequences=1)
        >>> reference.keep(0, torch.tensor([[0.0, 0.0], [2.0, 0.0]]))
        >>> reference.compare(0, torch.tensor([[0.0, 1.0], [2.0, 0.0]]))
        >>> found = reference.agreement()
        >>> round(found.kl, 3), found.top1, found.tokens
        (0.06, 0.5, 2)
    """

    def __init__(self, sequences: int, max_bytes: int = MAX_BYTES) -> None:
        self._bytes = max_bytes // max(1, sequences)
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
        self._found: dict[int, tuple[float, int, int]] = {}

    def keep(self, number: int, logits: Tensor) -> None:
        """Keep what the reference says of a sequence.

        Args:
            number: Which sequence it is, from 0.
            logits: Shape (tokens, vocabulary).
        """
        tokens, words = logits.shape
        most = max(1, min(tokens, self._bytes // (words * logits.element_size())))
        places = torch.arange(most, dtype=torch.int64, device=logits.device) * tokens // most
        self._kept[number] = places.cpu(), logits[places].cpu()

    def compare(self, number: int, logits: Tensor) -> None:
        """Compare what another model says of the same sequence.

        Raises:
            ValueError: The reference saw no such sequence, or has another vocabulary.
        """
        if number not in self._kept:
            raise ValueError(f"number: the reference saw no sequence {number}")
        places, kept = self._kept[number]
        if logits.shape[1] != kept.shape[1] or len(logits) <= int(places[-1]):
            raise ValueError(
                f"logits: expected (more than {int(places[-1])} tokens, {kept.shape[1]} words) as "
                f"of the reference, got {tuple(logits.shape)}"
            )
        own = logits[places.to(logits.device)].float()
        wanted = kept.to(own.device).float()
        p, q = wanted.log_softmax(-1), own.log_softmax(-1)
        # where p is 0 its logarithm may be infinite, and the term is 0
        terms = torch.where(p.exp() > 0, p.exp() * (p - q), 0)
        same = int((wanted.argmax(-1) == own.argmax(-1)).sum())
        self._found[number] = float(terms.sum(dtype=torch.float64)), same, len(places)

    def agreement(self) -> Agreement | None:
        """What was found since the last call; None where nothing was compared."""
        found, self._found = list(self._found.values()), {}
        if not found:
            return None
        divergences, same, counts = zip(*found, strict=True)
        kl, kl_error = ratio(divergences, counts)
        top1, top1_error = ratio([float(each) for each in same], counts)
        return Agreement(kl, kl_error, top1, top1_error, len(counts), sum(counts))
