import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect

from model.windows import Readings
from tests.support.browser import Watched, down, fly_nasas, up, watched
from tests.support.processes import Service, running

ADMIN, TOO_SHARP = "wheel", 0.2  # a temperature at which the model says far more than it knows
CROWD = 900
CONTRAST = {"runOnly": {"type": "rule", "values": ["color-contrast"]}}  # all that colours change
expect.set_options(timeout=20_000)  # milliseconds; a busy machine is not a wrong answer
PAGES = ("#/fleet", "#/engine/FD001-61", "#/calibration", "#/explorer")


@pytest.fixture(scope="module")
def fleet(browser: Browser, cmapss_dir: Path, windows: Readings) -> Iterator[Service]:
    """C-MAPSS engines, 60 failed and 10 running, predicted at too low a temperature, and many others."""
    assert browser.is_connected()
    with running(ENGINE_HEALTH_ADMIN_KEYS=ADMIN) as service:
        key = {"X-API-Key": ADMIN}
        put = service.client.put("/v1/calibration/temperature", json={"temperature": TOO_SHARP}, headers=key)
        assert 200 == put.status_code
        fly_nasas(service.client, cmapss_dir, "FD001", 60, 10, 25)
        service.predict(
            [
                {"engine_id": f"crowd-{k:04}", "cycle": 1, "telemetry": windows[2][k % 90 : k % 90 + 3].tolist()}
                for k in range(CROWD)
            ]
        )
        yield service


@pytest.fixture
def console(browser: Browser, fleet: Service) -> Iterator[Watched]:
    """A page on the fleet, in which nothing may go wrong and nothing may go to another host."""
    with watched(browser, str(fleet.client.base_url).rstrip("/") + "/") as found:
        yield found
    assert ([], []) == (found.errors, found.outside)


def names(page: Page) -> list[str]:
    """Return the visible engines from the top."""
    rows: list[tuple[float, str]] = page.evaluate(
        "[...document.querySelectorAll('.rows .row')].map(row => [row.getBoundingClientRect().top, row.dataset.engine])"
    )
    return [name for _, name in sorted(rows)]


def running_engines(service: Service, **query: Any) -> list[dict[str, Any]]:
    """Engines whose end is not known, the worst first."""
    found: list[dict[str, Any]] = service.client.get(
        "/v1/engines", params={"running": True, "limit": 1000, **query}
    ).json()["engines"]
    return found


def test_most_critical_engine_is_the_first_row(console: Watched, fleet: Service) -> None:
    """Who opens the service's address sees the engine that is worst off first, with its class, probability and RUL."""
    worst = running_engines(fleet)[0]
    page = console.open()
    first = page.locator(f".rows .row[data-engine='{worst['engine_id']}']")
    expect(first).to_contain_text(worst["health"])
    assert worst["engine_id"] == names(page)[0]
    assert f"{worst['rul']:.0f}" in first.inner_text()
    told = first.locator(".bar").get_attribute("aria-label") or ""
    assert all(f"{name} " in told for name in worst["probabilities"])
    assert [] == console.refused


def test_many_engines_make_few_rows(console: Watched) -> None:
    """Only visible rows are rendered; the last engine appears after scrolling to it."""
    page = console.open("#/fleet?sort=name")
    expect(page.locator(".count b").last).to_have_text("910")
    assert page.locator(".rows .row").count() < 40
    assert names(page)[0] == "crowd-0000"
    page.evaluate("window.scrollTo(0, document.body.scrollHeight)")
    expect(page.locator(".rows .row[data-engine='FD001-70']")).to_be_visible()
    assert page.locator(".rows .row").count() < 40


def test_fleet_is_filtered_searched_and_sorted(console: Watched, fleet: Service) -> None:
    """A class, a part of the name and an order choose the rows; the address keeps the choice."""
    page = console.open()
    critical = [row["engine_id"] for row in running_engines(fleet, health="critical")]
    page.get_by_role("button", name="critical").click()
    expect(page.locator(".head p")).to_contain_text(f"{len(critical)} engine")
    assert set(names(page)) <= set(critical)
    page.get_by_role("button", name="all engines").click()
    page.keyboard.press("/")
    page.keyboard.type("fd001")
    expect(page.locator(".head p")).to_contain_text("10 engines")
    page.get_by_label("Order").select_option("rul")
    left = {row["engine_id"]: row["rul"] for row in running_engines(fleet) if row["engine_id"].startswith("FD001")}
    assert sorted(left, key=lambda name: left[name]) == names(page)
    page.reload()
    expect(page.locator(".head p")).to_contain_text("10 engines, fewest cycles left")
    page.get_by_label("Find an engine").fill("unknown-engine")
    page.get_by_role("button", name="Show all engines").click()
    expect(page.locator(".head p")).to_contain_text("910 engines")


