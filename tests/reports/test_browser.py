"""The page in a real browser: a headless Chromium of the system, driven by playwright."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from calipers.reports import render_page
from reports.fabricated import report

pytest.importorskip("matplotlib", reason="the page needs matplotlib: pip install 'calipers[plot]'")
playwright = pytest.importorskip(
    "playwright.sync_api", reason="no playwright to drive a browser: pip install playwright"
)
CHROMIUM = os.environ.get("CALIPERS_CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no browser: apt-get install chromium, or set CALIPERS_CHROMIUM"
)
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)

Open = Callable[..., Any]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    reports = {
        "SmolLM2-135M-W4A16": report(layers=12),
        "SmolLM2-135M-NVFP4": report(layers=12, seed=1),
    }
    path.write_text(render_page(reports), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield started
        started.close()


@pytest.fixture
def open_page(browser: Any, file: Path) -> Iterator[Open]:
    """Opens the page; fails at the end over a message in the console or another request."""
    contexts, troubles, requests = [], [], []

    def open_it(width: int = 1200, **settings: Any) -> Any:
        size = {"width": width, "height": 800}
        context = browser.new_context(viewport=size, offline=True, **settings)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: troubles.append(message.text))
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(file.as_uri())
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert troubles == []
    assert [url for url in requests if not url.startswith(("file://", "data:"))] == []
    assert len([url for url in requests if url.startswith("file://")]) == len(contexts)


def shown(page: Any, column: int) -> list[str]:
    return page.eval_on_selector_all(
        f"#modules-table tbody tr > :nth-child({column})",
        "cells => cells.map(cell => cell.textContent)",
    )


def test_a_click_sorts_by_number_and_again_the_other_way(open_page: Open, tmp_path: Path) -> None:
    page = open_page()
    head = page.locator("#modules-table thead th", has_text="output error")
    before = shown(page, 4)
    assert head.get_attribute("aria-sort") is None
    head.get_by_role("button").click()
    numbers = [float(each.rstrip("%")) for each in shown(page, 4)]
    assert numbers == sorted(numbers, reverse=True)
    assert head.get_attribute("aria-sort") == "descending"
    head.get_by_role("button").press("Enter")
    assert head.get_attribute("aria-sort") == "ascending"
    assert [float(each.rstrip("%")) for each in shown(page, 4)] == sorted(numbers)
    assert sorted(shown(page, 4)) == sorted(before)
    picture = tmp_path / "page.png"
    page.screenshot(path=picture, full_page=True)
    assert picture.stat().st_size > 50_000


def test_names_are_sorted_as_people_count(open_page: Open) -> None:
    page = open_page()
    page.locator("#modules-table thead th").first.get_by_role("button").click()
    layers = [int(name.split(".")[2]) for name in shown(page, 1)]
    assert layers == sorted(layers)
    assert page.locator("#modules-table [aria-sort]").count() == 1


def test_a_name_leads_to_its_histograms(open_page: Open) -> None:
    page = open_page()
    page.locator("#modules-table tbody a").nth(8).click()
    card = page.locator("article").nth(8)
    assert card.is_visible()
    assert card.locator("svg").first.bounding_box()["height"] > 60
    assert not page.locator("article").nth(0).is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_scrolls_down_only(open_page: Open, tmp_path: Path, scheme: str) -> None:
    page = open_page(width=360, color_scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true })")
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width == 360
    table = page.locator(".scroll").first
    assert table.evaluate("box => box.scrollWidth > box.clientWidth")  # it scrolls in its own box
    page.screenshot(path=tmp_path / "phone.png")


CONTRAST = """() => {
  const light = (text) => {
    const [r, g, b] = text.match(/[\\d.]+/g).slice(0, 3).map(Number).map((v) => v / 255)
      .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (at) => {
    for (; at; at = at.parentElement) {
      const colour = getComputedStyle(at).backgroundColor;
      if (!/, 0\\)$/.test(colour)) return light(colour);
    }
  };
  const names = "p, h1, h2, h3, td, th, a, dt, dd b, dd span, caption, li, summary, code, footer";
  return Math.min(...[...document.querySelectorAll(names)].map((each) => {
    const [a, b] = [light(getComputedStyle(each).color), ground(each)];
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  }));
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_stands_out_from_its_ground(open_page: Open, scheme: str) -> None:
    page = open_page(color_scheme=scheme)
    grounds = {"light": "rgb(246, 247, 249)", "dark": "rgb(17, 21, 27)"}
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == grounds[scheme]
    assert page.evaluate(CONTRAST) >= 4.5  # WCAG 2, level AA


def test_it_reads_without_javascript(open_page: Open) -> None:
    page = open_page(java_script_enabled=False)
    assert page.locator("#modules-table tbody tr").count() == 84
    assert page.locator("thead button").count() == 0
    assert page.get_by_text("A click on a head sorts").is_hidden()
    page.locator("summary").first.click()
    assert page.locator("article").first.is_visible()
    assert page.get_by_text("+20.0% perplexity").first.is_visible()
