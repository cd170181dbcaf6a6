"""The reference pages, generated from the code: a small Sphinx extension.

A page below docs/ says with a line `<!-- generated: NAME -->` where the text of the function `NAME` in `GENERATED`
goes. Each function returns Markdown. A hand-written copy of what the code says must never stand beside it.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from broker_filter.packets.rejects import RejectReason

if TYPE_CHECKING:
    from sphinx.application import Sphinx

MARKER = re.compile(r"^<!-- generated: (\w+) -->$", re.MULTILINE)


def reject_reasons() -> str:
    """A table of every reason of the closed list."""
    meanings = _attribute_docstrings(RejectReason)
    return _table(("reason", "meaning"), ((f"`{reason}`", meanings[reason.name]) for reason in RejectReason))


GENERATED: dict[str, Callable[[], str]] = {function.__name__: function for function in (reject_reasons,)}
"""What a marker can name."""


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A Markdown table. The cells are Markdown of one line each."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines) + "\n"


def _attribute_docstrings(cls: type) -> dict[str, str]:
    """The string literals below the attributes of a class, by the name of the attribute."""
    [definition] = ast.parse(inspect.getsource(cls)).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for statement, following in pairwise(definition.body):
        match statement, following:
            case ast.Assign(targets=[ast.Name(id=name)]), ast.Expr(value=ast.Constant(value=str(text))):
                found[name] = text
    return found


def generate(text: str) -> str:
    """The text of a page with every marker replaced. Raises KeyError for a name that is not in `GENERATED`."""
    return MARKER.sub(lambda marker: GENERATED[marker[1]](), text)


def setup(app: Sphinx) -> dict[str, Any]:
    """Replaces the markers of each page before Sphinx parses it."""

    def on_source_read(_app: Sphinx, _page: str, source: list[str]) -> None:
        source[0] = generate(source[0])

    app.connect("source-read", on_source_read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