def test_flight_shows_without_a_reload(console: Watched, fleet: Service, windows: Readings) -> None:
    """A new engine appears with its health while the page is open, and disappears after its failure."""
    page = console.open("#/fleet?find=newcomer")
    expect(page.locator(".none")).to_contain_text("newcomer")
    flight = {"engine_id": "newcomer", "cycle": 7, "telemetry": windows[0][0].tolist()}
    told = fleet.client.post("/v1/cycles", json={"cycles": [flight]}).json()["predictions"][0]
    row = page.locator(".rows .row[data-engine='newcomer']")
    expect(row).to_contain_text(told["health"])
    fleet.client.post("/v1/outcomes", json={"engine_id": "newcomer", "failed_at_cycle": 8})
    expect(row).to_have_count(0)
    page.get_by_label("Failed engines too").check()
    expect(row).to_contain_text("failed")


def test_keys_alone_lead_to_an_engine(console: Watched) -> None:
    """Tab, arrows and Enter are enough to go down the list and open an engine."""
    page = console.open()
    expect(page.locator(".rows .row").first).to_be_visible()
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.closest('.rows') !== null"):
            break
    page.keyboard.press("ArrowDown")
    second = names(page)[1]
    assert second == page.evaluate("document.activeElement.textContent")
    page.keyboard.press("Enter")
    expect(page.locator("h1")).to_have_text(second)


def test_engine_shows_its_history_and_its_sensors(console: Watched, fleet: Service) -> None:
    """Charts of health, RUL and sets, each with its table; the sensors that moved most, each with its own chart."""
    history = fleet.client.get("/v1/engines/FD001-61", params={"sensors": True}).json()
    page = console.open("#/engine/FD001-61")
    expect(page.locator(".chart .main-svg").first).to_be_visible()
    assert 4 == page.locator(".js-plotly-plot").count()
    page.locator(".behind summary").first.click()
    expect(page.locator(".behind[open] tbody tr")).to_have_count(len(history["history"]))
    moved = history["sensors"]["channels"][0]
    first = page.get_by_role("region", name="Sensors with the largest deviation").locator("tbody tr").first
    expect(first).to_contain_text(moved["channel"].replace("sensor_", "sensor "))
    expect(first).to_contain_text(f"{abs(moved['shift']):.2f}")
    other = page.locator(".pick").nth(2)
    other.click()
    expect(page.get_by_role("heading", name=re.compile("over time"))).to_contain_text(
        page.locator(".pick").nth(2).inner_text().removeprefix("sensor ")
    )


def test_end_is_entered_and_corrected(console: Watched, fleet: Service) -> None:
    """The end of an engine gives its predictions their truth; another end is shown as a conflict and may replace it."""
    page = console.open("#/engine/FD001-62")
    last = fleet.client.get("/v1/engines/FD001-62").json()["history"][-1]["cycle"]
    page.get_by_label("Failed at cycle").fill(str(last + 5))
    page.get_by_role("button", name="Record the failure").click()
    expect(page.get_by_text(f"Recorded: failed at cycle {last + 5}")).to_be_visible()
    page.get_by_label("Failed at cycle").fill(str(last + 2))
    page.get_by_role("button", name="Record the failure").click()
    page.get_by_role("button", name=f"Replace {last + 5} by {last + 2}").click()
    expect(page.get_by_text(f"Replaced: failed at cycle {last + 2}")).to_be_visible()
    found = fleet.client.get("/v1/engines/FD001-62").json()
    assert (last + 2, "outcome") == (found["failed_at_cycle"], found["history"][-1]["source"])
    assert ["409"] == console.refused


