"""Predictions of a model for the alerts of a split, with the true classes: the input of all metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from training.errors import EvaluationError

PROBABILITY = "probability."
"""Prefix of a label's column in a file."""
EMBEDDING = "embedding"
COLUMNS = ("alert_id", "object_id", "magpsf", "truth")


@dataclass(frozen=True, slots=True)
class Predictions:
    """Predictions for N alerts of C classes.

    With a single column of probabilities (P = 1) the classifier is binary: it gives the probability of the second of
    two classes.
    """

    classes: tuple[str, ...]  # C
    alert_id: NDArray[np.int64]  # [N]
    object_id: NDArray[np.str_]  # [N]
    magpsf: NDArray[np.float64]  # [N] magnitudes, NaN where unknown
    truth: NDArray[np.int64]  # [N] index into `classes`
    probabilities: NDArray[np.float32]  # [N, P] of the last P classes: all, or the second of two
    threshold: float
    """Threshold of a binary classifier; with several classes the most probable one is predicted."""
    embedding: NDArray[np.float32] | None = None  # [N, D] if the model has an embedding

    def __len__(self) -> int:
        return len(self.alert_id)

    @property
    def labels(self) -> tuple[str, ...]:
        """The P classes that have probabilities."""
        return self.classes[-self.probabilities.shape[1] :]

    @property
    def binary(self) -> bool:
        """Whether the classifier is binary."""
        return len(self.labels) == 1

    @property
    def decided(self) -> NDArray[np.int64]:
        """The predicted class of each alert, int64[N]."""
        yes_or_most = self.probabilities[:, 0] > self.threshold if self.binary else self.probabilities.argmax(axis=1)
        return yes_or_most.astype(np.int64)

    def write(self, path: Path) -> None:
        """Write the predictions as a Parquet file.

        Its columns are the ids, the magnitude, the name of the true class, one column of probabilities per label, and
        the embedding as fixed-size lists.
        """
        columns: dict[str, object] = {name: getattr(self, name) for name in COLUMNS[:-1]}
        columns["truth"] = np.array(self.classes)[self.truth]
        columns |= {PROBABILITY + label: self.probabilities[:, c] for c, label in enumerate(self.labels)}
        if self.embedding is not None:
            values = pa.array(self.embedding.ravel())
            columns[EMBEDDING] = pa.FixedSizeListArray.from_arrays(values, self.embedding.shape[1])
        pq.write_table(pa.table(columns), path)

    @classmethod
    def read(cls, path: Path, classes: Sequence[str], threshold: float) -> Predictions:
        """Read a file that `write` wrote.

        Raises EvaluationError if the file is not such a table, or has other classes.
        """
        try:
            table = pq.read_table(path)
        except (OSError, pa.ArrowException) as error:
            raise EvaluationError(f"{path}: not a table of predictions: {error}; evaluate the model again") from error
        labels = [name.removeprefix(PROBABILITY) for name in table.column_names if name.startswith(PROBABILITY)]
        if set(COLUMNS) - set(table.column_names) or not labels or labels != list(classes[-len(labels) :]):
            raise EvaluationError(f"{path}: columns {', '.join(table.column_names)}: evaluate the model again")
        column = {name: table[name].to_numpy() for name in table.column_names if name != EMBEDDING}
        if unknown := set(column["truth"]) - set(classes):
            raise EvaluationError(f"{path}: unknown classes {', '.join(sorted(unknown))}: evaluate the model again")
        return cls(
            classes=tuple(classes),
            alert_id=column["alert_id"],
            object_id=column["object_id"].astype(np.str_),
            magpsf=column["magpsf"],
            truth=np.array([classes.index(name) for name in column["truth"]], np.int64),
            probabilities=np.stack([column[PROBABILITY + label] for label in labels], axis=1),
            threshold=threshold,
            embedding=np.stack(table[EMBEDDING].to_numpy()) if EMBEDDING in table.column_names else None,
        )
