"""No rank waits for ever, and all are told which one is to blame."""

from __future__ import annotations

from pathlib import Path

import pytest

from distributed import work
from rank_processes import run_ranks


def test_an_exception_on_one_rank_is_told_to_all(tmp_path: Path) -> None:
    found = run_ranks(work.failing, 3, tmp_path, 1)
    kind, text, _ = found[1]
    assert kind == "RuntimeError"  # torch's own, of a matrix of another width
    for rank in (0, 2):
        other, told, seconds = found[rank]
        assert other == "RankError"
        assert told.startswith("rank 1 failed at 'running batches': RuntimeError: ")
        assert text.splitlines()[0] in told
        assert seconds < 30  # not the timeout of ten minutes


def test_a_rank_that_never_comes_is_named(tmp_path: Path) -> None:
    found = run_ranks(work.never_there, 3, tmp_path, 1)
    for rank in (0, 2):
        kind, told, seconds = found[rank]
        assert kind == "RankError"
        assert "rank 1" in told
        assert "'statistics of observers'" in told or "waited 2 s" in told
        assert 2 <= seconds < 12


def test_a_slow_rank_that_shows_life_is_waited_for(tmp_path: Path) -> None:
    found = run_ranks(work.slow, 2, tmp_path)
    for each in found:
        if isinstance(each, Exception):
            raise each
    assert found[0]["batches"] == 7
    assert found[0]["tokens"] == found[1]["tokens"]


def test_ranks_with_other_modules_are_refused(tmp_path: Path) -> None:
    found = run_ranks(work.otherwise, 2, tmp_path)
    for told in found:
        assert "all ranks must calibrate the same model" in told
        assert "rank 1 holds" in told


@pytest.mark.parametrize("timeout", [0, -1, True, "soon"])
def test_a_timeout_is_a_number_of_seconds(timeout: object) -> None:
    with pytest.raises(ValueError, match="timeout: expected a positive number of seconds"):
        work.Ranks(timeout=timeout)  # type: ignore[arg-type]
