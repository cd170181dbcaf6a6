"""What can go wrong and a person can mend. The message says what, where, and what to do."""

from __future__ import annotations


class DatasetError(Exception):
    """A data set, or what it is to be made of, that cannot be used."""


class TrainingError(Exception):
    """A configuration, a checkpoint or weights that cannot be trained with."""


class EvaluationError(Exception):
    """An evaluation or a comparison that cannot be made."""
