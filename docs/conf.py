"""Configuration of Sphinx for the documentation site: `make docs` builds it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import broker_filter

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS))

# The tutorials run the programs of this environment, and `python -m training` of this checkout.
os.environ["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
os.environ["PYTHONPATH"] = str(DOCS.parent)

project = "broker-filter"
author = "The broker-filter developers"
copyright = author  # noqa: A001 - Sphinx reads this name
version = release = broker_filter.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "generated_reference",
    "shell_cells",
]
exclude_patterns = ["_build"]

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4
smartquotes = False  # would turn the dashes of options into one

nb_execution_mode = "force"
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_timeout = 600  # seconds for a cell: many times what one takes on an idle machine
nb_merge_streams = True


default_role = "code"  # docstrings mark code by single backquotes
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True

# The examples in docstrings run in a folder with the files that they read.
doctest_global_setup = """\
import tempfile
from contextlib import ExitStack, chdir
from pathlib import Path
from library_examples import write_example_night
_ended = ExitStack()
_folder = _ended.enter_context(tempfile.TemporaryDirectory())
_ended.enter_context(chdir(_folder))
write_example_night(Path(_folder))
"""
doctest_global_cleanup = "_ended.close()"

html_theme = "pydata_sphinx_theme"
html_title = "broker-filter"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_sidebars: dict[str, list[str]] = {"quickstart": []}  # no other page stands in its section
html_theme_options = {
    "show_prev_next": True,
    "navigation_with_keys": False,
    "secondary_sidebar_items": ["page-toc"],
    "header_links_before_dropdown": 5,
}
