"""The console while things happen: engines fly and end, services go and come back, people click twice."""

import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from playwright.sync_api import Browser, Page, Request, Route, expect

from export import attach
from model.windows import Readings
from tests.support.browser import Watched, down, up, watched
from tests.support.processes import Service, running

ADMIN = {"X-API-Key": "wheel"}
NAMES: tuple[str, ...] = (
    "a/b/c",
    "q\"u'o",
    "<img src=x onerror=alert(1)>&amp;",
    "x" * 200,
    "двигатель-7",
    "محرك",
    "h#a?b=c&d",
    "100%",
)
NAMES += ("50%25", "back\\slash", "plus+plus", "with space")
expect.set_options(timeout=20_000)  # milliseconds; a busy machine is not a wrong answer


@pytest.fixture(scope="module")
def flown(windows: Readings) -> Iterator[Service]:
    """A service that remembers a few engines of several names."""
    with running(ENGINE_HEALTH_ADMIN_KEYS="wheel") as service:
        for name in (*NAMES, *(f"e{k:02}" for k in range(12))):
            fly(service, windows, name, 40)
        yield service


@pytest.fixture
def console(browser: Browser, flown: Service) -> Iterator[Watched]:
    """A page on it, in which nothing may go wrong."""
    with watched(browser, home(flown)) as found:
        yield found
    assert ([], []) == (found.errors, found.outside)


def home(service: Service) -> str:
    return str(service.client.base_url).rstrip("/") + "/"


def fly(service: Service, windows: Readings, name: str, flights: int, first: int = 1) -> None:
    """Flights of one engine, from cycle `first` on."""
    rows = [{"engine_id": name, "cycle": first + k, "telemetry": windows[0][k].tolist()} for k in range(flights)]
    assert 200 == service.client.post("/v1/cycles", json={"cycles": rows}).status_code


def row(page: Page, name: str) -> Any:
    return page.locator(f".rows .row[data-engine='{name}']")


def unavailable(route: Route) -> None:
    route.fulfill(status=503, json={"detail": "draining"})


@pytest.mark.parametrize("name", NAMES)
def test_engine_of_any_name_can_be_opened(console: Watched, name: str) -> None:
    """Slashes, quotes, HTML, other scripts, two hundred letters: found, opened, no wider than a telephone."""
    page = console.open(f"#/fleet?find={quote(name, safe='')}")
    page.set_viewport_size({"width": 375, "height": 800})
    link = page.get_by_role("link", name=name, exact=True)
    link.click()
    expect(page.locator("h1")).to_have_text(name)
    expect(page.locator(".facts")).to_contain_text("Predictions")
    expect(page.locator("html")).to_have_js_property("scrollWidth", 375)


def test_invalid_address_opens_a_page(console: Watched) -> None:
    """A lonely % means itself, and a page that there is not is the fleet."""
    page = console.open("#/engine/100%")
    expect(page.locator(".facts")).to_contain_text("Predictions")
    expect(page.locator("h1")).to_have_text("100%")
    page.goto("about:blank")
    expect(console.open("#/nowhere/%zz?%").locator("h1")).to_have_text("Fleet")
    console.outside.clear()  # about:blank


def test_engine_is_waited_for(console: Watched, flown: Service, windows: Readings) -> None:
    """Who opens an engine before its first flight sees it when it has flown."""
    page = console.open("#/engine/early")
    expect(page.get_by_text("This engine is not stored")).to_be_visible()
    fly(flown, windows, "early", 3)
    expect(page.locator(".facts")).to_contain_text("Predictions")
    expect(page.get_by_text("This engine is not stored")).to_have_count(0)
    expect(page.get_by_role("alert")).to_be_hidden()


def test_replaced_label_is_shown_immediately(console: Watched) -> None:
    """An inspection that is replaced by another one changes the tables, though it is still one truth."""
    page = console.open("#/engine/e00")
    page.get_by_text("All predictions, as a table").click()
    newest = page.locator(".behind[open] tbody tr").first
    for found in ("normal", "critical"):
        page.get_by_label("Inspected class").select_option(found)
        page.get_by_role("button", name="Record the inspection").click()
        if found == "critical":
            page.get_by_role("button", name="Replace by critical").click()
        expect(newest.locator("td").nth(6)).to_have_text(found)


