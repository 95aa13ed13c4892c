"""What a report answers and shows: `report[name]`, `worst`, `print`, notebooks, pandas."""

from __future__ import annotations

import math
import sys
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

from calibration.tiny_models import tiny_llama
from calipers import CalibrationReport, CalipersError, calibrate
from calipers.calibration import LeftAlone, ModuleReport
from calipers.calibration.report import WeightMeasures
from calipers.errors import UnknownModuleError

NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def large_report(layers: int = 60) -> CalibrationReport:
    """Long names, many kinds, many things left alone."""
    modules = [
        ModuleReport(
            f"model.language_model.layers.{layer}.mixture_of_experts.{name}_{kind}",
            weight_observer="nvfp4_expanded_mse_with_a_long_name",
            weight_bits=4,
            weight_error=0.1 + layer / 1000,
            activations="dynamic",
            objective="imatrix",
        )
        for layer in range(layers)
        for name in NAMES
        for kind in ("first", "second")
    ]
    left = [LeftAlone(f"part_{i}.with_a_name" * 6, "Linear", "not targeted", 9) for i in range(9)]
    return CalibrationReport(modules, left_alone=left, batches=3, seconds=12.34)


def test_a_module_by_name():
    report = calibrate(tiny_llama(), "W4A16")
    name = report.modules[3].name
    assert report[name] is report.modules[3]
    assert name in report
    assert report.modules[3] in report
    assert "nothing" not in report
    assert list(report) == report.modules


def test_a_name_that_there_is_not_says_why():
    report = calibrate(tiny_llama(), "W4A16")
    with pytest.raises(UnknownModuleError, match=r"'lm_head': it was left alone \(output head\)$"):
        report["lm_head"]
    with pytest.raises(KeyError, match=r"Did you mean 'model\.layers\.0\.mlp\.up_proj'\?"):
        report["model.layers.0.mlp.up_prj"]
    with pytest.raises(ValueError, match=r"no quantized module 0$"):
        report[0]


def test_worst():
    errors = {"a": 0.1, "b": None, "c": 0.3, "d": math.nan, "e": 0.0, "f": 0.2}
    report = CalibrationReport([ModuleReport(n, weight_error=e) for n, e in errors.items()])
    assert [row.name for row in report.worst()] == ["d", "c", "f", "a", "e"]
    assert [row.name for row in report.worst(2)] == ["d", "c"]
    assert report.worst(0) == []
    assert CalibrationReport().worst() == []
    for wrong in (-1, 1.5, True, "2"):
        with pytest.raises(CalipersError, match="whole number from 0"):
            report.worst(wrong)


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [("W4A16", None), ("FP8", "static"), ("FP8_DYNAMIC", "dynamic"), ("NVFP4", "local")],
)
def test_how_activations_are_quantized(scheme: str, expected: str | None):
    model = nn.Sequential(nn.Linear(128, 64))
    data = None if expected in (None, "dynamic") else [torch.randn(4, 128)]
    [row] = calibrate(model, scheme, "memoryless_minmax", data).modules
    assert row.activations == expected


@pytest.mark.parametrize("report", [large_report(), large_report(1)], ids=["layers", "a layer"])
def test_one_screen_holds_any_report(report: CalibrationReport):
    lines = str(report).splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    assert "... and 6 other kinds of modules" in str(report)
    assert "... and 6 other kinds (see left_alone)" in str(report)


def test_the_screen_says_what_was_done():
    report = calibrate(tiny_llama(), "FP8_DYNAMIC")
    text = str(report)
    assert text.startswith("7 modules quantized, 100.0% of the projection weights; ")
    assert "\nobserver memoryless_minmax, bits 8, activations dynamic\n" in text
    name = "model.layers.0.mlp.up_proj"
    error = f"{report[name].weight_error:.4f}"
    assert [name, "1", error, f"({error})"] in [line.split() for line in text.splitlines()]
    worst = report.worst(1)[0]
    _, _, tail = text.partition("largest weight errors\n")
    assert tail.splitlines()[0].split() == [worst.name, f"{worst.weight_error:.4f}"]
    assert "lm_head: output head" in text


def test_what_differs_has_a_column():
    rows = [
        ModuleReport("a.0.b", "optimal", 4, 0.125, objective="imatrix"),
        ModuleReport("a.1.b", "optimal", 4, 0.375, objective="imatrix"),
        ModuleReport("c", "optimal", 8, 0.5, "static_minmax", activations="static"),
    ]
    assert str(CalibrationReport(rows)).splitlines()[1:4] == [
        "modules  count  weight error (max)  observer           bits  activations",
        "a.*.b    2      0.2500 (0.3750)     optimal (imatrix)  4     -",
        "c        1      0.5000 (0.5000)     optimal            8     static_minmax",
    ]


def test_an_empty_report_has_a_screen_too():
    assert str(CalibrationReport()) == (
        "0 modules quantized, 100.0% of the projection weights; 0.0 s"
    )


class Tables(HTMLParser):
    """Cells of all tables, and that every tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.cells: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["td"]:
            self.cells.append(data)


def test_html():
    row = ModuleReport("<b>.0", "optimal", 4, 0.25, activations="dynamic")
    cells = Tables(CalibrationReport([row])._repr_html_()).cells
    assert cells == ["<b>.0", "1", "0.2500 (0.2500)", "optimal", "4", "dynamic", "<b>.0", "0.2500"]
    assert "<table>" not in CalibrationReport()._repr_html_()


def test_dataframe():
    pytest.importorskip("pandas")
    report = large_report(2)
    frame = report.to_dataframe()
    assert list(frame.index) == [row.name for row in report.modules]
    assert frame["weight_error"].tolist() == [row.weight_error for row in report.modules]
    nested = {"name", "weight", "activation_measures", "plots"}
    measures = set(WeightMeasures.__dataclass_fields__) - {"error", "bits"}
    assert set(frame.columns) == set(ModuleReport.__dataclass_fields__) - nested | measures
    assert list(CalibrationReport().to_dataframe().columns) == list(frame.columns)


def test_measures_are_columns_of_a_dataframe():
    pytest.importorskip("pandas")
    report = calibrate(tiny_llama(), "W4A16", "memoryless_minmax")
    frame = report.to_dataframe()
    assert frame["sqnr_db"].tolist() == [row.weight.sqnr_db for row in report.modules]


def test_without_pandas_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(CalipersError, match=r"calipers\[notebook\]"):
        CalibrationReport().to_dataframe()
