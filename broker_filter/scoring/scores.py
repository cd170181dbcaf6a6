"""What the models say of a batch, in columns."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class ModelScores:
    """One model's outputs over N alerts; NaN in the rows of alerts that it does not take (another survey's)."""

    model: str
    version: str
    labels: tuple[str, ...]  # C
    probabilities: NDArray[np.float32]  # [N, C]
    embedding: NDArray[np.float32] | None  # [N, D]
    taken: NDArray[np.bool_]  # [N]
    modalities: NDArray[np.float32] | None = None  # [N, M, D / M] its parts; zeros: an alert lacks one


@dataclass(frozen=True, slots=True)
class Scores:
    """All models' outputs over the same N alerts."""

    models: tuple[ModelScores, ...]
    taken: NDArray[np.bool_]  # [N] at least one model took it

    def columns(self) -> dict[str, NDArray[np.float32]]:
        """Output columns by name, `<model>.<label>` -> float32[N], in the models' order."""
        return {
            f"{scores.model}.{label}": scores.probabilities[:, c]
            for scores in self.models
            for c, label in enumerate(scores.labels)
        }
