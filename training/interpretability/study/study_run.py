"""`sae study`: measure what the features of a run are worth, and write its features.csv and measures.json.

    python -m training sae study RUN

Everything is measured on real alerts of held-out objects, beside principal components, single dimensions of z, random
directions and an untrained network.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from broker_filter.packets.batch import Survey
from broker_filter.scoring.alerts import RawAlerts
from training.arguments import positive
from training.bundles.rubin_data import HSC_VISIT, LSSTCAM_VISIT, SIMULATED_DAY
from training.data.datasets import Dataset
from training.errors import LensError
from training.interpretability.runs.rows import TEST, Run, open_run
from training.interpretability.study.study import Subject, study
from training.interpretability.train_autoencoder import train

VISIT = "visit"
"""Metadata column by which LSST alerts with simulated images, which circulate among real ones, are recognised."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `sae study`."""
    parser.add_argument("run", type=Path, metavar="RUN", help="directory with dictionaries, as `sae train` leaves it")
    parser.add_argument("--threads", type=positive, default=1, help="CPU threads (default: %(default)s)")


def run(arguments: argparse.Namespace) -> None:
    """Study a run, and print its tables. Raises LensError if it has no dictionaries."""
    torch.set_num_threads(arguments.threads)
    opened = open_run(arguments.run)
    print(as_text(study(subject_of(opened), opened.directory)))


def subject_of(run: Run) -> Subject:
    """Return what a study needs of a run. Raises LensError if the run has no dictionaries."""
    recipe, dictionaries, alerts = run.card.recipe, run.dictionaries, run.alerts
    if recipe is None:
        raise LensError(f"{run.directory}: has no dictionary yet: run `python -m training sae train` on it")
    everything = np.arange(len(alerts.alert_id))
    survey: NDArray[np.uint8] = alerts.column("survey", everything)
    classes = np.array(alerts.card.classes)

    def read(rows: NDArray[np.int64]) -> RawAlerts:
        return alerts.read(rows).raw

    return Subject(
        site=run.site,
        card=run.part.card,
        network=run.network,
        dictionaries=dictionaries,
        z=run.rows.z,
        alert=run.rows.alert,
        real=run.rows.is_real & ~simulated_images(alerts, survey),
        held=run.rows.split == TEST,
        survey=survey,
        label=classes[alerts.label],
        object_id=alerts.object_id,
        read=read,
        retrain=lambda rows: train(rows, recipe, run.card.seeds[0]),
    )


def simulated_images(alerts: Dataset, survey: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Return which LSST alerts of a data set have simulated images by their visit, bool[N]; none without that column.

    `survey` uint8[N]: the survey of each alert.
    """
    if VISIT not in alerts.card.columns:
        return np.zeros(len(survey), bool)
    visit = alerts.column("metadata", np.arange(len(survey)))[:, alerts.card.columns.index(VISIT)]
    return of_simulated_images(survey, visit)


def of_simulated_images(survey: NDArray[np.uint8] | Survey, visit: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return whether the visit of an LSST alert is neither LSSTCam's nor HSC's, bool[N]; False for other surveys."""
    on_sky = ((visit > LSSTCAM_VISIT) & (visit < SIMULATED_DAY)) | (visit < HSC_VISIT)
    return np.equal(survey, Survey.LSST) & ~on_sky


def as_text(measures: dict[str, Any]) -> str:
    """Return the tables of a study as Markdown, and its warnings."""
    lines = []
    for table in measures["tables"]:
        lines += [table["caption"], "", _row(table["head"]), _row(["---"] * len(table["head"]))]
        lines += [*map(_row, table["rows"]), ""]
    return "\n".join([*lines, *(f"- {warning}" for warning in measures["warnings"])])


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
