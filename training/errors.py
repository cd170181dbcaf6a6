"""Errors that the user can fix. The message says what is wrong, where, and what to do."""

from __future__ import annotations

from pathlib import Path

from broker_filter.errors import BrokerFilterError


class DatasetError(BrokerFilterError):
    """A data set, or the input for one, cannot be used."""


class TrainingError(BrokerFilterError):
    """A configuration, a checkpoint or weights cannot be used for training."""


class EvaluationError(BrokerFilterError):
    """An evaluation or a comparison cannot be made."""


class LensError(BrokerFilterError):
    """The attention of a network, or a run of the study of it, cannot be looked into."""


def refuse_existing(bundle: Path) -> None:
    """Raise TrainingError if `bundle` exists; called before a training that will write it."""
    if bundle.exists():
        raise TrainingError(f"{bundle}: exists already; choose another directory, or remove it first")
