"""Adds to a new bundle the distribution of its outputs and of key metadata over the alerts that it was trained with.

The alerts are scored as the service scores them. A bundle gets no distribution for a survey with too few alerts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from broker_filter.config import Runtime
from broker_filter.packets.batch import Survey
from broker_filter.scoring.bundle import PROBABILITIES, add_distribution
from broker_filter.scoring.distribution import LEAST_RECORDED, QUANTITIES
from broker_filter.scoring.scorer import open_scorer
from broker_filter.streaming.archives import read_packets
from broker_filter.streaming.expressions import FIELDS, compile_filter
from broker_filter.streaming.filtering import score_stream
from broker_filter.streaming.record_distribution import (
    distribution_columns,
    measure_distributions,
    survey_distribution,
    survey_name,
)
from training.data.datasets import View

MOST_ALERTS = 20_000
"""Most alerts of a data set that are scored, evenly spaced: their quantiles are exact to 1 %."""
ALERTS_AT_ONCE = 256
ON_CPU = Runtime(engine="onnxruntime", device="cpu")


def record_archives(
    directory: Path, inputs: Sequence[Path], schemas: str | None = None, where: str | None = None
) -> None:
    """Add the distribution over archives to the bundle in `directory`.

    `inputs`: files, folders and archives. `schemas`: schema registry, or directory of schemas, of alerts in wire
    format. `where`: filter expression that selects the alerts. Raises BundleError if the bundle cannot be opened.
    """
    scorer = open_scorer([str(directory.absolute())], ON_CPU)
    [model] = scorer.models
    selected = compile_filter(where, FIELDS, model.outputs) if where else None
    columns = (*distribution_columns(model.surveys), *(selected.columns if selected else ()))
    decoder = scorer.decoder(schemas, columns=columns)
    batches = score_stream(read_packets(inputs, wanted=decoder.fields), decoder, scorer)
    if found := measure_distributions(batches, model, selected):
        names = ", ".join(path.name for path in inputs)
        cut = f"; cut: {where}" if where else ""
        add_distribution(directory, f"the archives of the training, as served: {names}{cut}", found)


def record_data_set(directory: Path, view: View) -> None:
    """Add the distribution over alerts of a data set to the bundle in `directory`.

    Metadata columns that the data set lacks are left out. Raises BundleError if the bundle cannot be opened.
    """
    [model] = open_scorer([str(directory.absolute())], ON_CPU).models
    chosen = view[np.unique(np.linspace(0, len(view) - 1, min(len(view), MOST_ALERTS)).astype(np.int64))]
    surveys = chosen.dataset.column("survey", chosen.rows)
    known = chosen.dataset.card.columns
    found = {}
    for survey in model.surveys:
        own = chosen[surveys == survey]
        if len(own) < LEAST_RECORDED:
            continue
        part = model.part(survey)
        batches = own.batches(ALERTS_AT_ONCE)
        scores = np.concatenate([part.run(alerts.raw)[PROBABILITIES] for alerts in batches])
        names = [name for name in QUANTITIES[survey_name(survey)] if name in known]
        found[survey_name(survey)] = survey_distribution(
            dict(zip(part.bundle.card.outputs.labels, scores.T, strict=True)),
            dict(zip(names, own.metadata(names).T, strict=True)),
        )
    if found:
        sha256 = view.dataset.card.sha256
        add_distribution(directory, f"{len(chosen):,} training alerts of data set {sha256}", found)


def record_outputs(directory: Path, of: str, survey: Survey, outputs: dict[str, NDArray[np.floating]]) -> None:
    """Add the distribution of probabilities, float[N] by label, to the bundle in `directory`. `of`: the alerts."""
    if min(map(len, outputs.values())) >= LEAST_RECORDED:
        add_distribution(directory, of, {survey_name(survey): survey_distribution(outputs, {})})
