"""`compare`: a report that compares evaluations, as an HTML page with plots and as Markdown. It runs no model."""

from __future__ import annotations

import argparse
from pathlib import Path

from training.evaluation.evaluations import read_evaluations
from training.evaluation.report import as_html, as_markdown

HTML, MARKDOWN = "comparison.html", "comparison.md"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `compare`."""
    parser.add_argument("evaluations", nargs="+", type=Path, metavar="EVALUATION", help="directory that evaluate wrote")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help=f"directory for {HTML} and {MARKDOWN}")


def run(arguments: argparse.Namespace) -> None:
    """Write the report and print its table."""
    models = read_evaluations(arguments.evaluations)
    arguments.out.mkdir(parents=True, exist_ok=True)
    markdown = as_markdown(models)
    (arguments.out / HTML).write_text(as_html(models), encoding="utf-8")
    (arguments.out / MARKDOWN).write_text(markdown, encoding="utf-8")
    print(markdown)
    print(arguments.out / HTML)