def test_inspection_is_entered(console: Watched, fleet: Service) -> None:
    """The class of an inspection becomes the label of the prediction at that cycle."""
    page = console.open("#/engine/FD001-63")
    page.get_by_label("Inspected class").select_option("normal")
    page.get_by_role("button", name="Record the inspection").click()
    expect(page.get_by_text("Recorded.")).to_be_visible()
    row = fleet.client.get("/v1/engines/FD001-63").json()["history"][-1]
    assert ("normal", "inspection") == (row["label"], row["source"])


def test_unknown_engine_gets_a_page_without_error(console: Watched) -> None:
    """An engine without a history gets a page that says so, with a link to the fleet."""
    page = console.open("#/engine/none%2Fof%20these")
    expect(page.get_by_text("This engine is not stored")).to_be_visible()
    page.get_by_role("link", name="Show the fleet").click()
    expect(page.locator("h1")).to_have_text("Fleet")
    assert {"404"} == set(console.refused)


def test_calibration_page_fits_applies_and_undoes(console: Watched, fleet: Service) -> None:
    """The state in words; a fit, applied and taken back with the admin key, which is asked for again if it is wrong."""
    now = fleet.client.get("/v1/calibration").json()
    page = console.open("#/calibration")
    verdict = page.locator(".verdict h2")
    expect(verdict).to_contain_text(
        f"Overconfident: confidence {now['label_free']['error']['accuracy'] + now['accuracy']:.0%}"[:-1]
    )
    expect(verdict).to_contain_text(f"{now['engines']} engines")
    page.get_by_role("button", name="Fit a temperature").click()
    apply = page.get_by_role("button", name="Apply")
    apply.click()
    page.get_by_role("textbox", name="Admin key").fill("no such key")
    page.get_by_role("button", name="Use this key").click()
    expect(page.get_by_role("alert").filter(has_text="not configured")).to_be_visible()
    page.get_by_role("textbox", name="Admin key").fill(ADMIN)
    page.get_by_role("button", name="Use this key").click()
    expect(page.get_by_text("Applied.")).to_be_visible()
    fitted = fleet.client.get("/v1/calibration/temperature").json()
    assert (True, "fit") == (fitted["temperature"] > 0.5, fitted["temperature_source"])
    page.get_by_role("button", name="Undo the last change").click()
    expect(page.get_by_text("Undone. The active")).to_be_visible()
    changes = fleet.client.get("/v1/calibration/temperature").json()
    assert (TOO_SHARP, 3) == (changes["temperature"], len(changes["changes"]))
    expect(page.get_by_role("region", name=re.compile("Every change")).locator("tbody tr")).to_have_count(3)
    assert ["401", "401"] == console.refused
    assert {"engine-health.admin-key": ADMIN} == page.evaluate("({...sessionStorage})")
    assert {} == page.evaluate("({...localStorage})")


def test_charts_that_cannot_be_drawn_have_their_tables(console: Watched) -> None:
    """Without Plotly, charts name the package to install, and their tables are shown."""
    console.page.route("**/plotly.min.js", lambda route: route.abort())
    page = console.open("#/engine/FD001-65")
    expect(page.get_by_text("pip install plotly").first).to_be_visible()
    page.locator(".behind summary").first.click()
    expect(page.locator(".behind[open] tbody tr")).to_have_count(25)


def test_calibration_of_a_time_without_predictions(console: Watched) -> None:
    """A window is chosen; figures follow it."""
    page = console.open("#/calibration?window=1h")
    expect(page.get_by_label("Predictions of")).to_have_value("1h")
    page.get_by_label("Predictions of").select_option("all time")
    expect(page.locator(".js-plotly-plot")).to_have_count(2)
    page.locator(".behind summary").first.click()
    expect(page.locator(".behind[open] tbody tr").nth(3)).to_be_attached()


def shown(page: Page) -> tuple[float, list[float]]:
    """Loss and probabilities as the explorer writes them."""
    values = page.locator(".answer .number").all_inner_texts()
    return float(page.locator(".loss").inner_text()), [float(value) for value in values]


