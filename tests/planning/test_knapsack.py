"""The chosen options are the best ones: against all of them, on small instances."""

from __future__ import annotations

import itertools
import random

import pytest

from calipers.errors import CalipersError
from calipers.planning.knapsack import choose


def best_of_all(costs: list[list[float]], sizes: list[list[int]], budget: int) -> float:
    return min(
        sum(c[i] for c, i in zip(costs, picked, strict=True))
        for picked in itertools.product(*(range(len(each)) for each in costs))
        if sum(s[i] for s, i in zip(sizes, picked, strict=True)) <= budget
    )


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("unit", [1e-9, 1.0, 1e12])
def test_as_good_as_the_best_of_all(seed: int, unit: float) -> None:
    draw = random.Random(seed)
    costs, sizes = [], []
    for _ in range(6):
        options = draw.randint(1, 4)
        costs.append([draw.random() * unit for _ in range(options)])
        sizes.append([draw.randint(1, 10**6) for _ in range(options)])
    least, most = sum(map(min, sizes)), sum(map(max, sizes))
    budget = draw.randint(least, most)
    picked = choose(costs, sizes, budget)
    assert sum(s[i] for s, i in zip(sizes, picked, strict=True)) <= budget
    found = sum(c[i] for c, i in zip(costs, picked, strict=True))
    assert found == pytest.approx(best_of_all(costs, sizes, budget), rel=1e-9)


def test_greedy_would_be_worse() -> None:
    # by cost saved per size the first comes first, and leaves no room for the two others
    costs = [[15.0, 0.0], [9.0, 0.0], [9.0, 0.0]]
    sizes = [[0, 7], [0, 5], [0, 5]]
    assert choose(costs, sizes, 10) == [0, 1, 1]


def test_budget_below_the_smallest() -> None:
    with pytest.raises(CalipersError, match="budget: expected at least 8, got 7"):
        choose([[1.0], [1.0]], [[4], [4]], 7)
