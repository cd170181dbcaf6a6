"""Shows the shell commands of a tutorial as shell commands: a small Sphinx extension.

A cell of a tutorial that begins with `%%bash` runs its commands in a shell, and the build fails where they fail. A
reader wants to copy the commands alone.
"""

from __future__ import annotations

from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

MAGIC = "%%bash\n"


def show_commands(_app: Sphinx, document: nodes.document) -> None:
    """Removes the first line of each shell cell, and colours the rest as shell commands."""
    for block in document.findall(nodes.literal_block):
        if block.rawsource.startswith(MAGIC):
            text = block.rawsource.removeprefix(MAGIC)
            block.rawsource = text
            block.children = [nodes.Text(text)]
            block["language"] = "bash"


def setup(app: Sphinx) -> dict[str, Any]:
    """Connects the extension."""
    app.connect("doctree-read", show_commands)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
