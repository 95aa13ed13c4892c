"""X'X of a weight's inputs: its blocks over columns that share a scale, and a sketch of the rest.

Kept are the products of X'X with random directions of plus and minus ones, and the sum of the
inputs, which is a product as well once a column of ones stands beside X. Nystrom's approximation of
X'X by these, C (P'C)^-1 C' with C = X'X P, is never greater than X'X and has nearly all of what its
largest eigenvectors make (Halko, Martinsson, Tropp 2011, arXiv:0909.4061). Sums over batches add up
and merge in any order.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from math import ceil

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy
from torch import Tensor

from calipers.errors import CalipersError
from calipers.grouping import Groups, group_values

__all__ = [
    "ColumnGroups",
    "column_groups",
    "factor_of_sketch",
    "rank_for",
    "sketch",
]

#: Widest block of columns of a group, and of a row where one scale spans whole rows.
WIDEST, ROW_BLOCK = 256, 512


@dataclass(frozen=True)
class ColumnGroups:
    """Columns by group, cut into blocks.

    Args:
        index: Column numbers, shape (groups, columns), -1 behind the end of a short group.
        blocks: Number of equal blocks that the columns of a group are cut into.
        size: Columns of a block; the last is filled up.
    """

    index: Tensor
    blocks: int
    size: int

    @functools.cached_property
    def _in_order(self) -> bool:
        """Whether columns of groups lie one after the other, and none is short."""
        flat = self.index.flatten()
        return bool((flat == torch.arange(flat.numel(), dtype=torch.int64, device="cpu")).all())

    @property
    def _filled(self) -> int:
        """Columns with those that fill up blocks."""
        return len(self.index) * self.blocks * self.size

    def by_block(self, tokens: Tensor) -> Tensor:
        """Tokens (tokens, cols) by column group and block: (groups, blocks, tokens, size)."""
        if self._in_order and tokens.shape[1] == self.index.numel() == self._filled:
            by_block = tokens.view(len(tokens), len(self.index), self.blocks, self.size)
            return by_block.permute(1, 2, 0, 3)
        index = self.index.to(tokens.device)
        padded = torch.nn.functional.pad(tokens, (0, 1))  # a column of zeros, which -1 names
        by_group = padded[:, index]
        filled = torch.nn.functional.pad(by_group, (0, self.blocks * self.size - index.shape[1]))
        return filled.view(len(tokens), len(index), self.blocks, self.size).permute(1, 2, 0, 3)

    def triangles(self, tokens: Tensor) -> Tensor:
        """Sum of x x' over tokens (tokens, cols), without what is there twice.

        Shape (groups, blocks, size * (size + 1) / 2), in the dtype of the tokens: the upper
        triangle by rows.
        """
        x = self.by_block(tokens)
        row, column = torch.triu_indices(self.size, self.size, device=tokens.device)
        return (x.transpose(-1, -2) @ x).flatten(-2).index_select(-1, row * self.size + column)

    def products(self, triangles: Tensor) -> Tensor:
        """The whole of what `triangles` gives, shape (groups, blocks, size, size)."""
        row, column = torch.triu_indices(self.size, self.size, device=triangles.device)
        whole = triangles.new_empty(*triangles.shape[:-1], self.size, self.size)
        whole[..., row, column] = whole[..., column, row] = triangles
        return whole

    def fit(self, view: Groups, which: slice | Tensor) -> bool:
        """Whether the groups of a view are made of these columns."""
        index = self.index[which.cpu() if isinstance(which, Tensor) else which]
        if view.columns is None:
            first = index[:, 0].unsqueeze(1) + torch.arange(
                view.shape[-1], dtype=torch.int64, device="cpu"
            )
            own = index[:, : view.shape[-1]]
            return own.shape == first.shape and bool((own == first).all())
        columns = view.columns.cpu()
        own = index[:, : columns.shape[1]]
        return own.shape == columns.shape and bool((own == columns).all())


def column_groups(args: QuantizationArgs, cols: int, g_idx: Tensor | None) -> ColumnGroups:
    """Which columns of a weight share a scale.

    Args:
        args: Quantization arguments of a weight.
        cols: Number of columns.
        g_idx: Group of each column; None for column order.

    Raises:
        CalipersError: Groups wider than group_size, which would need more memory than promised.
    """
    width = cols
    if args.strategy == QuantizationStrategy.BLOCK and args.block_structure is not None:
        width = min(cols, args.block_structure[1])
    elif args.group_size is not None and args.group_size > 0:
        width = min(cols, args.group_size)
    index = torch.full((ceil(cols / width), width), -1, dtype=torch.int64, device="cpu")
    index.view(-1)[:cols] = torch.arange(cols, dtype=torch.int64, device="cpu")
    grouped = args.strategy in (QuantizationStrategy.GROUP, QuantizationStrategy.TENSOR_GROUP)
    if grouped and g_idx is not None:
        row = torch.empty(1, cols, dtype=torch.float32, device=g_idx.device)
        for view in group_values(row, "weight", args, g_idx):
            if view.columns is None:
                break
            if view.columns.shape[1] > width:
                raise CalipersError(
                    f"objective 'hessian' takes groups of at most group_size {width} columns, got "
                    f"one of {view.columns.shape[1]} by g_idx"
                )
            groups = view.where[-1]
            index[groups.cpu() if isinstance(groups, Tensor) else groups] = -1
            rows = groups.cpu() if isinstance(groups, Tensor) else groups
            index[rows, : view.columns.shape[1]] = view.columns.cpu()
    limit = WIDEST if width < cols or grouped else ROW_BLOCK
    blocks = ceil(width / limit)
    return ColumnGroups(index, blocks, ceil(width / blocks))


#: Most directions, and what part of the largest eigenvalue is taken for rounding.
MOST, ROUNDING = 31, 1e-6
#: Numbers in a vector, or half of one.
VECTOR = 8


def rank_for(cols: int) -> int:
    """Number of directions that a sketch of `cols` columns takes: with the mean 32 values each."""
    return min(MOST, cols)


def sketch(tokens: Tensor, rank: int) -> Tensor:
    """X'[XP, 1] of tokens X (tokens, cols), shape (cols, rank + 1), in the dtype of the tokens."""
    # With more columns: one for the ones, and others because products with whole vectors of them
    # are twice as fast.
    whole = rank + 1 + -(rank + 1) % VECTOR
    directions = torch.nn.functional.pad(_directions(tokens.shape[1], rank), (0, whole - rank))
    seen = tokens @ directions.to(tokens)
    seen[:, rank] = 1
    return (tokens.T @ seen)[:, : rank + 1]


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
