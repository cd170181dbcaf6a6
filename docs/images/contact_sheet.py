"""Makes `contact-sheet.jpg`, the picture in README.md, from the contact sheet of the demo. All alerts are simulated.

    make demo
    .venv/bin/python docs/images/contact_sheet.py demo-out/contact-sheet.png

Keeps four rows of the sheet. Leaves out its title, because the rate in it depends on the machine.
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image

SHEET_WIDTH, TITLE_HEIGHT, ROW_HEIGHT = 17, 0.7, 2.15
"""Inches, as `broker_filter.demo.contact_sheet` draws them."""
ROWS = 0, 2, 3, 5
"""Young supernovae, fast movers, anomalies, and alerts that the model classifies as bogus."""
WIDTH = 1280
"""Pixels: sharp on a page, and the file stays below 200 kB."""


def main(sheet: Path) -> None:
    """Write the picture beside this file."""
    with Image.open(sheet) as image:
        inch = image.width / SHEET_WIDTH
        height = round(ROW_HEIGHT * inch)
        picture = Image.new("RGB", (image.width, len(ROWS) * height))
        for i, row in enumerate(ROWS):
            top = round((TITLE_HEIGHT + row * ROW_HEIGHT) * inch)
            picture.paste(image.convert("RGB").crop((0, top, image.width, top + height)), (0, i * height))
    picture = picture.resize((WIDTH, round(WIDTH * picture.height / picture.width)), Image.Resampling.LANCZOS)
    picture.save(Path(__file__).with_name("contact-sheet.jpg"), quality=80, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
