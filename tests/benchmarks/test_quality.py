"""The quality benchmark runs, and its oracles are optima."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs

QUALITY = Path(__file__).resolve().parents[2] / "benchmarks" / "quality"


@pytest.fixture(autouse=True)
def _on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(QUALITY))


@pytest.fixture
def oracles() -> ModuleType:
    return importlib.import_module("oracles")


def test_activations_and_oracles_are_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    parts = ["--parts", "activations", "oracles", "--formats", "^(int8|MXFP4)$", "--quick"]
    threads = ["--threads", str(torch.get_num_threads())]
    assert importlib.import_module("run").main([*parts, *threads, "--json", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report["environment"]["torch"] == torch.__version__
    by_observer: dict[str, list[float]] = {}
    for row in report["activations"]["results"]:
        by_observer.setdefault(row["observer"], []).extend(
            [row["excess"], row["reversed"], row["merged"]]
        )
    assert max(by_observer["histogram"]) < 0.3
    assert max(by_observer["static_minmax"]) > 10
    excess = {row["observer"]: row["excess"] for row in report["oracles"]["results"]}
    assert all(value > -1e-3 for value in excess.values()), "better than the optimum"
    assert "| memoryless_minmax |" in capsys.readouterr().out


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
    plot = importlib.import_module("plot")
    rows = [
        {"format": kind, "observer": name, "ratio": ratio}
        for kind in ("int4 g64", "NVFP4")
        for name, ratio in (("llmcompressor imatrix_mse", 1.0), ("optimal imatrix", 0.8))
    ]
    image = ElementTree.fromstring(plot.draw({"minilm": {"results": rows}}))
    titles = [element.text for element in image.iter() if element.tag.endswith("title")]
    assert titles[1] == "int4 g64, optimal imatrix: 0.80"
    assert len(titles) == 4
