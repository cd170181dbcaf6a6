"""Renders the contents of an explorer's page as one HTML file that needs no other file and no network."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from training.interpretability.explorer.data import Page, as_json

TEMPLATE, STYLE, SCRIPT = "page.html.jinja", "page.css", "page.js"


def render(page: Page) -> str:
    """Return the page as HTML.

    The text of the page may come from packets and is untrusted: it is escaped, and the page's content security policy
    runs no script other than this module's own.
    """
    here = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(here), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    script = (here / SCRIPT).read_text(encoding="utf-8")
    return environment.get_template(TEMPLATE).render(
        page=page,
        style=(here / STYLE).read_text(encoding="utf-8"),
        script=script,
        script_sha256=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        contents=as_json(page),
    )
