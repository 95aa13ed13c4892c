"""Perplexity of a language model, the measure that a quantized model is judged by."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

__all__ = ["perplexity"]


@torch.no_grad()
def perplexity(
    model: nn.Module,
    batches: Iterable[Tensor],
    progress: Callable[[str, int, int | None], object] | None = None,
) -> float:
    """Exponential of the mean negative log-likelihood of each token given those before it.

    Args:
        model: A causal language model called with `input_ids`, whose output has `logits`.
        batches: Token ids, shape (batch, tokens); each sequence is judged on its own, from its
            second token on.
        progress: Called as `progress("perplexity", done, total)`.

    Returns:
        Perplexity, at least 1.

    Raises:
        ValueError: No sequence holds two tokens.
    """
    total_loss, count = 0.0, 0
    device = next(model.parameters()).device
    batches = list(batches)
    training = model.training
    model.eval()
    try:
        for done, batch in enumerate(batches, start=1):
            ids = batch.to(device)
            if ids.shape[-1] > 1:
                logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
                targets = ids[:, 1:].flatten()
                loss = nn.functional.cross_entropy(
                    logits.flatten(0, 1).float(), targets, reduction="sum"
                )
                total_loss += float(loss)
                count += targets.numel()
            if progress is not None:
                progress("perplexity", done, len(batches))
    finally:
        model.train(training)
    if not count:
        raise ValueError("batches: expected sequences of at least two tokens, got none")
    return math.exp(total_loss / count)