def test_recorded_failure_is_confirmed_if_refresh_fails(console: Watched) -> None:
    """A stored failure is confirmed even if the next refresh fails."""
    page = console.open("#/engine/e01")
    expect(page.locator(".facts")).to_be_visible()
    page.route("**/v1/engines/e01*", unavailable)
    page.get_by_role("button", name="Record the failure").click()
    expect(page.get_by_text("Recorded: failed at cycle 40")).to_be_visible()
    expect(page.get_by_role("alert")).to_contain_text("Not available now")
    page.unroute("**/v1/engines/e01*")
    expect(page.get_by_role("alert")).to_be_hidden()
    expect(page.get_by_text("Not recorded")).to_have_count(0)


def test_table_stays_where_it_is_read(console: Watched, flown: Service, windows: Readings) -> None:
    """A flight that arrives moves neither the focus nor the scroll position of a table."""
    page = console.open("#/engine/e02")
    page.locator(".behind summary").first.click()
    region = page.get_by_role("region", name=re.compile("stacked, as a table"))
    region.focus()
    region.evaluate("one => { one.scrollTop = 200; }")
    fly(flown, windows, "e02", 1, first=41)
    expect(region.locator("tbody tr")).to_have_count(41)
    assert [200, True] == region.evaluate("one => [one.scrollTop, one === document.activeElement]")


def test_row_that_is_held_hides_no_other(console: Watched, flown: Service) -> None:
    """A focused engine that fails is marked as failed in its place, and hides no other row."""
    page = console.open("#/fleet?sort=name&find=e0")
    row(page, "e05").locator("a").focus()
    flown.client.post("/v1/outcomes", json={"engine_id": "e05", "failed_at_cycle": 60})
    expect(row(page, "e05")).to_contain_text("failed")
    expect(page.locator(".head p")).to_contain_text(re.compile("engines, by name"))
    tops = page.evaluate("[...document.querySelectorAll('.rows .row')].map(row => row.getBoundingClientRect().top)")
    assert len(tops) == len(set(tops))
    assert page.evaluate("document.activeElement.textContent") == "e05"
    page.keyboard.press("ArrowDown")
    assert page.evaluate("document.activeElement.textContent") == "e06"
    page.get_by_label("Find an engine").focus()
    expect(row(page, "e05")).to_have_count(0)


def test_pointer_that_rests_in_the_list_holds_nothing(browser: Browser, flown: Service, windows: Readings) -> None:
    """Without input the worst engine comes first again, even if the pointer rests in the list."""
    with watched(browser, home(flown)) as console:
        console.page.clock.install()
        page = console.open("#/fleet?sort=newest")
        row(page, "e07").hover()
        fly(flown, windows, "e06", 1, first=41)
        page.clock.fast_forward(3000)
        expect(page.get_by_text("Order paused")).to_be_visible()
        page.clock.fast_forward(11_000)
        expect(page.get_by_text("Order paused")).to_be_hidden()
        expect(row(page, "e06")).to_have_attribute("aria-rowindex", "2")


def test_failed_engines_are_loaded_on_request_only(console: Watched, flown: Service) -> None:
    """Ends add up in a memory, and an end is as bad as can be: they leave the places to engines that still fly."""
    looks: list[str] = []
    console.page.on("request", lambda request: looks.append(request.url) if "trend=" in request.url else None)
    flown.client.post("/v1/outcomes", json={"engine_id": "e08", "failed_at_cycle": 60})
    page = console.open("#/fleet?find=e08")
    expect(page.get_by_text("No engine shown matches")).to_be_visible()
    page.get_by_label("Failed engines too").check()
    expect(row(page, "e08")).to_contain_text("failed")
    assert [True, False] == ["running=true" in look for look in looks]


