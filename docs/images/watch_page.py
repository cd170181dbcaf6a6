"""Makes `watch.jpg`, the picture in docs/how-to/watch.md: the page on a simulated night. All alerts are simulated.

    pip install playwright
    .venv/bin/python docs/images/watch_page.py

It needs Chromium (CHROMIUM names it; default: /usr/bin/chromium), and takes a minute.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from playwright.sync_api import sync_playwright

from broker_filter.simulate import simulate_night

ALERTS = 500
SIZE = {"width": 1280, "height": 1060}
READ_WITHIN_S = 180
SHOWN = 2
"""The place of the alert that is shown, from 0, in the list sorted by the probability of a supernova."""
BROKER_FILTER = [sys.executable, "-m", "broker_filter"]


def main(picture: Path) -> None:
    """Write the picture."""
    with tempfile.TemporaryDirectory() as folder:
        for name, seed in (("ordinary", 1), ("tonight", 2)):
            Path(folder, name).mkdir()
            for alert in simulate_night(ALERTS, seed):
                Path(folder, name, f"{alert.alert_id}.avro").write_bytes(alert.packet)
        build = ["reference", "build", "ordinary", "--out", "ordinary.safetensors"]
        subprocess.run([*BROKER_FILTER, "-q", *build], cwd=folder, check=True)
        models = [option for name in ("default", "classes", "embedder") for option in ("--model", name)]
        labels = ["--labels", "labels.csv", "--classes", "SN,AGN,VS"]
        options = [*models, "--reference", "ordinary.safetensors", *labels, "--port", "0"]
        command = [*BROKER_FILTER, "watch", "tonight", *options]
        with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout
            take(process.stdout.readline().strip(), picture)
            process.send_signal(signal.SIGTERM)


def take(address: str, picture: Path) -> None:
    """Label three alerts on the page, and write a picture of it."""
    with sync_playwright() as playwright:
        chromium = os.environ.get("CHROMIUM", "/usr/bin/chromium")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport=SIZE)
        page.goto(address)
        deadline = time.monotonic() + READ_WITHIN_S
        while not page.locator("#status").inner_text().startswith(f"{ALERTS} alerts ·") and time.monotonic() < deadline:
            time.sleep(1)
        page.keyboard.press(".")
        page.wait_for_timeout(500)
        page.select_option("#sort", "classes.SN")
        page.wait_for_timeout(700)
        page.locator("button.alert").first.click()
        page.wait_for_timeout(300)
        for key in ("i", "1", "1", *["j"] * (SHOWN - 2)):
            page.keyboard.press(key)
            page.wait_for_timeout(500)
        page.wait_for_timeout(1000)
        page.screenshot(path=picture, type="jpeg", quality=82)
        browser.close()


if __name__ == "__main__":
    main(Path(__file__).with_name("watch.jpg"))
