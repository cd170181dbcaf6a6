"""The scores of a batch, in columns."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


def output_name(model: str, label: str) -> str:
    """Return the name of a model's output for one label, `<model>.<label>`, as in filters, tables and records."""
    return f"{model}.{label}"


@dataclass(frozen=True, slots=True)
class ModelScores:
    """One model's outputs for N alerts. Rows of alerts that the model does not take (of another survey) are NaN."""

    model: str
    version: str
    labels: tuple[str, ...]  # C
    probabilities: NDArray[np.float32]  # [N, C]
    embedding: NDArray[np.float32] | None  # [N, D]
    taken: NDArray[np.bool_]  # [N]
    modalities: NDArray[np.float32] | None = None  # [N, M, D / M], zeros where an alert lacks one


@dataclass(frozen=True, slots=True)
class Scores:
    """The outputs of all models for the same N alerts.

    >>> from broker_filter import Packet, Scorer
    >>> from broker_filter.simulate import simulate_night
    >>> scorer = Scorer.open("embedder")
    >>> alerts, _ = scorer.decoder().decode([Packet(alert.packet) for alert in simulate_night(2, seed=1)])
    >>> scores = scorer.score(alerts)
    >>> scores.taken.tolist(), scores.models[0].embedding.shape[0]
    ([True, True], 2)
    """

    models: tuple[ModelScores, ...]
    taken: NDArray[np.bool_]  # [N] at least one model took the alert

    def columns(self) -> dict[str, NDArray[np.float32]]:
        """Return output columns by name, `<model>.<label>` -> float32[N], in the order of the models."""
        return {
            output_name(scores.model, label): scores.probabilities[:, c]
            for scores in self.models
            for c, label in enumerate(scores.labels)
        }