def test_enter_opens_the_searched_engine(console: Watched) -> None:
    """A part of several names leads to the first of them; a whole name, or the only one, opens its engine."""
    page = console.open("#/fleet?sort=name")
    find = page.get_by_label("Find an engine")
    find.fill("e0")
    find.press("Enter")
    expect(row(page, "e00").locator("a")).to_be_focused()
    find.fill("e11")
    find.press("Enter")
    expect(page.locator("h1")).to_have_text("e11")


def test_looks_do_not_multiply(console: Watched) -> None:
    """A tab that is hidden and shown repeatedly has one request at a time."""
    page, under_way, most = console.open(), [0], [0]

    def begun(request: Request) -> None:
        if "v1/engines?" in request.url:
            under_way[0] += 1
            most[0] = max(most[0], under_way[0])

    def ended(request: Request) -> None:
        under_way[0] -= "v1/engines?" in request.url

    expect(row(page, "e10")).to_be_attached()
    page.on("request", begun)
    page.on("requestfinished", ended)
    page.evaluate(
        "for (let k = 0; k < 20; k++) setTimeout(() => document.dispatchEvent(new Event('visibilitychange')), 5 * k)"
    )
    for _ in range(3):
        with page.expect_response(re.compile("v1/engines")):
            pass
    assert 1 == most[0]


def test_page_opens_while_the_service_is_unreachable(browser: Browser, tmp_path: Path) -> None:
    """Each page reports an unreachable service, also on its first opening, and loads when the service responds."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    around = {"ENGINE_HEALTH_DATABASE_URL": f"sqlite:///{tmp_path}/m.db"}
    process = up(port, around)
    try:
        with watched(browser, f"http://127.0.0.1:{port}/") as console:
            page = console.open()
            expect(page.get_by_text("No engine is stored")).to_be_visible()
            down(process)
            for name in ("Calibration", "Explorer", "Calibration"):
                page.get_by_role("link", name=name).click()
                expect(page.locator("h1")).to_have_text(name)
            expect(page.get_by_text("does not respond")).to_be_visible()
            process = up(port, around)
            expect(page.get_by_text("Too few labels")).to_be_visible()
            expect(page.get_by_role("alert")).to_be_hidden()
        assert [] == console.errors
    finally:
        down(process)


def test_another_service_at_the_address_is_no_addition(browser: Browser, tmp_path: Path, windows: Readings) -> None:
    """After the service restarts with another store, only engines of the new store are shown."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    rows = windows[0][:3].tolist()
    process = None
    try:
        with watched(browser, f"http://127.0.0.1:{port}/") as console:
            for name in ("old", "new"):
                process = up(port, {"ENGINE_HEALTH_DATABASE_URL": f"sqlite:///{tmp_path}/{name}.db"})
                asked = {"instances": [{"engine_id": name, "cycle": 3, "telemetry": rows}]}
                page = console.open() if name == "old" else console.page
                assert page.request.post(f"{console.home}v1/predict", data=asked).ok
                expect(row(page, name)).to_be_visible()
                if name == "old":
                    down(process)
                    expect(page.get_by_text("does not respond")).to_be_visible()
            expect(row(page, "old")).to_have_count(0)
        assert [] == console.errors
    finally:
        if process:
            down(process)


def test_time_that_there_is_not_is_all_time(console: Watched) -> None:
    """An address with another window shows everything, and says so."""
    page = console.open("#/calibration?window=nonsense")
    expect(page.locator(".verdict h2")).not_to_be_empty()
    expect(page.get_by_label("Predictions of")).to_have_value("")
    expect(page.get_by_role("alert")).to_be_hidden()


def test_left_page_shows_no_late_errors(console: Watched) -> None:
    """A request that is aborted by leaving a page shows no error on the next page."""
    page, held = console.open("#/calibration"), list[Route]()
    expect(page.locator(".verdict h2")).not_to_be_empty()
    page.route("**/v1/calibration?*", lambda route: held.append(route))
    with page.expect_request("**/v1/calibration?*"):
        page.get_by_label("Predictions of").select_option("1h")
    page.get_by_role("link", name="Explorer").click()
    expect(page.get_by_text("numerics of the service agree")).to_be_visible()
    expect(page.get_by_role("alert")).to_be_hidden()


