"""Ranks that calibrate together come to the scales of one process, whoever saw what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from distributed import work
from rank_processes import run_ranks

SCHEMES: dict[str, dict[str, Any]] = {
    "static_minmax": {"scheme": "FP8"},
    "histogram": {"scheme": "W8A8", "activation_observer": "histogram"},
    "optimal": {"scheme": "W4A16", "scheme_options": {"group_size": 16}},
    "hessian": {
        "scheme": "W4A16",
        "scheme_options": {"group_size": 16},
        "observer_options": {"objective": "hessian"},
    },
    "imatrix_mse": {
        "scheme": "W4A16",
        "observer": "imatrix_mse",
        "scheme_options": {"group_size": 16},
    },
    "nvfp4": {"scheme": "NVFP4"},
}
MISSING = {"on_missing": "fallback"}


def check(found: list[Any], whole: dict[str, Any]) -> None:
    for rank in found:
        if isinstance(rank, Exception):
            raise rank
        assert rank["scales"].keys() == whole["scales"].keys()
        for name, value in whole["scales"].items():
            assert torch.equal(rank["scales"][name], value), name
        assert {k: v for k, v in rank.items() if k != "scales"} == {
            k: v for k, v in whole.items() if k != "scales"
        }


def options(name: str) -> dict[str, Any]:
    return {**SCHEMES[name], **MISSING, "ignore": ["unused"]}


@pytest.mark.parametrize("name", ["static_minmax", "optimal"])
def test_two_ranks_come_to_the_scales_of_one_process(name: str, tmp_path: Path) -> None:
    whole = work.calibrated(work.batches(), options(name))
    check(run_ranks(work.calibrated_ranks, 2, tmp_path, "dealt", options(name)), whole)


@pytest.mark.slow
@pytest.mark.parametrize("split", ["dealt", "rows", "last"])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("name", SCHEMES)
def test_any_split_over_any_number_of_ranks_gives_the_same(
    name: str, world: int, split: str, tmp_path: Path
) -> None:
    whole = work.calibrated(work.batches(), options(name))
    check(run_ranks(work.calibrated_ranks, world, tmp_path, split, options(name)), whole)
