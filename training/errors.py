"""What can go wrong and a person can mend. The message says what, where, and what to do."""

from __future__ import annotations

from pathlib import Path


class DatasetError(Exception):
    """A data set, or what it is to be made of, that cannot be used."""


class TrainingError(Exception):
    """A configuration, a checkpoint or weights that cannot be trained with."""


class EvaluationError(Exception):
    """An evaluation or a comparison that cannot be made."""


def refuse_existing(bundle: Path) -> None:
    """To be called before training what is to become `bundle`. Raises TrainingError where something is there."""
    if bundle.exists():
        raise TrainingError(f"{bundle}: exists already; choose another directory, or remove it first")
