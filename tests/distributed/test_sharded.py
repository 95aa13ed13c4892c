"""Scales of weights that are spread over ranks are those of the whole weight, bit for bit."""

from __future__ import annotations

from math import ceil
from pathlib import Path
from typing import Any

import pytest

from distributed import sharded_work as work
from rank_processes import run_ranks


def is_torn(key: str, shape: tuple[int, int], dim: int, world: int) -> bool:
    """Whether groups lie in several shards."""
    size = {
        "tensor": shape,
        "group": (1, 8),
        "block": (4, 16),
        "tensor_group": (1, 16),
    }.get(key, (1, shape[1]))
    return key == "tensor" or ceil(shape[dim] / world) % size[dim] != 0


def check(found: list[Any], world: int, *, searches: bool) -> None:
    for rank in found:
        if isinstance(rank, Exception):
            raise rank
        for case, (told, gathers, reductions) in rank.items():
            name, key, shape, dim, _ = case
            assert not told, f"{case}: {told}"
            torn = is_torn(key, shape, dim, world)
            whole = searches and (torn or (name == "optimal, hessian" and dim == 1))
            assert gathers == whole, case
            # one for the global scale of NVFP4, and one for groups in several shards
            expected = (key == "tensor_group") + (torn and not whole)
            assert reductions == expected, case


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_extremes_are_never_gathered(world: int, tmp_path: Path) -> None:
    check(run_ranks(work.all_cases, world, tmp_path, work.EXTREMES), world, searches=False)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3, 4])
def test_searches_are_gathered_only_where_groups_lie_in_several_shards(
    world: int, tmp_path: Path
) -> None:
    names = list(work.SEARCHES)
    check(run_ranks(work.all_cases, world, tmp_path, names), world, searches=True)


@pytest.mark.slow
def test_rows_and_columns_may_both_be_cut(tmp_path: Path) -> None:
    for rank in run_ranks(work.two_dimensions, 4, tmp_path):
        if isinstance(rank, Exception):
            raise rank
        for key, (told, gathers, _) in rank.items():
            assert not told, key
            assert not gathers, key


@pytest.mark.slow
def test_a_shard_without_a_number_takes_part(tmp_path: Path) -> None:
    for told in run_ranks(work.nothing_but_nan, 2, tmp_path):
        assert "all observed values are NaN or Inf" in str(told)


@pytest.mark.slow
def test_a_model_with_such_weights_is_refused(tmp_path: Path) -> None:
    for told in run_ranks(work.calibrated, 2, tmp_path):
        assert "0: its weight is a DTensor that is spread over ranks" in str(told)
