import base64
import hashlib
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.training.interpretability.explorer.made_page import GRID, HOSTILE, made_page
from training.interpretability.explorer.data import Kind, Table, as_json
from training.interpretability.explorer.page import SCRIPT, render
from training.interpretability.explorer.pictures import GAP, draw_strip


class Elements(HTMLParser):
    """Collects the elements of a page with their attributes, and the text of its scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.elements and self.elements[-1][0] == "script":
            self.scripts[-1] += data

    def handle_endtag(self, tag: str) -> None:
        if tag == "script":
            self.elements.append(("", {}))


@pytest.fixture(scope="module")
def hostile_page() -> str:
    return render(made_page(name=HOSTILE))


def test_page_names_no_external_address(hostile_page: str) -> None:
    assert not re.search(r"https?:|//[a-z0-9.-]+\.[a-z]{2,}/", hostile_page)
    loaded = [
        attributes[name]
        for _, attributes in Elements(hostile_page).elements
        for name in ("src", "href")
        if name in attributes
    ]
    assert loaded
    assert all(str(address).startswith(("#", "data:")) for address in loaded)


def test_untrusted_text_stays_text(hostile_page: str) -> None:
    elements = Elements(hostile_page)
    tags = [tag for tag, _ in elements.elements]
    assert "img" not in tags
    assert tags.count("script") == 2
    assert json.loads(elements.scripts[0])["features"][0]["name"] == HOSTILE


def test_untrusted_text_of_the_header_is_escaped() -> None:
    page = made_page(alerts=2)
    hostile = Table(HOSTILE, [HOSTILE], [[HOSTILE, HOSTILE]])
    page = replace(page, title=HOSTILE, warnings=[HOSTILE], facts=[(HOSTILE, HOSTILE)], metrics=[hostile])
    written = render(page)
    assert "img" not in [tag for tag, _ in Elements(written).elements]


def test_security_policy_allows_the_own_script_alone(hostile_page: str) -> None:
    elements = Elements(hostile_page)
    policy = next(a["content"] for tag, a in elements.elements if tag == "meta" and "http-equiv" in a)
    digest = base64.b64encode(hashlib.sha256(elements.scripts[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in str(policy)
    assert "default-src 'none'" in str(policy)


def test_script_never_makes_html_of_text() -> None:
    script = (Path(__file__).parents[4] / "training" / "interpretability" / "explorer" / SCRIPT).read_text()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", script)


def test_contents_hold_no_nan_and_few_digits() -> None:
    contents = json.loads(as_json(made_page(Kind.CELLS, alerts=3)))
    assert contents["features"][0]["enrichment"][1]["lift"]["low"] is None
    assert len(contents["cells"]) == GRID**2
    assert all(len(repr(value)) < 14 for value in contents["alerts"][0]["active"][0]["sources"])


def test_ids_beyond_the_integers_of_javascript_are_text() -> None:
    assert all(isinstance(alert["id"], str) for alert in json.loads(as_json(made_page(alerts=3)))["alerts"])


def test_strip_shows_the_pixels_of_the_stamp_with_the_first_row_at_the_bottom() -> None:
    cutouts = np.zeros((3, 63, 63), np.float32)
    cutouts[:] = np.random.default_rng(0).normal(size=(63, 63))
    cutouts[:, 12, 20] = 1000
    cutouts[:, 14, 21] = np.nan
    box = np.array([[10, 20, 30, 31]] * 3, np.int16)
    picture, shown = draw_strip(cutouts, box)
    assert shown == (10, 20, 30, 31)
    with Image.open(io.BytesIO(base64.b64decode(picture))) as image:
        assert image.size == (3 * 31 + 2 * GAP, 30)
        pixels = np.asarray(image.convert("RGBA"))
    for stamp in range(3):
        left = stamp * (31 + GAP)
        brightness = pixels[:, left : left + 31, :3].sum(axis=2)
        assert np.unravel_index(brightness.argmax(), brightness.shape) == (30 - 1 - 2, 0)
        assert bytes(pixels[30 - 1 - 4, left + 1, :3].tolist()).hex() == "30363d"
    assert (pixels[:, 31 : 31 + GAP, 3] == 0).all()
    assert len(base64.b64decode(picture)) < 6000


def test_strip_of_stamps_of_different_sizes_shows_them_all() -> None:
    box = np.array([[0, 0, 40, 63], [0, 0, 63, 63], [0, 0, 63, 50]], np.int16)
    _, shown = draw_strip(np.ones((3, 63, 63), np.float32), box)
    assert shown == (0, 0, 63, 63)
