"""Argparse types for the training commands: a value that cannot be used is reported as wrong usage, before any work."""

from __future__ import annotations

import argparse

MAX_SEED = 2**32 - 1
"""As in `recipe.Seed`."""


def positive(text: str) -> int:
    """A number of things, one at least."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def seed(text: str) -> int:
    """Of random numbers."""
    if not 0 <= (value := int(text)) <= MAX_SEED:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to {MAX_SEED}")
    return value


def share(text: str) -> float:
    """A part of a whole: above 0, and up to 1."""
    if not 0 < (value := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and up to 1")
    return value
