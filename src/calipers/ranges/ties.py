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
    num_candidates: int,
) -> None:
    """Search the groups that are marked by the reference, and write what it finds.

    Args:
        search_few: The reference, for groups of shape (groups, n).
        problem: The values of the view.
        found: Minimum and maximum found for each group, to be corrected in place.
        ties: Which groups, of the view's `qparam_shape`.
        num_candidates: Candidates that the search came to.
    """
    view, importance = problem.view, problem.importance
    others = None if importance is None else importance.chunks(LOOKED_THROUGH)
    group_size = view.values.numel() // max(1, ties.numel())
    gathered: list[_Ties] = []

    def decide() -> None:
        if gathered:
            _decide(search_few, problem, found, gathered, num_candidates)
            gathered.clear()

    for where, chunk in view.chunks(LOOKED_THROUGH):
        its_importance = None if others is None else next(others)[1]
        marked = ties[where]
        if chunk.numel() < group_size * marked.numel() or not bool(marked.any()):
            continue  # splits of groups: sums of so many values leave little doubt
        index = marked.nonzero(as_tuple=True)
        if its_importance is not None:
            its_importance = its_importance[index].flatten(1)
        gathered.append((where, index, chunk[index].flatten(1), its_importance))
        if sum(values.numel() for _, _, values, _ in gathered) >= GATHERED:
            decide()
    decide()


#: Where some groups lie (in which slices of the qparams which ones), their values and importance.
_Ties = tuple[tuple[slice, ...], tuple[Tensor, ...], Tensor, Tensor | None]


def _decide(
    search_few: Callable[[GridProblem, int], Range],
    problem: GridProblem,
    found: Range,
    gathered: list[_Ties],
    num_candidates: int,
) -> None:
    """One call of the reference for all groups gathered."""
    places = [(where, index) for where, index, _, _ in gathered]
    values = [its_values for _, _, its_values, _ in gathered]
    importance = [importance for _, _, _, importance in gathered if importance is not None]
    ranges = search_few(
        replace(
            problem,
            view=Groups(torch.cat(values), (1,), finite_only=problem.view.finite_only),
            low=torch.cat([problem.low[where][index] for where, index in places]),
            high=torch.cat([problem.high[where][index] for where, index in places]),
            importance=Groups(torch.cat(importance), (1,)) if importance else None,
        ),
        num_candidates,
    )
    sizes = [len(its_values) for its_values in values]
    for target, ends in zip(found, ranges, strict=True):
        for (where, index), its_ends in zip(places, ends.split(sizes), strict=True):
            target[where][index] = its_ends
