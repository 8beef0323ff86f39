"""The report of a release in a real browser: in both colour schemes, on a phone, and on paper."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.browser import CHROMIUM, Browser
from tests.report_world import report

from trainyard.reports.release import release_report_html

pytestmark = pytest.mark.integration

SMALLEST_TEXT_PX = 9
"""Height of a line of text that can still be read."""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A browser that has opened the report of a release with everything in it."""
    if not CHROMIUM:
        pytest.fail("Chromium is missing: see .ci/system-packages")
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(release_report_html(report()), encoding="utf-8")
    with Browser() as made:
        made.open(path.as_uri())
        yield made


@pytest.fixture
def page(browser: Browser) -> Iterator[Browser]:
    yield browser
    browser.resize(1280, 900)
    browser.prefer("light")
    assert browser.complaints == []


def luminance(page: Browser, element: str, style: str) -> float:
    """Return how bright a colour of an element is, from 0 (black) to 1 (white)."""
    colour = page.run(f"getComputedStyle(document.querySelector('{element}'))['{style}']")
    red, green, blue = (int(part) / 255 for part in colour.strip("rgb()").split(",")[:3])
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize(("scheme", "is_dark"), [("light", False), ("dark", True)])
def test_it_follows_the_colour_scheme(page: Browser, scheme: str, is_dark: bool) -> None:
    page.prefer(scheme)

    paper = luminance(page, "body", "backgroundColor")
    assert (paper < 0.2) is is_dark
    for element in ("h1", "td", "svg text", ".badge.fail", ".badge.warn", ".badge.pass"):
        style = "fill" if element == "svg text" else "color"
        assert abs(luminance(page, element, style) - paper) > 0.25, element
    curve = luminance(page, "svg .p90 .curve", "stroke")
    assert abs(curve - luminance(page, "section", "backgroundColor")) > 0.25


@pytest.mark.parametrize(("width", "columns"), [(1280, 3), (390, 1)])
def test_plots_stand_side_by_side_or_below_each_other(
    page: Browser, width: int, columns: int
) -> None:
    page.resize(width, 844, phone=width < 500)

    tops = page.run(
        "[...document.querySelectorAll('#load .plot')].map(e => e.getBoundingClientRect().top)"
    )
    assert len(tops) == 3
    assert len(set(tops)) == 3 // columns


@pytest.mark.parametrize("width", [1280, 390, 320])
def test_nothing_leaves_the_window_and_text_can_be_read(page: Browser, width: int) -> None:
    page.resize(width, 844, phone=width < 500)

    assert page.run("document.documentElement.scrollWidth") <= width
    beyond = page.run(
        "[...document.querySelectorAll('section, .tile, svg, h1, h2, h3, p')]"
        ".filter(e => !e.closest('.scroll')"
        " && e.getBoundingClientRect().right > innerWidth + 0.5).map(e => e.outerHTML.slice(0, 80))"
    )
    assert beyond == []
    lowest = page.run(
        "Math.min(...[...document.querySelectorAll('svg text')]"
        ".map(e => e.getBoundingClientRect().height))"
    )
    assert lowest >= SMALLEST_TEXT_PX


def test_on_a_phone_each_check_shows_its_result_without_scrolling(page: Browser) -> None:
    page.resize(390, 844, phone=True)

    hidden = page.run(
        "[...document.querySelectorAll('.checks .badge')]"
        ".filter(e => e.getBoundingClientRect().right > innerWidth).length"
    )
    assert hidden == 0
    assert page.run("document.querySelectorAll('.checks .badge').length") > 10


def test_labels_of_a_plot_do_not_cover_each_other(page: Browser) -> None:
    covered = page.run(
        """[...document.querySelectorAll('.plot svg')].flatMap(svg => {
          const boxes = [...svg.querySelectorAll('text')].map(e => [e, e.getBoundingClientRect()]);
          return boxes.flatMap(([a, p], i) => boxes.slice(i + 1)
            .filter(([b, q]) => p.left < q.right - 1 && q.left < p.right - 1
              && p.top < q.bottom - 3 && q.top < p.bottom - 3)
            .map(([b]) => a.textContent + ' / ' + b.textContent));
        })"""
    )
    assert covered == []


def test_it_prints_dark_on_white_even_for_those_who_prefer_dark(
    page: Browser, tmp_path: Path
) -> None:
    page.prefer("dark")
    page.call("Emulation.setEmulatedMedia", media="print")
    try:
        assert luminance(page, "h1", "color") < 0.3
        printed = page.call("Page.printToPDF", printBackground=False)["data"]
    finally:
        page.call("Emulation.setEmulatedMedia", media="")
    assert base64.b64decode(printed).startswith(b"%PDF")
