"""Shell commands in the tutorials: an extension of IPython that runs them, and one of Sphinx that shows them.

A cell of a tutorial that begins with `%%bash` holds shell commands. The build fails where one of them fails. A reader
wants to copy the commands alone, so the page does not show the first line.
"""

from __future__ import annotations

import os
import subprocess
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

MAGIC = "%%bash\n"
FORCING_COLOUR = ("FORCE_COLOR", "CLICOLOR_FORCE")
"""Variables by which a notebook tells programs to write colours, which have no place on a page."""


def bash(_line: str, cell: str) -> None:
    """Run the commands of a cell and print what they print, in one piece. Raises CalledProcessError."""
    environment = {name: value for name, value in os.environ.items() if name not in FORCING_COLOUR}
    command = ["bash", "-e", "-o", "pipefail", "-c", cell]
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    print(done.stdout, end="")  # noqa: T201 - the result of the cell
    done.check_returncode()


def load_ipython_extension(shell: Any) -> None:
    """Put `bash` in the place of IPython's own, which prints in pieces of 100 bytes."""
    shell.register_magic_function(bash, "cell", "bash")


def show_commands(_app: Sphinx, document: nodes.document) -> None:
    """Remove the first line of each shell cell, and colour the rest as shell commands."""
    for block in document.findall(nodes.literal_block):
        if block.rawsource.startswith(MAGIC):
            text = block.rawsource.removeprefix(MAGIC)
            block.rawsource = text
            block.children = [nodes.Text(text)]
            block["language"] = "bash"


def setup(app: Sphinx) -> dict[str, Any]:
    """Connect the extension of Sphinx."""
    app.connect("doctree-read", show_commands)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
