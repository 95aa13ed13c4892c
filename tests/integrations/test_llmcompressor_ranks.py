"""Ranks that saw nothing take part in what brings the ranks together; none waits for ever."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("llmcompressor")
pytestmark = pytest.mark.slow

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    store = tmp_path_factory.mktemp("ranks") / "store"
    environment = {**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TESTS / "integrations" / "ranks.py"), str(store)]
    ranks = [
        subprocess.Popen([*command, str(rank)], env=environment, stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    found = []
    for rank in ranks:
        output, _ = rank.communicate(timeout=240)
        (line,) = [line for line in output.splitlines() if line.startswith("HELD ")]
        found.append(json.loads(line.removeprefix("HELD ")))
    return found


def test_all_ranks_come_to_the_same(held: list[dict[str, Any]]) -> None:
    assert held[0] == held[1]


def test_extremes_are_those_of_all_ranks(held: list[dict[str, Any]]) -> None:
    assert held[0]["static_minmax -1"] == [-3, 3]
    assert held[0]["static_minmax 0"] == [-3, 3]
    assert held[0]["static_minmax 1"] == [-2, 2]


def test_moving_averages_are_weighed_by_batches(held: list[dict[str, Any]]) -> None:
    first = 1 * 0.99 + 2 * 0.01
    assert held[0]["minmax -1"] == pytest.approx([-(2 * first + 3) / 3, (2 * first + 3) / 3])
    assert held[0]["minmax 0"] == [-3, 3]
    assert held[0]["minmax 1"] == pytest.approx([-first, first])


def test_sums_of_inputs_are_added(held: list[dict[str, Any]]) -> None:
    assert held[0]["imatrix_mse -1"] == [2, 13]
    assert held[0]["imatrix_mse 0"] == [1, 9]
    assert held[0]["imatrix_mse 1"] == [1, 4]


def test_where_no_rank_saw_anything_nothing_is_made_up(held: list[dict[str, Any]]) -> None:
    assert held[0]["nothing"] is False
