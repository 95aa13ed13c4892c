"""Masks: which tokens of a value count.

A mask has 1 where a token counts, as `attention_mask` of transformers. Tokens that do not count
enter no statistic. `token_mask` sets one for everything that runs inside of it, which is how a
batch's mask reaches the hooks of a model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from math import prod

import torch
from torch import Tensor

from calipers.memory import named_tensor

__all__ = ["TokenMask", "blank_tokens", "current_mask", "select_tokens", "token_mask"]


class TokenMask:
    """Which tokens of a batch count, ready to pick them from many values without asking again.

    Args:
        mask: Shape (batch, tokens); not 0 where a token counts.

    Attributes:
        shape: (batch, tokens).
        count: Number of tokens that count.
    """

    def __init__(self, mask: Tensor) -> None:
        self.shape = tuple(mask.shape)
        keep = _as_bool(mask).flatten()
        index = keep.nonzero().flatten()
        self._keep = keep
        self.count = index.numel()
        self._home = index.device
        self._indices = {index.device: index}

    def fits(self, shape: torch.Size) -> bool:
        """Whether a value of this shape holds these tokens.

        It does if it starts with (batch, tokens), or with all tokens in one dimension; something
        must follow.
        """
        return self._starts(shape) or (len(shape) > 1 and shape[0] == prod(self.shape))

    def select(self, value: Tensor) -> Tensor:
        """The tokens that count, shape (count, ...); the value must fit."""
        if self._starts(value.shape):
            value = value.flatten(0, 1)
        device = value.device
        if device not in self._indices:
            self._indices[device] = self._indices[self._home].to(device)
        return value.index_select(0, self._indices[device])

    def among(self, tokens: Tensor) -> TokenMask:
        """The mask of some of the tokens, by their places among all of them, in this order."""
        return TokenMask(self._keep[tokens.to(self._keep.device)].unsqueeze(0))

    def _starts(self, shape: torch.Size) -> bool:
        return len(shape) > 2 and shape[:2] == self.shape


_current: ContextVar[TokenMask | None] = ContextVar("calipers_token_mask", default=None)


def current_mask() -> TokenMask | None:
    """The mask of the batch that runs in this thread; None where all of its tokens count."""
    return _current.get()


@contextmanager
def token_mask(mask: TokenMask | None) -> Iterator[None]:
    """Let a mask hold for the hooks of a model that runs inside, in this thread."""
    token = _current.set(mask)
    try:
        yield
    finally:
        _current.reset(token)


def select_tokens(value: Tensor, mask: Tensor, *, heads: bool = False) -> Tensor:
    """The tokens of a value that count.

    Args:
        value: Shape (batch, tokens, ...) or (tokens, ...); with `heads` shape
            (batch, heads, tokens, head_dim) or (heads, tokens, head_dim).
        mask: Shape (batch, tokens) or (tokens,); not 0 where a token counts. One of (tokens,)
            holds for every sequence of a batch, one of all tokens of a batch for the whole.
        heads: Whether the value is an attention state.

    Returns:
        Shape (count, ...), with `heads` (heads, count, head_dim); the value itself where all of
        its tokens count.

    Raises:
        ValueError: A mask that is no tensor, does not fit the value or has negative or NaN values,
            as an additive mask has.
    """
    by_token = value.transpose(-3, -2) if heads and value.dim() > 2 else value
    keep = _spread(_as_bool(mask), value, heads).to(value.device)
    if bool(keep.all()):
        return value
    chosen = by_token.flatten(0, keep.dim() - 1)[keep.flatten()]
    return chosen.transpose(0, 1) if by_token is not value else chosen


def blank_tokens(value: Tensor, mask: Tensor) -> Tensor:
    """The value with zeros in place of tokens that do not count; see `select_tokens`."""
    keep = _spread(_as_bool(mask), value, False).to(value.device)
    return torch.where(keep.view(*keep.shape, *[1] * (value.dim() - keep.dim())), value, 0)


def _spread(keep: Tensor, value: Tensor, heads: bool) -> Tensor:
    """The mask in the shape of the value's dimensions of tokens."""
    shape = tuple(value.shape)
    if heads and len(shape) > 2:
        shape = (*shape[:-3], shape[-2], shape[-3], shape[-1])
    batched = shape[:2] if len(shape) > 2 + (heads and len(shape) > 2) else None
    if batched is not None:
        if keep.shape in (batched, (prod(batched),)):
            return keep.reshape(batched)
        if keep.shape == batched[1:]:
            return keep.expand(batched)
    if len(shape) > 1 and keep.numel() == shape[0]:
        return keep.reshape(shape[0])
    raise ValueError(
        f"mask: expected shape (batch, tokens) or (tokens,) of a value of shape "
        f"{tuple(value.shape)}, got {tuple(keep.shape)}"
    )


def _as_bool(mask: Tensor) -> Tensor:
    mask = named_tensor(mask, "mask")
    if mask.dtype == torch.bool:
        return mask
    if bool(((mask < 0) | (mask != mask)).any()):
        raise ValueError(
            "mask: expected 1 for tokens that count and 0 for others, got negative or NaN values"
        )
    return mask != 0
