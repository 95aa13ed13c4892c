"""`InputGram`: the error of a layer's output, from the X'X of its inputs and without a forward."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from calipers.ranges.input_gram import ColumnGroups

__all__ = ["GramKind", "InputGram"]

#: How much of X'X is known: all of it; the blocks on its diagonal and a sketch of the rest; the
#: diagonal alone.
GramKind: TypeAlias = Literal["gram", "blocks", "diagonal"]


@dataclass(frozen=True)
class InputGram:
    """What is known of X'X of a weight's inputs, divided by any one number; float32.

    Args:
        diagonal: Sum of x^2 by column, shape (cols,).
        columns: How the columns are cut into blocks; None where the diagonal alone is known.
        products: The blocks, shape (groups, blocks, size, size); None as above.
        factor: L such that LL' approximates X'X outside of its diagonal, shape (cols, rank); None
            where one block holds all columns, or as above.
    """

    diagonal: Tensor
    columns: ColumnGroups | None = None
    products: Tensor | None = None
    factor: Tensor | None = None

    @property
    def kind(self) -> GramKind:
        """How much is known."""
        if self.products is None:
            return "diagonal"
        return "gram" if self.products.shape[:2] == (1, 1) else "blocks"

    def to(self, device: torch.device) -> InputGram:
        """The same on another device."""
        return InputGram(
            self.diagonal.to(device),
            self.columns,
            None if self.products is None else self.products.to(device),
            None if self.factor is None else self.factor.to(device),
        )

    def energy(self, rows: Tensor) -> Tensor:
        """Sum of r' X'X r over rows r: the squares of what the inputs make of these rows.

        Args:
            rows: Shape (rows, cols), any floating dtype.

        Returns:
            A number, float64; at least 0 where X'X is known as a whole or by its diagonal.

        Example:
            >>> x = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
            >>> gram = InputGram((x**2).sum(0))
            >>> float(gram.energy(torch.tensor([[1.0, -1.0]])))  # 2 from the whole of X'X
            6.0
        """
        rows = rows.float()
        if self.products is None or self.columns is None:
            return self._of_diagonal(rows)[1]
        x = self._by_block(rows, self.columns)
        products = self.products.flatten(0, 1)
        found = ((x @ products) * x).sum(dtype=torch.float64)
        if self.kind == "blocks" and self.factor is not None:
            own = self._by_block(self.factor.T, self.columns).transpose(1, 2)
            inside = x @ own  # (blocks, rows, rank), whose sum over blocks is the whole
            found = found + inside.sum(0).square().sum(dtype=torch.float64)
            found = found - inside.square().sum(dtype=torch.float64)
        return found

    def squares(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of the squares of rows, and `energy`, each float64."""
        if self.kind == "diagonal":
            return self._of_diagonal(rows.float())
        return rows.float().square().sum(0, dtype=torch.float64).sum(), self.energy(rows)

    def _of_diagonal(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        by_column = rows.square().sum(0, dtype=torch.float64)
        return by_column.sum(), by_column @ self.diagonal.double()

    def _by_block(self, rows: Tensor, columns: ColumnGroups) -> Tensor:
        """Rows (rows, cols) cut into blocks (blocks, rows, size): a view where columns lie so."""
        if self.in_order:
            return rows.view(len(rows), -1, columns.size).transpose(0, 1)
        return columns.by_block(rows).flatten(0, 1)

    @functools.cached_property
    def in_order(self) -> bool:
        """Whether the blocks hold the columns in their order, and nothing is filled up."""
        if self.columns is None:
            return False
        index = self.columns.index.cpu().reshape(-1)
        order = torch.arange(len(self.diagonal), dtype=index.dtype, device="cpu")
        width = self.columns.index.shape[1]
        return torch.equal(index, order) and width == self.columns.blocks * self.columns.size
