"""Figures of reports: what is drawn, and what is refused."""

from __future__ import annotations

import io
import re
import sys

import pytest

from calipers.calibration import CalibrationReport, ExpertCoverage, ModuleReport
from calipers.errors import CalipersError
from calipers.reports import plot
from calipers.reports.plot import draw_tensor, new_figure
from calipers.reports.records import choose_measure, place_of
from calipers.reports.svg import to_svg
from reports.fabricated import PROJECTIONS, of_an_earlier_calipers, report, with_experts

pytest.importorskip("matplotlib")


def test_depth_has_a_line_for_each_projection_in_percent() -> None:
    told = report(layers=3)
    axes = plot(told).axes[0]
    assert [line.get_label() for line in axes.lines] == list(PROJECTIONS)
    assert list(axes.lines[0].get_xdata()) == [0, 1, 2]
    errors = [row["weight"]["output_error"] for row in told["modules"][::7]]
    assert list(axes.lines[0].get_ydata()) == pytest.approx([100 * each for each in errors])
    assert axes.get_ylabel() == "output error, %"


def test_no_two_lines_look_the_same() -> None:
    told = report(layers=2)
    told["modules"] = [
        {"name": f"h.{layer}.p{i}", "weight_error": 0.1} for layer in range(2) for i in range(21)
    ]
    drawn = io.StringIO()
    plot(told).savefig(drawn, format="svg")
    styles = re.findall(r'<g id="s\d+">\s*<path[^>]* style="([^"]+)"', drawn.getvalue())
    assert len(set(styles)) == len(styles) == 21


def test_heatmap_has_every_number() -> None:
    told = report(layers=3)
    axes = plot(told, "heatmap", measure="error").axes[0]
    shown = [text.get_text() for text in axes.texts]
    assert shown == [f"{100 * row['weight_error']:.3g}" for row in told["modules"]]


def test_a_tensor_has_its_range_and_its_curve_ends_there() -> None:
    told = report(layers=1, activations=True)
    name = told["modules"][3]["name"]
    figure = plot(told, "module", name)
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        f"{name}, weight",
        f"{name}, input",
    ]
    curve = next(line for line in figure.axes[0].lines if line.get_gid() == "curve")
    lowest = min(zip(curve.get_ydata(), curve.get_xdata(), strict=True))[1]
    assert lowest == pytest.approx(told["modules"][3]["plots"]["weight"]["range"][1])


def test_coverage_reaches_from_fewest_to_most() -> None:
    axes = plot(with_experts(), "coverage").axes[0]
    segments = axes.collections[0].get_segments()
    assert [[y for _, y in each] for each in segments] == [[0, 1960]] * 2


def test_the_method_draws_the_same() -> None:
    modules = [ModuleReport(f"h.{i}.fc", "optimal", 4, 0.1 + i / 100) for i in range(3)]
    coverage = [ExpertCoverage("h.0.experts", {"h.0.experts.0": 3}, 256)]
    told = CalibrationReport(modules, coverage=coverage)
    assert list(told.plot().axes[0].lines[0].get_ydata()) == pytest.approx([10, 11, 12])
    assert told.plot(kind="coverage").axes
    with pytest.raises(CalipersError, match=r"h\.0\.fc: its record has no histogram to draw"):
        told.plot(kind="module", module="h.0.fc")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kind": "pie"}, "kind must be one of depth, heatmap, module, coverage, got 'pie'"),
        ({"kind": "module"}, "module: expected a name with kind='module'"),
        ({"module": "x"}, "and none otherwise, got 'x' with kind='depth'"),
        ({"kind": "module", "module": "x"}, "expected the name of a quantized module, got 'x'"),
        ({"measure": "loss"}, "measure must be one of held_out_error, output_error, error, got"),
        ({"kind": "coverage"}, "no experts were counted"),
        ({"measure": "output_error"}, "there is no output error of numbered layers to draw"),
        ({"kind": "heatmap", "measure": "output_error"}, "there is no output error of numbered"),
    ],
)
def test_what_cannot_be_drawn_is_said(given: dict[str, str], message: str) -> None:
    with pytest.raises(CalipersError, match=re.escape(message)):
        plot(of_an_earlier_calipers(), **given)  # type: ignore[arg-type]


def test_without_matplotlib_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(CalipersError, match=r"pip install 'calipers\[plot\]'"):
        plot(report(layers=1))


def test_svg_takes_its_looks_from_the_page_and_draws_the_same_outline() -> None:
    figure = new_figure(3.2, 1)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    draw_tensor(axes, report(layers=1)["modules"][0]["plots"]["weight"])
    svg = to_svg(figure, 'a "weight" <1>')
    assert svg.startswith('<svg viewBox="0 0 230.4 72" role="img" aria-label="a &quot;weight&quot;')
    assert re.findall(r'class="(\w+)"', svg) == ["range", "bars", "curve"]
    assert "style" not in svg
    assert "id=" not in svg
    outline = re.search(r'class="bars"><path d="M([^"]+)"', svg)
    assert outline is not None
    # a bar of the 64 is 3.6 points wide, of which the shown values leave a margin at both sides
    steps = [float(each) for each in re.findall(r"h(-?[\d.]+)", outline[1])]
    assert sum(each for each in steps if each > 0) == pytest.approx(230.4, abs=64 * 0.05)


def test_places_and_measures() -> None:
    assert place_of("bert.encoder.layer.11.output.dense").layer == 11
    assert place_of("0").layer == 0
    assert place_of("h2.proj").layer is None
    assert choose_measure([report(layers=1)]).key == "output_error"
    assert choose_measure([report(layers=1), of_an_earlier_calipers()]).key == "error"
