"""Perplexity and output error, the measures that a quantized model is judged by."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from calipers.calibration.batches import Progress, eval_mode

__all__ = [
    "Difference",
    "OutputError",
    "Perplexity",
    "bootstrap_interval",
    "collect_outputs",
    "evaluate_losses",
    "output_error",
    "paired_difference",
    "perplexity",
    "ratio",
]


@dataclass(frozen=True)
class Perplexity:
    """The losses of a language model, sequence by sequence, and the perplexity they make.

    Attributes:
        losses: For each sequence the sum of the negative log-likelihoods of its tokens, nats.
        tokens: For each sequence how many tokens that are: all but its first.

    Examples:
        >>> measured = Perplexity(losses=(4.0, 8.0), tokens=(2, 2))
        >>> measured.mean_loss
        3.0
        >>> round(measured.value, 2), round(measured.standard_error, 2)
        (20.09, 20.09)
    """

    losses: tuple[float, ...]
    tokens: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.losses) != len(self.tokens) or not self.losses or min(self.tokens) < 1:
            raise ValueError(
                "expected as many losses as counts of tokens, at least one of each and no count "
                f"below 1, got {len(self.losses)} losses and {len(self.tokens)} counts"
            )

    @property
    def mean_loss(self) -> float:
        """Mean negative log-likelihood of a token, nats."""
        return ratio(self.losses, self.tokens)[0]

    @property
    def mean_loss_error(self) -> float | None:
        """Standard error of the mean loss over sequences; None for a single sequence."""
        return ratio(self.losses, self.tokens)[1]

    @property
    def value(self) -> float:
        """Perplexity: the exponential of the mean loss, at least 1."""
        return _exp(self.mean_loss)

    @property
    def standard_error(self) -> float | None:
        """Standard error of the perplexity over sequences; None for a single sequence.

        By the delta method: the perplexity times the standard error of the mean loss. It says how
        far another draw of as many sequences of the same text would move the perplexity.
        """
        error = self.mean_loss_error
        return None if error is None else self.value * error


@dataclass(frozen=True)
class Difference:
    """How a model's perplexity changed, with uncertainty over the sequences that it was judged by.

    Attributes:
        mean_loss: Change of the mean loss of a token, nats.
        mean_loss_error: Its paired standard error; None for a single sequence.
    """

    mean_loss: float
    mean_loss_error: float | None

    @property
    def relative(self) -> float:
        """Change of the perplexity as a part of what it was: 0.02 is 2% more."""
        return _exp(self.mean_loss) - 1

    @property
    def relative_error(self) -> float | None:
        """Paired standard error of `relative`, by the delta method; None as above."""
        error = self.mean_loss_error
        return None if error is None else _exp(self.mean_loss) * error


@dataclass(frozen=True)
class OutputError:
    """How far a model's outputs are from those of another.

    Attributes:
        value: Mean over tokens of ||y - y0|| / ||y0||, y a token's output vector.
        standard_error: Its standard error over sequences; None for a single sequence.
        sequences: Sequences it was taken over.
        tokens: Tokens it was taken over.
    """

    value: float
    standard_error: float | None
    sequences: int
    tokens: int


def perplexity(
    model: nn.Module, batches: Iterable[Tensor], progress: Progress | None = None
) -> float:
    """Exponential of the mean negative log-likelihood of each token given those before it.

    Args:
        model: A causal language model called with `input_ids`, whose output has `logits`.
        batches: Token ids, shape (batch, tokens); each sequence is judged on its own, from its
            second token on.
        progress: Called as `progress("perplexity", done, total)`.

    Returns:
        Perplexity, at least 1. `evaluate_losses` gives it with its standard error.

    Raises:
        ValueError: No sequence holds two tokens.

    Example:
        >>> from transformers import AutoModelForCausalLM, AutoTokenizer
        >>> from calipers.demo import HELDOUT_TEXT, MODEL_PATH
        >>> from calipers.text import read_batches
        >>> tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH)
        >>> model = AutoModelForCausalLM.from_pretrained(MODEL_PATH)
        >>> batches = read_batches(HELDOUT_TEXT, tokenizer, sequence_length=64, samples=4)
        >>> round(perplexity(model, batches))
        20
    """
    return evaluate_losses(model, batches, progress).value


@torch.no_grad()
def evaluate_losses(
    model: nn.Module,
    batches: Iterable[Tensor],
    progress: Progress | None = None,
    see: Callable[[int, Tensor], object] | None = None,
) -> Perplexity:
    """Losses of a language model by sequence, which give its perplexity a standard error.

    Args:
        model: As for `perplexity`. It runs in evaluation mode, and its modes are put back.
        batches: As for `perplexity`. Sequences of one token are left out.
        progress: As for `perplexity`.
        see: Called for each sequence with its number, from 0, and the logits by which its tokens
            but the first are predicted, shape (tokens - 1, vocabulary); see
            `calipers.agreement.ReferenceLogits`.

    Returns:
        The losses, whose `value` is the perplexity.

    Raises:
        ValueError: No sequence holds two tokens.
    """
    losses: list[float] = []
    tokens: list[int] = []
    device = next(model.parameters()).device
    batches = list(batches)
    with eval_mode(model):
        for done, batch in enumerate(batches, start=1):
            if batch.shape[-1] > 1:
                ids = batch.to(device)
                logits = model(input_ids=ids, use_cache=False).logits
                # One sequence at a time: float32 logits of a whole batch can be gigabytes.
                for row, targets in zip(logits[:, :-1], ids[:, 1:], strict=True):
                    if see is not None:
                        see(len(losses), row)
                    loss = nn.functional.cross_entropy(row.float(), targets, reduction="none")
                    losses.append(float(loss.double().sum()))
                    tokens.append(targets.numel())
            if progress is not None:
                progress("perplexity", done, len(batches))
    if not losses:
        raise ValueError("batches: expected sequences of at least two tokens, got none")
    return Perplexity(tuple(losses), tuple(tokens))


def paired_difference(before: Perplexity, after: Perplexity) -> Difference:
    """Change of the perplexity from one model to another on the same sequences.

    What makes a sequence hard is hard for both models, so that most of it cancels: the standard
    error of the difference is far smaller than that of either perplexity.

    Args:
        before: Of the model compared with.
        after: Of the other one, over the same sequences in the same order.

    Raises:
        ValueError: The two were not taken over sequences of the same lengths.

    Examples:
        >>> before = Perplexity(losses=(4.0, 8.0), tokens=(2, 2))
        >>> after = Perplexity(losses=(4.2, 8.2), tokens=(2, 2))
        >>> change = paired_difference(before, after)
        >>> f"{change.relative:.3f} +- {change.relative_error:.3f}"
        '0.105 +- 0.000'
    """
    if before.tokens != after.tokens:
        raise ValueError(
            "expected two results over the same sequences, got "
            f"{len(before.tokens)} sequences of {sum(before.tokens)} tokens and "
            f"{len(after.tokens)} of {sum(after.tokens)}"
        )
    changes = [b - a for a, b in zip(before.losses, after.losses, strict=True)]
    return Difference(*ratio(changes, before.tokens))


def bootstrap_interval(
    before: Perplexity,
    after: Perplexity,
    *,
    confidence: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> tuple[float, float] | None:
    """Between what the relative change of the perplexity lies, by a paired bootstrap.

    Sequences are drawn with replacement, each with what both models did with it. Unlike a standard
    error it needs no change that is small or even.

    Args:
        before: As for `paired_difference`.
        after: Likewise.
        confidence: Share of the draws that lie inside.
        draws: How many.
        seed: Of the draws, which are the same in every process.

    Returns:
        The ends, as `Difference.relative`: 0.02 is 2% more; None for a single sequence.

    Raises:
        ValueError: As `paired_difference`.

    Example:
        >>> before = Perplexity(losses=(4.0, 8.0, 6.0), tokens=(2, 2, 2))
        >>> after = Perplexity(losses=(4.2, 8.2, 6.2), tokens=(2, 2, 2))
        >>> low, high = bootstrap_interval(before, after)
        >>> round(low, 3), round(high, 3)
        (0.105, 0.105)
    """
    paired_difference(before, after)  # refuses other sequences
    count = len(before.tokens)
    if count < 2:
        return None
    generator = torch.Generator("cpu").manual_seed(seed)
    drawn = torch.randint(
        count, (draws, count), generator=generator, dtype=torch.int64, device="cpu"
    )
    pairs = zip(before.losses, after.losses, before.tokens, strict=True)
    table = torch.tensor(
        [(b - a, tokens) for a, b, tokens in pairs], dtype=torch.float64, device="cpu"
    )
    changes, tokens = table[drawn].sum(1).unbind(1)
    side = (1 - confidence) / 2
    ends = torch.tensor([side, 1 - side], dtype=torch.float64, device="cpu")
    low, high = (changes / tokens).quantile(ends).tolist()
    return _exp(low) - 1, _exp(high) - 1


@torch.no_grad()
def collect_outputs(
    model: nn.Module,
    batches: Iterable[Tensor],
    progress: Progress | None = None,
    *,
    max_tokens: int = 16_384,
) -> list[Tensor]:
    """The last hidden states of a model without a language head, to compare them with later.

    Take those of the unquantized model before it is quantized: `calibrate` works in place.

    Args:
        model: An encoder called with `input_ids`, whose output has `last_hidden_state`.
        batches: Token ids, shape (batch, tokens).
        progress: Called as `progress("outputs", done, total)`.
        max_tokens: Most tokens to keep, at least 1. Sequences are kept whole, in order, until the
            next one is too much; the first one always.

    Returns:
        One tensor for each sequence, float32, on the CPU, shape (tokens, hidden).

    Raises:
        ValueError: There are no batches, or the model's output has no `last_hidden_state`.
    """
    found: list[Tensor] = []
    device = next(model.parameters()).device
    batches = _within(list(batches), max_tokens)
    with eval_mode(model):
        for done, batch in enumerate(batches, start=1):
            states = getattr(model(input_ids=batch.to(device)), "last_hidden_state", None)
            if not isinstance(states, Tensor):
                raise ValueError(
                    f"{type(model).__name__}: expected an output with last_hidden_state, got none"
                )
            found += states.float().cpu().unbind()
            if progress is not None:
                progress("outputs", done, len(batches))
    if not found:
        raise ValueError("batches: expected sequences of tokens, got none")
    return found


def output_error(reference: Sequence[Tensor], outputs: Sequence[Tensor]) -> OutputError:
    """Relative error of a model's outputs, mean over tokens.

    Args:
        reference: Outputs of the unquantized model by sequence, shape (tokens, hidden) each, as
            `collect_outputs` gives them.
        outputs: Those of the quantized model for the same sequences.

    Returns:
        The mean over tokens of ||y - y0|| / ||y0||, with its standard error over sequences. A
        token whose y0 is all zero counts as 0 where y is zero too, else as infinite.

    Raises:
        ValueError: The two do not have the same shapes, or there are none.

    Examples:
        >>> output_error([torch.ones(3, 4)], [torch.full((3, 4), 1.5)])
        OutputError(value=0.5, standard_error=None, sequences=1, tokens=3)
    """
    shapes = [tuple(each.shape) for each in reference], [tuple(each.shape) for each in outputs]
    if shapes[0] != shapes[1] or not reference:
        raise ValueError(
            f"expected outputs for the same sequences, got {len(reference)} and {len(outputs)}"
            + (": their shapes differ" if len(reference) == len(outputs) > 0 else "")
        )
    sums = []
    for wanted, got in zip(reference, outputs, strict=True):
        distance = (got.double() - wanted.double()).norm(dim=-1)
        relative = torch.where(distance == 0, 0.0, distance / wanted.double().norm(dim=-1))
        sums.append(float(relative.sum()))
    counts = [len(each) for each in reference]
    value, error = ratio(sums, counts)
    return OutputError(value, error, len(counts), sum(counts))


def ratio(sums: Sequence[float], counts: Sequence[int]) -> tuple[float, float | None]:
    """Mean over tokens from sums over sequences, and its standard error over sequences.

    Args:
        sums: Of each sequence the sum over its tokens.
        counts: Tokens of each sequence.

    Returns:
        The mean, and its standard error, None for a single sequence.

    Source: the ratio estimator of survey sampling (Cochran, Sampling Techniques, section 2.11):
    var = n / (n - 1) * sum (s_i - mean * c_i)^2 / (sum c_i)^2.
    """
    total, n = sum(counts), len(counts)
    mean = sum(sums) / total
    if n < 2:
        return mean, None
    squares = sum(d * d for d in (s - mean * c for s, c in zip(sums, counts, strict=True)))
    return mean, math.sqrt(n / (n - 1) * squares) / total


def _exp(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def _within(batches: Sequence[Tensor], max_tokens: int) -> list[Tensor]:
    """The first sequences of the batches, as many as do not exceed `max_tokens` in all."""
    kept: list[Tensor] = []
    left = max_tokens
    for batch in batches:
        length = max(1, batch.shape[-1])
        fits = min(len(batch), left // length) or (0 if kept else 1)
        if fits:
            kept.append(batch[:fits])
        if fits < len(batch):
            break
        left -= fits * length
    return kept
