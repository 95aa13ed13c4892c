"""`find_mask`: which tokens of a batch count, by the attention mask that it carries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from loguru import logger

from calipers.observers.masks import TokenMask

__all__ = ["BatchMask", "find_mask"]

_KEY = "attention_mask"


class BatchMask(NamedTuple):
    """The tokens of one batch.

    Args:
        mask: Which of them count; None where all do.
        given: Tokens of the batch, 0 where it carries no mask of its tokens.
        counted: Those that count.
    """

    mask: TokenMask | None = None
    given: int = 0
    counted: int = 0


def find_mask(batch: object, model: torch.nn.Module) -> BatchMask:
    """The mask of a batch.

    Args:
        batch: A mapping with "attention_mask" of shape (batch, tokens), not 0 where a token
            counts, and with another tensor that starts with that shape (input_ids). Any other
            mask says nothing about single tokens; it is left to the model.
        model: An encoder-decoder takes a mask of its encoder. Where its decoder has tokens of the
            same shape, nothing tells them apart: the mask is not used then, with a warning.
    """
    found = batch.get(_KEY) if isinstance(batch, Mapping) else None
    if not isinstance(batch, Mapping) or not isinstance(found, torch.Tensor) or found.dim() != 2:
        return BatchMask()
    alike = {
        key
        for key, value in batch.items()
        if isinstance(value, torch.Tensor) and key != _KEY and value.shape[:2] == found.shape
    }
    if not alike or (found.dtype != torch.bool and not bool((found >= 0).all())):
        return BatchMask()  # of other tokens, or additive
    decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False) is True
    if decoder and (alike & {"decoder_input_ids", "decoder_inputs_embeds", "labels"}):
        logger.warning(
            "attention_mask not used: encoder and decoder have {} tokens a sequence each, so that "
            "nothing tells them apart; pad one of them to another length",
            found.shape[1],
        )
        return BatchMask()
    if bool((found != 0).all()):
        return BatchMask(None, found.numel(), found.numel())
    mask = TokenMask(found)
    return BatchMask(mask, found.numel(), mask.count)
