"""The matrix of docs/models.md: what comes of each architecture is what the result file says."""

from __future__ import annotations

import pytest
import transformers

from benchmarks.models import MODELS, RESULT, measure, tables_of
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
    for key, table in tables_of([measure(name)]).items():
        recorded = [dict(row) for row in RECORDED.tables[key].rows if row["model"] == name]
        assert table.rows == recorded


def test_every_model_has_a_row() -> None:
    assert [row["model"] for row in RECORDED.tables["models"].rows] == list(MODELS)