def test_explorers_numbers_are_the_services(console: Watched, fleet: Service) -> None:
    """Logits of every size, 2 to 10 classes, any temperature: probabilities, losses and entropy as in /v1/evaluate."""
    page, draw = console.open("#/explorer"), np.random.default_rng(0)
    for classes in range(2, 11):
        logits = (draw.normal(size=classes) * 10 ** draw.uniform(-2, 4)).tolist()
        y, t = int(draw.integers(classes)), float(10 ** draw.uniform(-2, 2))
        asked = {"logits": [logits], "labels": [y], "temperature": t}
        told = fleet.client.post("/v1/evaluate", json=asked).json()
        found = page.evaluate(
            "async ([z, y, t]) => (await import('/console/numerics.js')).worked(z, y, t)", [logits, y, t]
        )
        assert told["probabilities"][0] == pytest.approx(found["p"], abs=1e-6)
        assert told["losses"][0] == pytest.approx(found["loss"], rel=1e-12, abs=1e-6)
        assert 0 == pytest.approx(sum(found["gradient"]), abs=1e-12)


def test_explorer_follows_sliders_and_presets(console: Watched, fleet: Service) -> None:
    """Sliders, true class, temperature, classes and presets change the numbers immediately; overflow stays finite."""
    page = console.open("#/explorer")
    expect(page.locator(".chart .main-svg").first).to_be_visible()
    page.get_by_label("Logit of class 0", exact=True).focus()
    page.keyboard.press("End")
    loss, p = shown(page)
    assert (10, max(p)) == (float(page.get_by_label("Logit of class 0, as a number").input_value()), p[0])
    page.get_by_label("class 3 is true").check()
    assert shown(page)[0] > loss + 9
    page.get_by_label("Temperature", exact=True).fill("100")
    page.get_by_label("Temperature", exact=True).press("Tab")
    assert shown(page)[1] == pytest.approx([0.25] * 4, abs=0.05)
    page.get_by_role("button", name="Overflow").click()
    told = fleet.client.post("/v1/evaluate", json={"logits": [[1000, 999, 998, 0]], "labels": [1]}).json()
    assert told["losses"][0] == pytest.approx(shown(page)[0], abs=1e-6)
    expect(page.get_by_text("infinity divided by infinity")).to_be_visible()
    page.get_by_role("button", name="twice").click()
    expect(page.get_by_text("softmax was applied before")).to_be_visible()
    assert told["probabilities"][0][0] == pytest.approx(
        float(page.get_by_label("Logit of class 0, as a number").input_value())
    )
    page.get_by_label("Classes").fill("10")
    page.get_by_label("Classes").press("Tab")
    assert 10 == len(shown(page)[1])
    expect(page.get_by_text("numerics of the service agree")).to_be_visible()
    before = shown(page)
    page.reload()
    expect(page.locator(".answer")).to_have_count(10)
    assert before == shown(page)


def test_prediction_is_loaded_into_the_explorer(console: Watched, fleet: Service) -> None:
    """The logits and the temperature of an engine's newest prediction give its probabilities again."""
    last = fleet.client.get("/v1/engines/FD001-64").json()["history"][-1]
    page = console.open("#/explorer")
    page.get_by_label("Engine whose newest prediction to load").fill("FD001-64")
    page.get_by_role("button", name="Load").click()
    expect(page.get_by_text("FD001-64 at cycle")).to_be_visible()
    assert list(last["probabilities"].values()) == pytest.approx(shown(page)[1], abs=2e-6)
    assert "degrading" in page.locator(".answers").inner_text()


@pytest.mark.parametrize("colours", ["light", "dark"])
def test_every_page_is_accessible_and_fits_a_telephone(browser: Browser, fleet: Service, colours: Any) -> None:
    """No page has a violation of axe in light and dark, or is wider than 1280 or 375 px."""
    home, axe = str(fleet.client.base_url).rstrip("/") + "/", Axe()
    with watched(browser, home, color_scheme=colours) as console:
        for path in PAGES:
            console.page.set_viewport_size({"width": 1280, "height": 800})
            page = console.open(path)
            expect(page.locator("main .card, .rows .row").first).to_be_visible()
            if path != "#/fleet":
                expect(page.locator(".chart .main-svg").first).to_be_visible()
            rules = None if colours == "light" else CONTRAST
            found = [axe.run(page, options=rules)]
            expect(page.locator("html")).to_have_js_property("scrollWidth", 1280)
            page.set_viewport_size({"width": 375, "height": 800})
            expect(page.locator("html")).to_have_js_property("scrollWidth", 375)
            if path == "#/fleet":  # whose rows become cards
                found.append(axe.run(page, options=rules))
            assert [0] * len(found) == [one.violations_count for one in found], found[-1].generate_report()
            page.goto("about:blank")
        console.open()
        expect(console.page.locator("html")).to_have_attribute("data-theme", colours)
        console.page.get_by_role("button", name="Dark colours").click()
        expect(console.page.locator("html")).not_to_have_attribute("data-theme", colours)
    assert ([], []) == (console.errors, [x for x in console.outside if x != "about:blank"])


