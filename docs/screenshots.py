"""Take the screenshots of the console for the documentation, with a real service, C-MAPSS engines and Chromium.

python -m docs.screenshots    writes docs/console-*.png; needs C-MAPSS and /usr/bin/chromium
"""

from pathlib import Path

from playwright.sync_api import expect

from model.data import cmapss
from tests.support.browser import chromium, fly_nasas, watched
from tests.support.processes import running

FOLDER = Path(__file__).parent
DESK, TELEPHONE = {"width": 1280, "height": 860}, {"width": 375, "height": 740}
PICTURES = (
    ("fleet", "#/fleet", DESK, "light"),
    ("engine", "#/engine/FD001-56", DESK | {"height": 1100}, "light"),
    ("calibration", "#/calibration", DESK | {"height": 1100}, "dark"),
    ("explorer", "#/explorer?z=2.6,1.2,0.3,-1&y=1&t=1", DESK | {"height": 1060}, "light"),
    ("telephone", "#/fleet", TELEPHONE, "dark"),
)


def main() -> None:
    """Take all screenshots."""
    with running() as service, chromium() as browser:
        for subset in ("FD001", "FD002"):
            fly_nasas(service.client, cmapss.data_folder(), subset, 30, 30, 400)
        for name, path, size, colours in PICTURES:
            home = str(service.client.base_url).rstrip("/") + "/"
            with watched(browser, home, viewport=size, color_scheme=colours) as console:
                page = console.open(path)
                expect(page.locator(".chart .main-svg, .rows .row").first).to_be_visible(timeout=30_000)
                page.wait_for_timeout(2500)  # milliseconds, until charts and live updates are drawn
                page.screenshot(path=FOLDER / f"console-{name}.png")
            print(f"docs/console-{name}.png {(FOLDER / f'console-{name}.png').stat().st_size // 1024} kB")


if __name__ == "__main__":
    main()
