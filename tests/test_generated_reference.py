"""The generated reference is complete: every page names what the code has."""

from __future__ import annotations

import re
from pathlib import Path

from broker_filter.packets.rejects import RejectReason
from docs.generated_reference import GENERATED, MARKER

DOCS = Path(__file__).parents[1] / "docs"


def first_column(markdown: str) -> list[str]:
    """The code in the first cells of the tables."""
    return re.findall(r"^\| `([^`]+)` \|", markdown, re.MULTILINE)


def test_every_generated_text_has_one_place() -> None:
    pages = "\n".join(page.read_text() for page in DOCS.glob("reference/*.md"))
    assert sorted(MARKER.findall(pages)) == sorted(GENERATED)


def test_every_reject_reason_is_in_the_reference() -> None:
    assert first_column(GENERATED["reject_reasons"]()) == list(RejectReason)
