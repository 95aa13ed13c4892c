"""A sketch of the inputs' X'X: what its products with a few directions tell of the whole.

Kept are the products of X'X with random directions of plus and minus ones, and the sum of the
inputs, which is a product as well once a column of ones stands beside X. Nystrom's approximation of
X'X by these, C (P'C)^-1 C' with C = X'X P, is never greater than X'X and has nearly all of what its
largest eigenvectors make (Halko, Martinsson, Tropp 2011, arXiv:0909.4061). Sums over batches add up
and merge in any order.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

__all__ = ["factor_of_sketch", "rank_for", "sketch"]

#: Most directions, and what part of the largest eigenvalue is taken for rounding.
MOST, ROUNDING = 64, 1e-6


def rank_for(size: int) -> int:
    """Number of directions that fit beside the triangle of a block of `size` columns.

    Triangle, directions and mean together take at most `size` values for each column (from blocks
    of three columns on).
    """
    return max(0, min(MOST, (size - 3) // 2))


def sketch(tokens: Tensor, rank: int) -> Tensor:
    """X'[XP, 1] of tokens X (tokens, cols), shape (cols, rank + 1), in the dtype of the tokens."""
    seen = tokens @ _directions(tokens.shape[1], rank).to(tokens)
    return tokens.T @ torch.nn.functional.pad(seen, (0, 1), value=1.0)


def factor_of_sketch(sums: Tensor, num_tokens: int, square_sum: Tensor) -> Tensor:
    """A matrix L such that LL' approximates X'X outside of its diagonal.

    From the eigenvalues of Nystrom's approximation the mean of those that it leaves out is taken:
    what X'X has alike in all directions lies on its diagonal, and only a sketch smears it over the
    rest.

    Args:
        sums: A sketch of X, shape (cols, rank + 1).
        num_tokens: Rows of X.
        square_sum: Diagonal of X'X, shape (cols,).

    Returns:
        Shape (cols, rank + 1), float64.
    """
    cols, rank = sums.shape[0], sums.shape[1] - 1
    directions = _directions(cols, rank).to(sums)
    # The column of ones beside X is made as large as the inputs, which conditions the core.
    inner = directions.T @ sums
    size = inner[:, :rank].diagonal().mean() if rank else sums[:, rank].square().mean()
    ones = (size.clamp(min=torch.finfo(torch.float64).tiny) / num_tokens).sqrt()
    columns = torch.cat([sums[:, :rank], sums[:, rank:] * ones], dim=1)
    core = sums.new_zeros(rank + 1, rank + 1)
    core[:rank, :rank] = (inner[:, :rank] + inner[:, :rank].T) / 2
    core[:rank, rank] = core[rank, :rank] = inner[:, rank] * ones
    core[rank, rank] = num_tokens * ones**2
    values, vectors = torch.linalg.eigh(core)
    kept = values > values.amax() * ROUNDING
    factor = columns @ (vectors * torch.where(kept, values, torch.inf).rsqrt())
    values, vectors = torch.linalg.eigh(factor.T @ factor)
    left_out = (square_sum.sum() - values.sum()).clamp(min=0) / max(1, cols - rank - 1)
    remaining = (1 - left_out / values.clamp(min=torch.finfo(torch.float64).tiny)).clamp(min=0)
    found: Tensor = factor @ (vectors * remaining.sqrt())
    return found


@functools.lru_cache(maxsize=8)
def _directions(cols: int, rank: int) -> Tensor:
    """Plus and minus ones, shape (cols, rank); the same in every process."""
    generator = torch.Generator("cpu").manual_seed(0)
    return (
        torch.randint(
            0, 2, (cols, rank), generator=generator, dtype=torch.int64, device="cpu"
        ).float()
        * 2
        - 1
    )
