"""Groups in which two candidates are as good as one another but for rounding.

Which of them the reference takes is decided by the order in which it sums; so it is asked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from calipers.engines.kernels import GridProblem
from calipers.grouping import Groups

__all__ = ["decide_ties"]

#: Values looked through at a time, and values gathered for one call of the reference.
LOOKED_THROUGH, GATHERED = 2**22, 2**20

Range = tuple[Tensor, Tensor]


def decide_ties(
    search_few: Callable[[GridProblem, int], Range],
    problem: GridProblem,
    found: Range,
    ties: Tensor,
    num_steps: int,
) -> None:
    """Search the groups that are marked by the reference, and write what it finds.

    Args:
        search_few: The reference, for groups of shape (groups, n).
        problem: The values of the view.
        found: Minimum and maximum found for each group, to be corrected in place.
        ties: Which groups, of the view's `qparam_shape`.
        num_steps: Steps that the search came to.
    """
    view, importance = problem.view, problem.importance
    weights = None if importance is None else importance.chunks(LOOKED_THROUGH)
    group_size = view.values.numel() // max(1, ties.numel())
    gathered: list[_Ties] = []

    def decide() -> None:
        if gathered:
            _decide(search_few, problem, found, gathered, num_steps)
            gathered.clear()

    for where, piece in view.chunks(LOOKED_THROUGH):
        weight = None if weights is None else next(weights)[1]
        marked = ties[where]
        if piece.numel() < group_size * marked.numel() or not bool(marked.any()):
            continue  # parts of groups: sums of so many values leave little doubt
        index = marked.nonzero(as_tuple=True)
        its_weight = None if weight is None else weight[index].flatten(1)
        gathered.append((where, index, piece[index].flatten(1), its_weight))
        if sum(values.numel() for _, _, values, _ in gathered) >= GATHERED:
            decide()
    decide()


#: Where some groups lie (of which part of the qparams which ones), their values and weights.
_Ties = tuple[tuple[slice, ...], tuple[Tensor, ...], Tensor, Tensor | None]


def _decide(
    search_few: Callable[[GridProblem, int], Range],
    problem: GridProblem,
    found: Range,
    gathered: list[_Ties],
    num_steps: int,
) -> None:
    """One call of the reference for all groups gathered."""
    places = [(where, index) for where, index, _, _ in gathered]
    values = [its_values for _, _, its_values, _ in gathered]
    weights = [weight for _, _, _, weight in gathered if weight is not None]
    ranges = search_few(
        replace(
            problem,
            view=Groups(torch.cat(values), (1,), finite_only=problem.view.finite_only),
            low=torch.cat([problem.low[where][index] for where, index in places]),
            high=torch.cat([problem.high[where][index] for where, index in places]),
            importance=Groups(torch.cat(weights), (1,)) if weights else None,
        ),
        num_steps,
    )
    sizes = [len(its_values) for its_values in values]
    for target, ends in zip(found, ranges, strict=True):
        for (where, index), its_ends in zip(places, ends.split(sizes), strict=True):
            target[where][index] = its_ends
