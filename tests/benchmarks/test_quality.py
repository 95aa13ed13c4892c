"""The quality benchmark runs, and its oracles are optima."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs

from calipers.demo import MODEL_PATH


@pytest.fixture
def oracles() -> ModuleType:
    return importlib.import_module("benchmarks.quality.oracles")


def test_activations_and_oracles_are_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    parts = ["--parts", "activations", "oracles", "--formats", "^(int8|MXFP4)$", "--quick"]
    threads = ["--threads", str(torch.get_num_threads())]
    run = importlib.import_module("benchmarks.quality.run")
    assert run.main([*parts, *threads, "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["versions"]["torch"] == importlib.metadata.version("torch")
    activations, oracles = (found["tables"][name]["rows"] for name in ("activations", "oracles"))
    assert max(row["histogram"] for row in activations) < 0.3
    assert max(row["static_minmax"] for row in activations) > 10
    assert [row["format"] for row in oracles] == ["int8", "MXFP4"]
    for row in oracles:
        assert row["optimal imatrix, log-sigma 1"] < 0.2 < row["imatrix_mse, log-sigma 1"]
    assert "| MXFP4 |" in capsys.readouterr().out


def test_nothing_is_better_than_the_optimum() -> None:
    oracles = importlib.import_module("benchmarks.quality.oracles")
    found = oracles.measure_excess(quick=True, only="^MXFP4$")["results"]
    assert found
    assert all(row["excess"] > -1e-3 for row in found)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_walking_breakpoints_is_a_dense_search(oracles: ModuleType, bits: int) -> None:
    args = QuantizationArgs(num_bits=bits, strategy="group", group_size=16)
    generator = torch.Generator().manual_seed(bits)
    x = torch.randn(3, 4, 16, generator=generator, dtype=torch.float64)
    w = torch.rand(3, 4, 16, generator=generator, dtype=torch.float64)
    exact = oracles.walk_breakpoints(x, w, args, None)
    dense = oracles.try_dense_scales(x, w, args, None)
    assert (exact <= dense * (1 + 1e-6)).all()
    torch.testing.assert_close(exact, dense, rtol=2e-3, atol=0)


def test_plot_is_an_image_with_a_bar_for_each_value() -> None:
    plot = importlib.import_module("benchmarks.quality.plot")
    cells = {
        (name, kind): ratio
        for kind in ("int4 g64", "NVFP4")
        for name, ratio in (("llmcompressor imatrix_mse", 1.0), ("optimal imatrix", 0.8))
    }
    table = importlib.import_module("benchmarks.quality.run").crossed("observer", cells, "{:.2f}")
    image = ElementTree.fromstring(plot.draw(table))
    titles = [element.text for element in image.iter() if element.tag.endswith("title")]
    assert titles[1] == "int4 g64, optimal imatrix: 0.80"
    assert len(titles) == 4


@pytest.mark.slow
def test_observers_are_compared_by_the_command() -> None:
    compare = importlib.import_module("benchmarks.quality.compare")
    short = ["--samples", "2", "--eval-samples", "3", "--sequence-length", "32"]
    observers = ["memoryless_minmax", "optimal:objective=mse"]
    runs = compare.compare(MODEL_PATH, "int3, groups of 64", observers, short)
    assert [run["observer"] for run in runs] == ["memoryless_minmax", "optimal"]
    for run in runs:
        for figure in run["change"].values():
            assert isinstance(figure, float)
    table = compare.table_of("smollm2", [compare.row_of("smollm2", "int3", compare.BOTH, runs)])
    (cells,) = table.cells()
    assert cells[0] == "int3"
    assert "% ± " in cells[1]
    assert cells[3] == ""
