"""`InputGram`: the error of a layer's output, from the X'X of its inputs and without a forward."""

from __future__ import annotations

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
            return (rows.square().sum(0, dtype=torch.float64) * self.diagonal.double()).sum()
        found = self._of_blocks(rows, self.columns, self.products)
        if self.kind == "blocks" and self.factor is not None:
            whole = (rows @ self.factor).square().sum(dtype=torch.float64)
            own = self.columns.by_block(self.factor.T).transpose(-1, -2)
            inside = self.columns.by_block(rows) @ own
            found = found + whole - inside.square().sum(dtype=torch.float64)
        return found

    @staticmethod
    def _of_blocks(rows: Tensor, columns: ColumnGroups, products: Tensor) -> Tensor:
        x = columns.by_block(rows)
        return ((x @ products) * x).sum(dtype=torch.float64)
