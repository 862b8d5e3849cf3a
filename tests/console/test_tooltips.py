"""Tooltips of the console: every column head and figure is explained, by hover, keyboard and screen reader."""

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect

from model.windows import Readings
from tests.support.browser import Watched, watched
from tests.support.processes import Service, running

PAGES = {"#/fleet": 8, "#/engine/e1": 25, "#/calibration": 35, "#/explorer": 10}  # least number of heads and figures
HEADS = "main th, main dt, main [role=columnheader]"
UNEXPLAINED = f"""[...document.querySelectorAll('{HEADS}')].filter((head) => {{
    const term = head.querySelector('[aria-describedby]');
    const tip = term && document.getElementById(term.getAttribute('aria-describedby'));
    return !tip || tip.getAttribute('role') !== 'tooltip' || tip.textContent.length < 10 || term.tabIndex < 0;
}}).map((head) => head.textContent)"""


@pytest.fixture(scope="module")
def stored(windows: Readings) -> Iterator[Service]:
    """A service with a few engines, labels and changes of the temperature."""
    with running(ENGINE_HEALTH_ADMIN_KEYS="wheel") as service:
        flights = [
            {"engine_id": f"e{k}", "cycle": cycle, "telemetry": windows[k][cycle].tolist()}
            for k in range(3)
            for cycle in range(1, 6)
        ]
        assert 200 == service.client.post("/v1/cycles", json={"cycles": flights}).status_code
        assert 200 == service.client.post("/v1/outcomes", json={"engine_id": "e1", "failed_at_cycle": 60}).status_code
        key = {"X-API-Key": "wheel"}
        assert (
            200 == service.client.put("/v1/calibration/temperature", json={"temperature": 1.5}, headers=key).status_code
        )
        yield service


@pytest.fixture
def console(browser: Browser, stored: Service) -> Iterator[Watched]:
    """A page without errors in its console."""
    with watched(browser, str(stored.client.base_url).rstrip("/") + "/") as opened:
        yield opened
    assert ([], []) == (opened.errors, opened.outside)


def open_all_tables(page: Page) -> None:
    """Open the table of every chart."""
    for summary in page.locator("summary").all():
        summary.click()


@pytest.mark.parametrize("path", PAGES)
def test_tooltip_of_every_head_and_figure_exists(path: str, console: Watched) -> None:
    """Each column head and figure of a page has a focusable term whose description is a tooltip."""
    page = console.open(path)
    expect(page.locator("main .card, .rows .row").first).to_be_visible()
    open_all_tables(page)
    expect(page.locator(HEADS).nth(PAGES[path] - 1)).to_be_attached()
    assert [] == page.evaluate(UNEXPLAINED)


def test_tooltip_opens_on_focus_and_closes_on_escape(console: Watched) -> None:
    """A tooltip is visible while its term has the focus or the pointer, within the window, until Escape."""
    page = console.open("#/calibration")
    term = page.get_by_role("button", name="ECE").first
    tip = page.get_by_role("tooltip")
    expect(term).to_have_accessible_description("Expected calibration error: mean distance of confidence and accuracy. "
        "Only a value above the range of chance is a finding.")  # fmt: skip
    expect(tip).to_have_count(0)
    term.focus()
    expect(tip).to_be_visible()
    page.keyboard.press("Escape")
    expect(tip).to_have_count(0)
    term.hover()
    expect(tip).to_be_visible()
    page.set_viewport_size({"width": 375, "height": 700})
    page.get_by_role("button", name="Precision").focus()
    box = tip.bounding_box()
    assert box is not None
    assert 0 <= box["x"] <= box["x"] + box["width"] <= 375
    page.mouse.move(0, 0)
    page.get_by_role("button", name="Fit a temperature").focus()
    expect(tip).to_have_count(0)