def test_double_click_undoes_one_change(console: Watched, flown: Service) -> None:
    """A double click undoes one change; a change is reported even if the next refresh fails."""
    for value in (1.1, 1.2, 1.3):
        flown.client.put("/v1/calibration/temperature", json={"temperature": value}, headers=ADMIN)
    page = console.open("#/calibration")
    expect(page.locator(".verdict h2")).not_to_be_empty()
    page.evaluate("sessionStorage.setItem('engine-health.admin-key', 'wheel')")
    page.route("**/v1/calibration?*", unavailable)
    page.get_by_role("button", name="Undo the last change").dblclick()
    expect(page.get_by_text("Undone. The active temperature is 1.2000")).to_be_visible()
    expect(page.get_by_role("alert")).to_contain_text("Not available now")
    assert 1.2 == flown.client.get("/v1/calibration/temperature").json()["temperature"]
    page.unroute("**/v1/calibration?*")
    expect(page.get_by_role("alert")).to_be_hidden()
    expect(page.get_by_text("Nothing was changed")).to_have_count(0)


def test_verdict_is_read_out_once(console: Watched) -> None:
    """What screen readers read out is not written again while it is the same."""
    page = console.open("#/calibration")
    expect(page.locator(".verdict h2")).not_to_be_empty()
    page.evaluate("document.querySelector('.verdict h2').dataset.mine = 'yes'")
    with page.expect_response(re.compile("v1/calibration.temperature")):
        page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    page.evaluate("new Promise(done => setTimeout(done, 100))")
    expect(page.locator(".verdict h2")).to_have_attribute("data-mine", "yes")


@pytest.mark.parametrize("query", ["z=1e308,0,-1e308&y=2&t=0.01", "z=1e6,-1e6,123456.789&y=1&t=0.03", "z=abc", "z=1"])
def test_explorer_of_any_address_agrees_with_the_service(console: Watched, query: str) -> None:
    """For any address the numbers are finite and equal those of the service."""
    page = console.open(f"#/explorer?{query}")
    expect(page.get_by_text("numerics of the service agree")).to_be_visible()
    assert np.isfinite(float(page.locator(".loss").inner_text()))


@pytest.mark.parametrize(
    ("field", "typed", "becomes"),
    [
        ("Logit of class 0, as a number", "1e9", "1000000"),
        ("Logit of class 0, as a number", "", "0"),
        ("Temperature", "1000", "100"),
        ("Temperature", "0", "0.01"),
        ("Temperature", "-5", "0.01"),
        ("Temperature", "", "1"),
        ("Classes", "99", "10"),
    ],
)
def test_number_out_of_range_is_shown_as_it_is_used(console: Watched, field: str, typed: str, becomes: str) -> None:
    """The value that a field shows after Enter is the value in use."""
    page = console.open("#/explorer")
    one = page.get_by_label(field, exact=True)
    one.fill(typed)
    one.press("Enter")
    one.press("Tab")
    expect(one).to_have_value(becomes)


def test_slider_announces_the_temperature(console: Watched) -> None:
    """The logarithmic slider announces the temperature to screen readers."""
    page = console.open("#/explorer?z=1,2&t=2.5")
    expect(page.get_by_role("slider", name="Temperature, from sharp to flat")).to_have_attribute(
        "aria-valuetext", "2.5"
    )


def test_declined_key_is_requested_once(browser: Browser) -> None:
    """Without a key the explorer works, and the key is requested once."""
    with running(ENGINE_HEALTH_API_KEYS="shibboleth") as service, watched(browser, home(service)) as console:
        page = console.open("#/explorer")
        page.get_by_role("button", name="Cancel").click()
        page.get_by_role("button", name="Uniform").click()
        expect(page.locator(".loss")).to_have_text("1.386294")
        expect(page.get_by_text("Not checked by the service")).to_be_visible()
        with page.expect_response("**/v1/evaluate"):
            page.get_by_role("button", name="Overflow").click()
        expect(page.get_by_text("Not checked by the service")).to_be_visible()
        expect(page.get_by_role("dialog")).to_have_count(0)
        page.get_by_role("link", name="Fleet", exact=True).click()
        expect(page.get_by_role("alert")).to_contain_text("Reload the page")
    assert [] == console.errors


