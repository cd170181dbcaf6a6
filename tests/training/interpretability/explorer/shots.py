"""`make explorer-shots`: opens explorer pages in Chromium, checks them, and takes screenshots at two widths.

It checks that a page loads nothing, runs no text of packets, reports no error, fits the width of the window, opens
within the time limit, can be sorted, filtered and used by keyboard, and downloads the names that were typed.

    python tests/training/interpretability/explorer/shots.py OUT [PAGE.html ...]

Without pages, it makes two from simulated alerts. CHROMIUM names the browser (default: /usr/bin/chromium).
"""

from __future__ import annotations

import csv
import json
import os
import sys
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

from tests.training.interpretability.explorer.made_page import HOSTILE, made_page
from training.interpretability.explorer.data import Kind
from training.interpretability.explorer.page import render

WIDTHS = (1280, 390)
OPENS_WITHIN_MS = 2000
LOCAL = ("file:", "data:", "blob:")
"""Addresses that need no network."""
NAME = 'rise, "fast"'


def check(condition: bool, what: str) -> None:
    if not condition:
        raise SystemExit(f"explorer-shots: {what}")


def check_page(browser: Browser, file: Path, out: Path) -> None:
    contents = json.loads(file.read_text(encoding="utf-8").split('id="contents">')[1].split("</script>")[0])
    # the alert with the most active features shows most
    alert = max(contents["alerts"], key=lambda one: len(one["active"]))["id"]
    feature = max(contents["features"], key=lambda one: len(one["top"]))["id"]
    views = {
        "features": "#features",
        "feature": f"#feature={feature}",
        "alerts": "#alerts",
        "alert": f"?alert={alert}",
        "alert_by_hash": f"#alert={alert}",
    }
    for width in WIDTHS:
        page = browser.new_page(viewport={"width": width, "height": 900})
        check_views(page, width, file, views, out)
        if width == WIDTHS[0]:
            check_use(page, file, len(contents["features"]))
        page.close()


def check_views(page: Page, width: int, file: Path, views: dict[str, str], out: Path) -> None:
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith(LOCAL) else problems.append(request.url))
    for name, address in views.items():
        took = opening_time(page, file.as_uri() + address)
        print(f"{file.name} {name} at {width} px: opened in {took:.0f} ms")
        page.screenshot(path=out / f"{file.stem}_{name}_{width}.png", full_page=True)
        check(took < OPENS_WITHIN_MS, f"{file}{address} took {took:.0f} ms to open")
        check(not problems, f"{file}{address} at {width} px: {problems}")
        check(page.evaluate("document.documentElement.scrollWidth") <= width, f"{address} is wider than {width} px")
        check(page.title() != "run", f"{file}{address} runs text of a packet")
        check(page.locator("h2").count() > 0, f"{file}{address} shows nothing")


def opening_time(page: Page, address: str) -> float:
    """Return the CPU time of the page's thread until a page is open, in ms: other processes do not lengthen it."""
    page.goto("about:blank")
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})
    page.goto(address)
    metrics = {one["name"]: one["value"] for one in session.send("Performance.getMetrics")["metrics"]}
    session.detach()
    return float(1000 * metrics["TaskDuration"])


def check_use(page: Page, file: Path, features: int) -> None:
    """Sort, filter, name a feature, use the keyboard, and download the names."""
    page.goto(file.as_uri() + "#features")
    rows = page.locator("#list tbody tr")
    check(rows.count() == features, "the list lacks features")
    page.locator('[data-sort="frequency"]').press("Enter")
    check(page.locator("th[aria-sort=ascending]").count() == 1, "Enter on a column's title does not sort")
    page.locator("input[type=search]").fill("no such feature")
    check(rows.count() == 0, "the search does not filter")
    page.locator("input[type=search]").fill("")
    page.locator("#list tbody a").first.focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("#edit-name")
    identity = page.evaluate("location.hash").partition("=")[2]
    page.locator("#edit-name").fill(NAME)
    with page.expect_download() as download:
        page.locator("#download").click()
    with Path(download.value.path()).open(newline="", encoding="utf-8") as table:
        names = {row["id"]: row["name"] for row in csv.DictReader(table)}
    check(names[identity] == NAME, f"the downloaded table has {names.get(identity)!r} as the name")
    page.goto(file.as_uri() + "?alert=0")
    check(page.locator("[role=alert]").inner_text() == "The page has no alert 0.", "an unknown alert is not reported")


def main(out: Path, files: list[Path]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    if not files:
        files = [out / f"made_{kind}.html" for kind in Kind]
        for kind, file in zip(Kind, files, strict=True):
            file.write_text(render(made_page(kind, name=HOSTILE)), encoding="utf-8")
    with sync_playwright() as playwright:
        chromium = os.environ.get("CHROMIUM", "/usr/bin/chromium")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for file in files:
            check_page(browser, file.resolve(), out)
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
