"""`make watch-shots`: uses the page of `broker-filter watch` in Chromium as a person does, and takes screenshots.

An embedded broker holds thousands of output records, some with hostile text. The script checks that the page asks no
other server, runs no text of packets, reports no error, fits narrow windows, has enough contrast in light and dark, can
be used by keyboard alone, counts new alerts without moving the list, and stores the labels that were given.

    python tests/watch/shots.py OUT [ALERTS]

CHROMIUM names the browser (default: /usr/bin/chromium).
"""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient, NewTopic
from playwright.sync_api import Browser, Page, sync_playwright

from broker_filter.local_kafka import embedded_broker
from tests.watch.made_night import FIRST_ID, HOSTILE, annotation, records

ALERTS = 3_000
NARROW, WIDE = 390, 1400
TOPIC = "me.anomalies"
PATIENCE_S = 180.0
LARGEST_ANSWER = 2_000_000_000
"""Bytes: the embedded broker answers with all messages of a partition and ignores the client's limit."""
DRAWN_WITHIN_MS = 1_500
LEAST_CONTRAST = 4.5
"""WCAG 2.2, level AA, for text."""

CONTRAST = """() => {
  const channel = (c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const ground = (element) => {
    for (let one = element; one; one = one.parentElement) {
      const colour = parse(getComputedStyle(one).backgroundColor);
      if (colour.length < 4 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  const poor = [];
  for (const element of document.body.querySelectorAll("*")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!own || !element.checkVisibility() || element.closest(":disabled") || element.matches("option")) continue;
    const style = getComputedStyle(element);
    const [a, b] = [parse(element instanceof SVGElement ? style.fill : style.color), ground(element)].map(light);
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < LEAST) poor.push(`${element.tagName}.${element.getAttribute("class")} ${ratio.toFixed(2)}`);
  }
  return [...new Set(poor)];
}""".replace("LEAST", str(LEAST_CONTRAST))
NAMELESS = """() => {
  const one = document.activeElement;
  if (one === document.body || one === document.documentElement) return "";
  const labels = [...(one.labels || [])].map((label) => label.textContent).join("");
  const text = one.getAttribute("aria-label") || one.textContent.trim() || labels;
  return text ? "" : one.outerHTML.slice(0, 200);
}"""


def check(condition: bool, what: str) -> None:
    if not condition:
        raise SystemExit(f"watch-shots: {what}")


def publish(bootstrap: str, messages: Iterator[bytes] | Sequence[bytes]) -> None:
    producer = Producer({"bootstrap.servers": bootstrap, "linger.ms": 50})
    for message in messages:
        producer.produce(TOPIC, message)
        producer.poll(0)
        if len(producer) > 2_000:
            producer.flush()
    check(producer.flush(60) == 0, "the broker took not all records")


@contextmanager
def watching(bootstrap: str, labels: Path) -> Iterator[str]:
    """Run the command, and yield the address of its page."""
    command = [sys.executable, "-m", "broker_filter", "watch", "--bootstrap-servers", bootstrap, "--topic", TOPIC]
    options = ["--newest", "1000000", "--labels", str(labels), "--classes", "SN,AGN,VS", "--port", "0"]
    options += ["--kafka", f"receive.message.max.bytes={LARGEST_ANSWER}"]
    with subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            yield process.stdout.readline().strip()
        finally:
            process.send_signal(signal.SIGINT)
            check(process.wait(30) == 130, f"the command ended with {process.returncode}")


@contextmanager
def opened(browser: Browser, address: str, width: int, scheme: str) -> Iterator[Page]:
    """Open the page, and check at the end that nothing went wrong in it."""
    context = browser.new_context(viewport={"width": width, "height": 940}, color_scheme=scheme)  # type: ignore[arg-type]
    page = context.new_page()
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith(address) else problems.append(request.url))
    page.goto(address)
    page.wait_for_selector("#detail h2", state="attached", timeout=1000 * PATIENCE_S)
    yield page
    page.wait_for_timeout(300)
    check(not problems, f"at {width} px in {scheme}: {problems}")
    check("run" not in page.title().split(), "text of a packet was run")
    check(page.evaluate("document.documentElement.scrollWidth") <= width, f"the page is wider than {width} px")
    context.close()


