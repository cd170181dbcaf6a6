"""Hold the arguments that several training commands share, and the types that check them.

An argparse type reports an invalid value as wrong usage before any work starts.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Literal

MAX_SEED = 2**32 - 1
"""The limit of `recipe.Seed`."""


def add_labelled_alerts(
    parser: argparse.ArgumentParser, class_help: str, *, inputs: Literal["+", "*"] = "+", labels_required: bool = True
) -> None:
    """Add the arguments that name alerts and their labels: `inputs`, `--labels`, `--label` and `--class`."""
    parser.add_argument("inputs", nargs=inputs, type=Path, metavar="INPUT", help="file, folder or archive of alerts")
    parser.add_argument(
        "--labels",
        required=labels_required,
        type=Path,
        metavar="TABLE",
        help=".csv or .parquet table of labels with a column of alert or object ids",
    )
    parser.add_argument("--label", default="label", metavar="COLUMN", help="label column of the table (default: label)")
    parser.add_argument(
        "--class",
        dest="classes",
        action="append",
        default=[],
        metavar="NAME=VALUES",
        help=class_help,
    )


def positive(text: str) -> int:
    """Return a positive integer. Raises ArgumentTypeError for any other text."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def seed(text: str) -> int:
    """Return a seed of a random number generator, 0 to MAX_SEED. Raises ArgumentTypeError for any other text."""
    if not 0 <= (value := int(text)) <= MAX_SEED:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to {MAX_SEED}")
    return value


def share(text: str) -> float:
    """Return a fraction, 0 < fraction <= 1. Raises ArgumentTypeError for any other text."""
    if not 0 < (value := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a fraction above 0 and at most 1")
    return value
