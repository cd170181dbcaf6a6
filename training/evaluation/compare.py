"""`compare`: evaluations side by side, as one HTML page with plots and as Markdown. Measures nothing anew."""

from __future__ import annotations

import argparse
from pathlib import Path

from training.evaluation.evaluations import read_evaluations
from training.evaluation.report import as_html, as_markdown

HTML, MARKDOWN = "comparison.html", "comparison.md"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `compare` takes."""
    parser.add_argument("evaluations", nargs="+", type=Path, metavar="EVALUATION", help="what evaluate wrote")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help=f"for {HTML} and {MARKDOWN}")


def run(arguments: argparse.Namespace) -> None:
    """Writes the report and prints its table."""
    models = read_evaluations(arguments.evaluations)
    arguments.out.mkdir(parents=True, exist_ok=True)
    markdown = as_markdown(models)
    (arguments.out / HTML).write_text(as_html(models), encoding="utf-8")
    (arguments.out / MARKDOWN).write_text(markdown, encoding="utf-8")
    print(markdown)
    print(arguments.out / HTML)
