"""Groups in which two candidates are as good as one another but for rounding.

Which of them the reference takes is decided by the order in which it sums; so it is asked.
"""

from __future__ import annotations

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor

from calipers.ranges import grid_eager
from calipers.ranges.shrink import ShrinkGrid
from calipers.ranges.views import GroupedView

__all__ = ["decide_ties"]

#: Values looked through at a time, and values gathered for one call of the reference.
LOOKED_THROUGH, GATHERED = 2**22, 2**20

Range = tuple[Tensor, Tensor]


def decide_ties(
    close: Tensor,
    found: Range,
    view: GroupedView,
    extremes: Range,
    args: QuantizationArgs,
    grid: ShrinkGrid,
    importance: GroupedView | None,
    global_scale: Tensor | None,
    num_steps: int,
) -> None:
    """Search the groups that are marked by the reference, and write what it finds.

    Args:
        close: Which groups, of the view's `qparam_shape`.
        found: Minimum and maximum found for each group, to be corrected in place.
        view: The values.
        extremes: Minimum and maximum of each group, float32, expanded.
        args: Quantization arguments, as for the search.
        grid: The candidates.
        importance: The weights of the values, or None.
        global_scale: TENSOR_GROUP only, shape (1,).
        num_steps: Steps that the search came to.
    """
    weights = None if importance is None else importance.pieces(LOOKED_THROUGH)
    group_size = view.values.numel() // max(1, close.numel())
    batch = _Batch(found, extremes, args, grid, global_scale, num_steps, view.finite_only)
    for where, piece in view.pieces(LOOKED_THROUGH):
        weight = None if weights is None else next(weights)[1]
        marked = close[where]
        if piece.numel() < group_size * marked.numel() or not bool(marked.any()):
            continue  # parts of groups: sums of so many values leave little doubt
        batch.add(where, marked.nonzero(as_tuple=True), piece, weight)
    batch.decide()


class _Batch:
    """Groups gathered for one call of the reference."""

    def __init__(
        self,
        found: Range,
        extremes: Range,
        args: QuantizationArgs,
        grid: ShrinkGrid,
        global_scale: Tensor | None,
        num_steps: int,
        finite_only: bool,
    ) -> None:
        self.found, self.extremes, self.args, self.grid = found, extremes, args, grid
        self.global_scale, self.num_steps = global_scale, num_steps
        self.finite_only = finite_only
        self._clear()

    def _clear(self) -> None:
        self.places: list[tuple[tuple[slice, ...], tuple[Tensor, ...]]] = []
        self.values: list[Tensor] = []
        self.weights: list[Tensor] = []

    def add(
        self,
        where: tuple[slice, ...],
        marked: tuple[Tensor, ...],
        piece: Tensor,
        weight: Tensor | None,
    ) -> None:
        self.places.append((where, marked))
        self.values.append(piece[marked].flatten(1))
        if weight is not None:
            self.weights.append(weight[marked].flatten(1))
        if sum(values.numel() for values in self.values) >= GATHERED:
            self.decide()

    def decide(self) -> None:
        if not self.places:
            return
        view = GroupedView(torch.cat(self.values), (1,), finite_only=self.finite_only)
        low, high = (
            torch.cat([whole[where][marked] for where, marked in self.places])
            for whole in self.extremes
        )
        lows, highs = grid_eager.search_few(
            view,
            (low, high),
            self.args,
            self.grid,
            GroupedView(torch.cat(self.weights), (1,)) if self.weights else None,
            self.global_scale,
            self.num_steps,
        )
        sizes = [len(values) for values in self.values]
        for (where, marked), its_low, its_high in zip(
            self.places, lows.split(sizes), highs.split(sizes), strict=True
        ):
            self.found[0][where][marked], self.found[1][where][marked] = its_low, its_high
        self._clear()