def wait_until(page: Page, condition: str, what: str, patience_s: float = 15.0) -> None:
    deadline = time.monotonic() + patience_s
    while not page.evaluate(condition):
        check(time.monotonic() < deadline, f"not so after {patience_s:.0f} s: {what}")
        page.wait_for_timeout(50)


def current(page: Page) -> str:
    return str(page.locator("button.alert[aria-current]").get_attribute("data-id"))


def press(page: Page, key: str, pause_ms: int = 250) -> None:
    page.keyboard.press(key)
    page.wait_for_timeout(pause_ms)


def step(page: Page, key: str) -> str:
    """Press a key that goes to another alert, and return the id of this alert."""
    before = current(page)
    page.keyboard.press(key)
    moved = f"![null, '{before}'].includes(document.querySelector('button.alert[aria-current]')?.dataset.id ?? null)"
    wait_until(page, moved, f"{key} goes to another alert")
    return current(page)


def rows_of(file: Path) -> dict[str, dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as table:
        return {row["alert_id"]: row for row in csv.DictReader(table)}


def use_by_keyboard(page: Page, labels: Path, out: Path) -> None:
    """Go through the list, label, undo, search, sort and ask for help without the mouse."""
    page.select_option("#sort", "strangest")
    page.wait_for_timeout(400)
    page.locator("#found").click()
    page.locator("button.alert").first.click()
    page.wait_for_timeout(300)
    for _ in range(2):
        step(page, "j")
    ids = page.locator("button.alert").evaluate_all("all => all.map((one) => one.dataset.id)")
    real = current(page)
    check(real == ids[2], "j does not move to the next alert")
    bogus = step(page, "r")
    check(bogus == ids[ids.index(real) + 1], "a label does not move to the next alert")
    press(page, "i", 600)
    classed = step(page, "b")
    undone = step(page, "1")
    step(page, "2")
    step(page, "u")
    found = rows_of(labels)
    check(found[real]["label"] == "real", "r does not label")
    check((found[bogus]["label"], found[bogus]["interesting"]) == ("bogus", "true"), "i and b do not label")
    check(found[classed]["label"] == "SN", "1 does not label with the first class")
    check(undone not in found, "u does not undo the last label")
    check(current(page) == undone, "u does not return to the alert")
    press(page, "n")
    page.keyboard.type("rising fast")
    press(page, "Enter", 400)
    check(rows_of(labels)[undone]["note"] == "rising fast", "the note was not stored")
    press(page, "Escape")
    page.screenshot(path=out / "labelled.png")
    press(page, "m")
    check(page.locator('[data-unit="flux"][aria-pressed="true"]').count() == 1, "m does not change the unit")
    press(page, "m")
    press(page, "?")
    check(page.locator("dialog[open]").count() == 1, "? does not show the help")
    page.screenshot(path=out / "help.png")
    press(page, "Escape")
    press(page, "/")
    page.keyboard.type("rising fast")
    page.wait_for_timeout(700)
    check(page.locator("button.alert").count() == 1, "the search does not find the note")
    page.locator("#text").fill("")
    page.wait_for_timeout(600)
    press(page, "Escape")
    press(page, "]", 500)
    check(page.locator("#page-number").inner_text().startswith("page 2 of"), "] does not turn the page")
    press(page, "[", 500)
    page.locator("#score").select_option("default.real")
    page.locator("#low").fill("0.9")
    page.wait_for_timeout(700)
    check(float(page.locator("button.alert .reason b").first.inner_text()) >= 0.9, "the score does not filter")
    page.locator("#low").fill("")
    page.wait_for_timeout(500)


def tab_through(page: Page) -> None:
    """Check that everything that gets the focus says what it is."""
    page.locator("body").evaluate("one => { document.activeElement.blur(); }")
    reached = set()
    for _ in range(90):
        page.keyboard.press("Tab")
        nameless = page.evaluate(NAMELESS)
        check(not nameless, f"this element has the focus and no name: {nameless}")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.className"))
    check({"sort", "text", "label", "low", "alert"} <= reached, f"Tab reaches only {sorted(reached)}")


def get_new_alerts(page: Page, bootstrap: str, count: int, out: Path) -> None:
    """Publish alerts while a person looks, and check that the list moves only when the person wants it."""
    page.select_option("#sort", "arrival")
    page.wait_for_timeout(500)
    before = page.locator("button.alert").evaluate_all("all => all.map((one) => one.dataset.id)")
    publish(bootstrap, list(records(5, first=count)))
    wait_until(page, "document.getElementById('new').textContent === '5 new'", "5 alerts are new")
    after = page.locator("button.alert").evaluate_all("all => all.map((one) => one.dataset.id)")
    check(before == after, "the list moved by itself")
    page.screenshot(path=out / "new.png")
    press(page, ".")
    wait_until(page, "document.getElementById('new').hidden", "the list has the new alerts")
    page.wait_for_timeout(500)
    top = page.locator("button.alert").evaluate_all("all => all.slice(0, 5).map((one) => one.dataset.id)")
    check(set(top) == {str(FIRST_ID + count + k) for k in range(5)}, "the new alerts are not at the top")


def main(out: Path, alerts: int) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="watch-shots-") as folder, embedded_broker(Path(folder)) as bootstrap:
        labels = Path(folder, "labels.csv")
        admin = AdminClient({"bootstrap.servers": bootstrap})
        admin.create_topics([NewTopic(TOPIC, 3, 1)])[TOPIC].result()
        started = time.monotonic()
        hostile = 4
        publish(bootstrap, records(alerts - hostile, distinct=40))
        publish(bootstrap, records(hostile, text=HOSTILE, first=alerts - hostile))
        print(f"{alerts} records published in {time.monotonic() - started:.0f} s")
        with watching(bootstrap, labels) as address, sync_playwright() as playwright:
            chromium = os.environ.get("CHROMIUM", "/usr/bin/chromium")
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            started = time.monotonic()
            with opened(browser, address, WIDE, "light") as page:
                text = f"document.getElementById('status').textContent.startsWith('{alerts:,} alerts')"
                wait_until(page, text, f"{alerts} alerts were read", PATIENCE_S)
                print(f"{alerts} alerts read {time.monotonic() - started:.0f} s after the page was opened")
                press(page, ".", 1000)
                page.reload()
                page.wait_for_selector("#detail h2")
                began = time.monotonic()
                page.select_option("#sort", "strangest")
                strange = "document.querySelector('button.alert .reason b')?.textContent >= '5'"
                wait_until(page, strange, "the strangest alert is the first")
                took_ms = 1000 * (time.monotonic() - began)
                print(f"{alerts} alerts sorted and drawn in {took_ms:.0f} ms")
                check(took_ms < DRAWN_WITHIN_MS, f"sorting took {took_ms:.0f} ms")
                highest = max(annotation(k)["anomaly"]["score"] for k in range(100))
                top = page.locator("button.alert .reason b").first.inner_text()
                check(float(top) == round(highest, 2), f"the strangest alert has the score {top}, not {highest}")
                use_by_keyboard(page, labels, out)
                tab_through(page)
                get_new_alerts(page, bootstrap, alerts, out)
            for scheme in ("light", "dark"):
                for width in (WIDE, NARROW):
                    with opened(browser, address, width, scheme) as page:
                        page.select_option("#sort", "strangest")
                        page.wait_for_timeout(600)
                        page.screenshot(path=out / f"list_{scheme}_{width}.png")
                        page.locator("button.alert").nth(1).click()
                        page.wait_for_timeout(700)
                        page.screenshot(path=out / f"alert_{scheme}_{width}.png")
                        poor = page.evaluate(CONTRAST)
                        check(not poor, f"too little contrast in {scheme} at {width} px: {poor}")
            with opened(browser, address, WIDE, "dark") as page:
                page.locator("#text").fill("document.title")
                page.wait_for_timeout(700)
                listed = page.locator("button.alert").count()
                check(listed == hostile // 2, "the hostile names are not listed")  # LSST's names are numbers
                page.locator("button.alert").first.click()
                page.wait_for_timeout(600)
                check("<script>" in page.locator("#detail h2").inner_text(), "hostile text is not shown as text")
                check(page.locator("#detail script, #list script, [onerror]").count() == 0, "text became elements")
                page.screenshot(path=out / "hostile.png", full_page=True)
            browser.close()
    print(f"all checks passed; screenshots in {out}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else ALERTS)
