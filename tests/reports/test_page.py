"""The page as text: what it says, what it leaves out, how large it is."""

from __future__ import annotations

import copy
import re
import sys
from html.parser import HTMLParser
from typing import Any

import pytest

from calipers.errors import CalipersError
from calipers.reports import pictures, render_page, sections
from calipers.reports.summary import find_missing, verdict_of
from reports.fabricated import of_an_earlier_calipers, report, with_experts, with_shadows

pytest.importorskip("matplotlib")
VOID = {"meta", "link", "wbr"}


class Reader(HTMLParser):
    """Checks that elements close in order, and keeps ids, links and words."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.words = ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        told = dict(attrs)
        self.ids += [told["id"]] if told.get("id") else []
        self.links += [told["href"] or ""] if "href" in told else []
        assert "src" not in told
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.words += data


@pytest.fixture(scope="module")
def page() -> str:
    return render_page({"W4A16": report(layers=4, activations=True)})


def test_it_is_one_file_whose_links_lead_somewhere(page: str) -> None:
    read = Reader(page)
    assert len(set(read.ids)) == len(read.ids)
    inner = [link.removeprefix("#") for link in read.links if link != "data:,"]
    assert len(inner) > 28
    assert set(inner) <= set(read.ids)
    assert not re.search(r"https?://(?!www\.w3\.org)", page)


def test_it_says_the_verdict_and_the_figures(page: str) -> None:
    words = Reader(page).words
    for text in (
        "+20.0% perplexity: usual for int4",
        "22.464",
        "0.0667",
        "63,514 tokens",
        "lm_head",
    ):
        assert text in words
    assert "What this report does not tell" not in words


def test_every_tensor_has_a_picture(page: str) -> None:
    assert len(re.findall(r"<article ", page)) == 28
    assert len(re.findall(r'aria-label="(?:weight|input) of ', page)) == 56


def test_numbers_are_sorted_by_their_value(page: str) -> None:
    told = report(layers=4, activations=True)
    table = page.split('id="modules-table"')[1].split("</table>")[0]
    heads = [re.sub("<.*?>", "", each) for each in re.findall(r"<th scope=\"col\".*?</th>", table)]
    column = heads.index("output error") - 1
    rows = table.split("<tbody>")[1].split("</tr>")[:-1]
    shown = [float(re.findall(r'<td class="n" data-v="([^"]*)"', row)[column]) for row in rows]
    errors = [row["weight"]["output_error"] for row in told["modules"]]
    assert shown == pytest.approx(errors, rel=1e-5)


def test_a_file_of_an_earlier_calipers_says_what_is_missing() -> None:
    told = of_an_earlier_calipers()
    words = Reader(render_page({"x": told})).words
    assert len(find_missing(told)) == 3
    for text in find_missing(told):
        assert text in words
    assert "Verdict" not in words
    assert "Histograms" not in words


@pytest.mark.parametrize(
    "broken",
    [
        {"modules": []},
        {"modules": [{"name": "x"}]},
        {"modules": [{"name": "h.0.x", "weight": None, "plots": None, "shadows": None}]},
        {"modules": [{"name": "h.0.x", "plots": {"weight": {"histogram": {"low": None}}}}]},
        {"modules": [], "measures": {"perplexity": {"relative": None}}, "left_alone": None},
    ],
)
def test_parts_that_lack_values_are_left_out(broken: dict[str, Any]) -> None:
    assert "What this report does not tell" in Reader(render_page({"x": broken})).words


def test_text_of_a_report_is_text() -> None:
    told = report(layers=1, model="<script>alert(1)</script>", scheme='"><b>')
    told["modules"][0]["name"] = 'model.layers.0.<img src=x>"'
    read = Reader(render_page({"<i>": told, "b": report(layers=1)}))
    assert "<img src=x>" in read.words
    assert "<script>" not in read.words or "alert" in read.words


def test_two_reports_are_compared_by_the_modules_they_share() -> None:
    first, second = report(layers=2), report(layers=3, level=0.2)
    second["modules"][0]["weight"]["output_error"] = 0.001
    page = render_page({"A": first, "B": second})
    words = Reader(page).words
    assert "14 modules in common" in words
    assert "Not in all of them: 7 of B" in words
    table = page.split('id="compared-modules"')[1].split("</table>")[0]
    rows = table.split("<tbody>")[1].split("</tr>")[:-1]
    best = [re.findall(r'<td class="n( best)?"', row)[:2].index(" best") for row in rows]
    pairs = zip(first["modules"], second["modules"][:14], strict=True)
    key = "output_error"
    assert best == [int(b["weight"][key] < a["weight"][key]) for a, b in pairs]
    assert best[0] == 1


def test_observers_of_the_same_tensors_stand_side_by_side() -> None:
    page = render_page({"x": with_shadows()})
    table = page.split("all tensors</caption>")[1].split("</table>")[0]
    shown = re.findall(r'data-v="([^"]*)"', table)
    # sqrt of the geometric mean of squared errors; best on 7 modules each; chosen everywhere
    assert [float(each) for each in shown] == pytest.approx(
        [0.1, 7, 14, (0.012 * 0.008) ** 0.25, 7, 0], rel=1e-4
    )


def test_experts_have_their_tokens() -> None:
    words = Reader(render_page({"x": with_experts()})).words
    assert "0 (0), 1 (40), 2 (160)" in words


def test_of_many_modules_the_worst_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sections, "MOST_ROWS", 10)
    monkeypatch.setattr(pictures, "MOST_DRAWN", 5)
    told = report(layers=3)
    page = render_page({"x": told})
    assert "the 10 worst modules; the file has 11 more" in page
    worst = sorted(told["modules"], key=lambda row: -row["weight"]["output_error"])[:5]
    drawn = re.findall(r'<article id="m-([^"]+)"', page)
    assert sorted(drawn) == sorted(row["name"] for row in worst)


def test_the_same_report_gives_the_same_page() -> None:
    told = report(layers=1)
    before = copy.deepcopy(told)
    assert render_page({"x": told}) == render_page({"x": told})
    assert told == before


@pytest.mark.slow
def test_the_page_of_210_modules_is_small() -> None:
    page = render_page({"A": report(activations=True), "B": report(seed=1)})
    assert len(page.encode()) < 3_000_000


def test_a_verdict_needs_a_known_scheme_and_a_figure() -> None:
    assert "was not measured" in (verdict_of(report(layers=1, scheme="mine.yaml")) or "")
    assert verdict_of(report(layers=1, measures=None)) is None
    outputs = {"perplexity": None, "output_error": {"value": 0.4, "standard_error": 0.01}}
    assert (verdict_of(report(layers=1, measures=outputs)) or "").startswith("output error 0.400")


def test_without_matplotlib_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(CalipersError, match=r"pip install 'calipers\[plot\]'"):
        render_page({"x": report(layers=1)})
    with pytest.raises(CalipersError, match="expected one or more, got none"):
        render_page({})