def test_page_recovers_after_a_restart_of_the_service(browser: Browser, tmp_path: Path) -> None:
    """A wrong key is rejected; a page without engines says what to do; an unreachable service is reported."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    around = {"ENGINE_HEALTH_API_KEYS": "shibboleth", "ENGINE_HEALTH_DATABASE_URL": f"sqlite:///{tmp_path}/m.db"}
    process = up(port, around)
    try:
        with watched(browser, f"http://127.0.0.1:{port}/") as console:
            page = console.open()
            page.get_by_label("Key", exact=True).fill("sibboleth")
            page.get_by_role("button", name="Use this key").click()
            expect(page.get_by_text("Not accepted: this API key is not configured")).to_be_visible()
            page.get_by_label("Key", exact=True).fill("shibboleth")
            page.get_by_role("button", name="Use this key").click()
            expect(page.get_by_text("No engine is stored")).to_be_visible()
            down(process)
            expect(page.get_by_text("does not respond")).to_be_visible()
            process = up(port, around)
            expect(page.get_by_text("does not respond")).to_be_hidden()
            assert {"401", "ERR_CONNECTION_REFUSED"} <= set(console.refused)
            assert ([], []) == (console.errors, console.outside)
    finally:
        down(process)


def test_console_without_store_says_so(browser: Browser) -> None:
    """A stateless service has an explorer, and says of the other pages how to get them."""
    with running(ENGINE_HEALTH_DATABASE_URL="") as service:
        with watched(browser, str(service.client.base_url).rstrip("/") + "/") as console:
            page = console.open()
            expect(page.get_by_text("This service has no store")).to_be_visible()
            page.get_by_role("link", name="The explorer needs no store").click()
            expect(page.get_by_text("numerics of the service agree")).to_be_visible()
        assert ([], []) == (console.errors, console.outside)


def test_consoles_files_are_cached_packed_and_nothing_else_is_served(service: Service) -> None:
    """Each file has its type, a strict policy and a tag by which it is not sent again; no path leads out."""
    client = service.client
    index = client.get("/")
    assert 'src="console/main.js"' in index.text
    files = [*re.findall(r'"(console/[^"]+)"', index.text), "console/plotly.min.js"]
    kinds = {"js": "text/javascript; charset=utf-8", "css": "text/css; charset=utf-8", "svg": "image/svg+xml"}
    for path in files:
        got = client.get(f"/{path}")
        assert (200, kinds[path.rpartition(".")[2]]) == (got.status_code, got.headers["content-type"]), path
        again = client.get(f"/{path}", headers={"If-None-Match": f'"other", W/{got.headers["etag"]}'})
        assert (304, b"") == (again.status_code, again.content)
        plain = client.get(f"/{path}", headers={"Accept-Encoding": "identity"})
        assert got.content == plain.content
        assert "unsafe" not in got.headers["content-security-policy"]
    assert int(client.get("/console/plotly.min.js").headers["content-length"]) < 2_000_000
    for path in ("none.js", "../pages.py", "..%2Fpages.py", "%2e%2e/pages.py", "", "/etc/passwd", "index.html/x"):
        assert 404 == client.get(f"/console/{path}").status_code, path
    assert 405 == client.post("/", json={}).status_code


def test_nothing_in_the_console_names_another_host() -> None:
    """No file of the console has an address of another host but the names of XML."""
    folder = Path(__file__).parents[2] / "service" / "console" / "static"
    for path in folder.iterdir():
        hosts = re.findall(r"https?://[\w.-]+|[\"'`(]//\w[\w.-]+", path.read_text())
        assert [] == [host for host in hosts if host != "http://www.w3.org"], path
