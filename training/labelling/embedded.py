"""The alerts of archives with their embeddings and the outputs of models, in memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from broker_filter.anomalies.neighbours import Embeddings, normalise
from broker_filter.cli.archived import score_archives
from broker_filter.config import Runtime, SurveyName
from broker_filter.packets.batch import Survey
from broker_filter.scoring.bundle import open_bundle
from broker_filter.scoring.scorer import open_scorer
from broker_filter.streaming.scored import ScoredBatch
from training.errors import DatasetError

MOST_ALERTS = 200_000
"""Largest number of alerts in memory: their embeddings take some hundred megabytes."""


@dataclass(frozen=True, slots=True)
class EmbeddedAlerts:
    """N alerts of one survey, each alert id once. `alerts[rows]` selects a subset."""

    alert_id: NDArray[np.int64]  # [N]
    object_id: NDArray[np.str_]  # [N]
    survey: SurveyName
    embedding: Embeddings  # [N, D] of length 1
    outputs: dict[str, NDArray[np.float32]]  # [N] by name `<model>.<label>`; NaN where a model gave none

    def __len__(self) -> int:
        return len(self.alert_id)

    def __getitem__(self, rows: NDArray[np.bool_] | NDArray[np.int64]) -> EmbeddedAlerts:
        outputs = {name: values[rows] for name, values in self.outputs.items()}
        return EmbeddedAlerts(self.alert_id[rows], self.object_id[rows], self.survey, self.embedding[rows], outputs)


def embed(
    batches: Iterable[ScoredBatch], outputs: Sequence[str], embedder: str, survey: SurveyName, source: str
) -> EmbeddedAlerts:
    """Return all alerts of a survey in scored batches, without duplicates.

    `outputs`: the names of the outputs of all models. `embedder`: the name of a model that gives an embedding.
    `source`: what the alerts are from, for messages.

    Raises DatasetError if the model gives none, if there is no alert of the survey, or if there are more than
    MOST_ALERTS.
    """
    ids, objects, embeddings = [], [], []
    columns: dict[str, list[NDArray[np.float32]]] = {name: [] for name in outputs}
    n = 0
    for scored in batches:
        of_model = next(one for one in scored.scores.models if one.model == embedder)
        if of_model.embedding is None:
            raise DatasetError(f"the bundle {embedder} gives no embedding: choose one that does, such as `embedder`")
        rows = np.flatnonzero(of_model.taken & (scored.alerts.survey == Survey[survey.upper()]) & ~scored.duplicate)
        ids.append(scored.alerts.alert_id[rows])
        objects.append(np.array(scored.alerts.object_id, np.str_)[rows])
        embeddings.append(normalise(of_model.embedding[rows]))
        for name, values in scored.scores.columns().items():
            columns[name].append(values[rows])
        n += len(rows)
        if n > MOST_ALERTS:
            raise DatasetError(f"{source}: more than {MOST_ALERTS:,} alerts: give a part of them")
    if not n:
        raise DatasetError(f"{source}: no alert of {survey} was read that {embedder} takes")
    return EmbeddedAlerts(
        np.concatenate(ids),
        np.concatenate(objects),
        survey,
        np.concatenate(embeddings),
        {name: np.concatenate(parts) for name, parts in columns.items()},
    )


def embed_archives(
    inputs: Sequence[Path], models: Sequence[str], embedder: str, survey: SurveyName, schema_registry: str | None
) -> EmbeddedAlerts:
    """Score files, folders and archives with `models` and `embedder`, and return the alerts of a survey.

    `schema_registry`: the URL or the directory of the schemas of alerts in wire format. Raises BundleError for a bundle
    that cannot be opened, and as `embed` does.
    """
    scorer = open_scorer(list(dict.fromkeys([*models, embedder])), Runtime())
    name = open_bundle(embedder).card.name
    source = ", ".join(map(str, inputs))
    return embed(score_archives(inputs, scorer, registry=schema_registry), scorer.outputs, name, survey, source)
