"""`choose`: one option for each item, of the least cost within a budget, exactly."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from math import gcd

from calipers.errors import CalipersError

__all__ = ["choose"]


def choose(
    costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: int
) -> list[int]:
    """Solve the multiple-choice knapsack problem, to its optimum.

    Args:
        costs: For each item the cost of each of its options, >= 0 and finite, in any unit.
        sizes: Their sizes, whole numbers.
        budget: Most that the chosen options may have in all, in the unit of the sizes.

    Returns:
        The number of the chosen option for each item.

    Raises:
        CalipersError: The smallest options are larger than the budget, or scipy is not installed.

    Example:
        >>> choose([[9.0, 1.0], [3.0, 1.0]], [[4, 8], [4, 8]], budget=12)
        [1, 0]
    """
    least = sum(min(each) for each in sizes)
    if least > budget:
        raise CalipersError(f"budget: expected at least {least}, got {budget}")
    if not costs:
        return []
    try:
        import numpy as np
        from scipy.optimize import LinearConstraint, milp
        from scipy.sparse import csr_matrix
    except ImportError:
        raise CalipersError(
            "a plan needs scipy: install calipers with its extra, calipers[plan]"
        ) from None
    unit = reduce(gcd, (size for each in sizes for size in each)) or 1
    numbers = [range(len(each)) for each in costs]
    place = [item for item, options in enumerate(numbers) for _ in options]
    cost = np.array([value for each in costs for value in each], dtype=np.float64)
    size = np.array([value // unit for each in sizes for value in each], dtype=np.float64)
    # float64 costs of any unit: the solver's tolerances are absolute
    largest = float(cost.max())
    cost = cost / largest if largest > 0 else cost
    one_each = csr_matrix((np.ones(len(place)), (place, range(len(place)))))
    limit = budget // unit
    # the solver's tolerance may let in a size that is a unit too large: then it tries again
    for tried in range(limit, limit - 64, -1):
        found = milp(
            cost,
            integrality=np.ones(len(place)),
            bounds=(0, 1),
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint(size[None, :], -np.inf, tried),
            ],
            options={"mip_rel_gap": 0.0},
        )
        if found.x is None:
            raise CalipersError(f"scipy's milp found no plan: {found.message}")
        taken = found.x.round().astype(bool)
        if size[taken].sum() <= limit and taken.sum() == len(costs):
            starts = np.cumsum([0, *(len(each) for each in costs)])[:-1]
            places = np.flatnonzero(taken)
            return [int(p - s) for p, s in zip(places, starts, strict=True)]
    raise CalipersError("scipy's milp found no plan within the budget")
