"""The matrix of docs/models.md: what comes of each architecture is what the result file says."""

from __future__ import annotations

import pytest
import transformers

from benchmarks.models import MODELS, RESULT, measure
from benchmarks.results import FOLDER, Result

RECORDED = Result.read(FOLDER / RESULT)
QUICK = 4


@pytest.mark.skipif(
    transformers.__version__ != RECORDED.versions["transformers"],
    reason="what other versions of transformers load differs",
)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if number < QUICK else pytest.mark.slow)
        for number, name in enumerate(MODELS)
    ],
)
def test_what_comes_of_a_model_is_what_the_table_says(name: str) -> None:
    tables = RECORDED.tables
    row, _ = measure(name)
    assert row == next(dict(each) for each in tables["models"].rows if each["model"] == name)


def test_every_model_has_a_row() -> None:
    assert [row["model"] for row in RECORDED.tables["models"].rows] == list(MODELS)