def test_model_without_rul_has_no_cycles_left(browser: Browser, tmp_path: Path) -> None:
    """Stored predictions of a classifier without RUL are shown without the fields that it lacks."""
    weights = np.random.default_rng(0).standard_normal((64, 10)).astype(np.float32)
    pixels = helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["n", 64])
    scores = helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["n", 10])
    nodes = [helper.make_node("MatMul", ["pixels", "w"], ["scores"])]
    graph = helper.make_graph(nodes, "digits", [pixels], [scores], [numpy_helper.from_array(weights, "w")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), tmp_path / "in.onnx")
    names = [f"the digit {k}, of which there are ten" if k == 7 else f"digit {k}" for k in range(10)]
    (tmp_path / "names.txt").write_text("\n".join(names))
    flags = ["--logits", "scores", "--classes", f"@{tmp_path}/names.txt"]
    attach.main([str(tmp_path / "in.onnx"), str(tmp_path / "out.onnx"), *flags])
    with running(ENGINE_HEALTH_MODEL=str(tmp_path / "out.onnx")) as service:
        inputs = np.random.default_rng(1).random((20, 64)) / 4
        service.predict([{"engine_id": f"e{k}", "cycle": k, "telemetry": x.tolist()} for k, x in enumerate(inputs)])
        told = service.client.get("/v1/engines/e3", params={"sensors": True})
        assert (200, None) == (told.status_code, told.json()["sensors"])
        with watched(browser, home(service), viewport={"width": 1280, "height": 1500}) as console:
            page = console.open()
            expect(row(page, "e3")).to_be_visible()
            expect(page.get_by_text("Cycles left", exact=True)).to_be_hidden()
            row(page, "e3").locator("a").click()
            expect(page.locator(".chart .main-svg").first).to_be_visible()
            expect(page.get_by_text("Cycles left")).to_have_count(0)
            for path in ("#/calibration", "#/explorer", "#/fleet"):
                page = console.open(path)
                expect(page.locator("main .card, .rows .row").first).to_be_visible()
                for width in (1280, 375):
                    page.set_viewport_size({"width": width, "height": 1500})
                    expect(page.locator("html")).to_have_js_property("scrollWidth", width)
        assert ([], []) == (console.errors, console.outside)


def test_many_classes_leave_the_worst_engine_visible(browser: Browser, flown: Service) -> None:
    """Of very many classes the most frequent ones are there to choose from; the worst engine stays in sight."""
    names = [f"n{k:04} tabby, tabby cat of the kind {k}" for k in range(1000)]

    def many(route: Route) -> None:
        route.fulfill(json=route.fetch().json() | {"classes": names})

    def spread(route: Route) -> None:
        told = route.fetch().json()
        for k, one in enumerate(told["engines"]):
            one |= {"health": names[k % 20], "probabilities": dict.fromkeys(names, 0.001)}
        route.fulfill(json=told)

    with watched(browser, home(flown), viewport={"width": 375, "height": 1800}) as console:
        console.page.route("**/v1/model", many)
        console.page.route("**/v1/engines?*", spread)
        page = console.open()
        expect(page.locator(".rows .row").first).to_be_in_viewport()
        assert 1 + 12 == page.locator(".count:visible").count()
        expect(page.locator("html")).to_have_js_property("scrollWidth", 375)
    assert [] == console.errors


def test_files_are_compressed_for_clients_that_accept_gzip(service: Service) -> None:
    """A weight of 0 declines gzip and `*` accepts it; `If-None-Match: *` matches every file."""
    for accepted, packed in (("gzip;q=0", False), ("gzip; q=0.0, br", False), ("*", True), ("br, gzip;q=0.1", True)):
        got = service.client.get("/console/main.js", headers={"Accept-Encoding": accepted})
        assert packed == (got.headers.get("content-encoding") == "gzip"), accepted
    assert 304 == service.client.get("/console/main.js", headers={"If-None-Match": "*"}).status_code
