"""`sae export`: a run into a lens, the directory that the service and `broker-filter explain` open.

    python -m training sae export RUN --name mine --out lenses/mine

The directory is written atomically, and never replaces an existing one.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from safetensors.numpy import save_file
from safetensors.torch import load_file

from broker_filter.config import SurveyName
from broker_filter.packets.batch import Survey
from broker_filter.scoring.bundle import WEIGHTS, Part
from broker_filter.scoring.explanation import unexplained_share
from broker_filter.scoring.lens import Lens
from broker_filter.scoring.lens_files import (
    FEATURES,
    FILES,
    LENS_CARD,
    STATISTICS,
    LensBundle,
    LensCard,
    OrdinaryAlerts,
    open_files,
    sorted_activations,
)
from broker_filter.scoring.networks import load_network
from broker_filter.scoring.sparse_dictionary import DictionarySource, SparseDictionary, write_dictionary
from broker_filter.simulate import REAL
from training.errors import LensError, refuse_existing
from training.interpretability.lens_graphs import write_graphs
from training.interpretability.runs.collect import SIMULATED
from training.interpretability.runs.rows import FEATURES as FEATURE_TABLE
from training.interpretability.runs.rows import MEASURES, Run, open_run
from training.interpretability.sites.open_site import open_site
from training.interpretability.study.study_run import simulated_images

FEWEST_REAL = 300
"""Fewest real alerts of a survey as ordinary ones; with fewer, simulated alerts take their place."""
COLUMNS = ("id", "name", "note", "stable", "family", "enriched_class")
"""Columns of the table of features in a lens; the first four are read when an alert is explained."""


@dataclass(frozen=True, slots=True)
class OrdinaryRows:
    """The activations of N ordinary alerts of one survey at a site."""

    z: NDArray[np.float32]  # [T, d] rows: the queries of all alerts
    alert: NDArray[np.int64]  # [T] index of a row's alert, ascending
    source: str

    def statistics(self, survey: SurveyName, dictionary: SparseDictionary) -> tuple[dict[str, NDArray[Any]], int]:
        """Return the arrays of OrdinaryFeatures by their names in the file, and N."""
        _, first = np.unique(self.alert, return_index=True)
        active, mean = dictionary.encode(self.z), self.z.mean(axis=0, dtype=np.float64).astype(np.float32)
        rebuilt = dictionary.decode(active)
        activations, offsets = sorted_activations(np.maximum.reduceat(active, first))
        bounds = [*first.tolist(), len(self.z)]
        unexplained = [unexplained_share(self.z[a:b], rebuilt[a:b], mean) for a, b in pairwise(bounds)]
        arrays = {
            f"{survey}.activations": activations,
            f"{survey}.offsets": offsets,
            f"{survey}.unexplained": np.sort(np.array(unexplained, np.float32)),
            f"{survey}.mean": mean,
        }
        return arrays, len(first)


def write_lens(
    directory: Path,
    part: Part,
    site: str,
    dictionary: SparseDictionary,
    ordinary: Mapping[SurveyName, OrdinaryRows],
    features: Sequence[Mapping[str, str]],
    *,
    name: str,
    version: str,
    split: str,
    worth: str,
    measures: Mapping[str, float | int | str],
) -> None:
    """Write a lens on a site of the network of `part` into the new `directory`.

    `features`: rows with the keys COLUMNS. `split`: the alerts that the dictionary was trained on. `worth`: how far the
    lens can be trusted, in a sentence. Raises LensError if the directory exists, if the network has no such site, or if
    the graphs do not reproduce the network.
    """
    refuse_existing(directory)
    network = load_network(part.card.architecture, load_file(part.directory / WEIGHTS))
    opened = open_site(network, site)
    source = DictionarySource(
        bundle=part.card.name,
        version=part.card.version,
        weights_sha256=part.card.files[WEIGHTS],
        site=site,
        heads=opened.heads,
        d_head=opened.d_head,
        split=split,
    )
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}.") as scratch:
        lens = Path(scratch) / directory.name
        write_dictionary(lens, dictionary, source)
        (lens / FEATURES).write_text(_table(features), encoding="utf-8")
        statistics: dict[str, NDArray[Any]] = {}
        counts: dict[SurveyName, OrdinaryAlerts] = {}
        for survey, rows in ordinary.items():
            arrays, alerts = rows.statistics(survey, dictionary)
            statistics |= arrays
            counts[survey] = OrdinaryAlerts(alerts=alerts, source=rows.source)
        save_file(statistics, lens / STATISTICS)
        modality, effect_on, cells = write_graphs(lens, part, network, opened, dictionary)
        card = LensCard(
            name=name,
            version=version,
            bundle=LensBundle(name=part.card.name, version=part.card.version, weights_sha256=part.card.files[WEIGHTS]),
            site=site,
            modality=modality,
            effect_on=effect_on,
            heads=opened.heads,
            d_head=opened.d_head,
            cells=cells,
            ordinary=counts,
            worth=worth,
            measures=dict(measures),
            files={file: hashlib.sha256((lens / file).read_bytes()).hexdigest() for file in FILES},
        )
        text = yaml.safe_dump(card.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)
        (lens / LENS_CARD).write_text(text, encoding="utf-8")
        Lens(open_files(lens), part)  # raises LensError if onnxruntime does not reproduce the test vector
        lens.rename(directory)


def _table(features: Sequence[Mapping[str, str]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(features)
    return text.getvalue()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `sae export`."""
    parser.add_argument("run", type=Path, metavar="RUN", help="run with dictionaries, and best with a finished study")
    parser.add_argument("--out", type=Path, required=True, metavar="LENS", help="directory of the lens")
    parser.add_argument("--name", required=True, help="name of the lens: letters, digits and _")
    parser.add_argument("--version", default="1.0", help="version of the lens (default: %(default)s)")
    parser.add_argument(
        "--worth", metavar="TEXT", help="a sentence about what the lens is worth; the warnings of the study follow it"
    )


def run(arguments: argparse.Namespace) -> None:
    """Write the lens of a run, and print what it is worth. Raises LensError if the run is incomplete."""
    refuse_existing(arguments.out)
    opened = open_run(arguments.run)
    dictionary = opened.dictionaries[0]
    measures = read_measures(opened.directory / MEASURES)
    worth = worth_of(measures, arguments.worth)
    write_lens(
        arguments.out,
        opened.part,
        opened.card.site,
        dictionary,
        ordinary_rows(opened),
        read_features(opened.directory / FEATURE_TABLE),
        name=arguments.name,
        version=arguments.version,
        split=opened.card.split,
        worth=worth,
        measures=figures(measures),
    )
    print(f"{arguments.out}: a lens on {opened.card.site} of {opened.card.name} {opened.card.version}. {worth}")


def ordinary_rows(opened: Run) -> dict[SurveyName, OrdinaryRows]:
    """Return the activations of the ordinary alerts of each survey of the run.

    These are its real alerts, or, for a survey with fewer than FEWEST_REAL of them, the simulated alerts of real
    sources. Alerts without a light curve are left out where the network has light curves. Raises LensError if no survey
    has ordinary alerts.
    """
    rows, alerts = opened.rows, opened.alerts
    everything = np.arange(len(alerts.alert_id))
    survey: NDArray[np.uint8] = alerts.column("survey", everything)
    usable = np.ones(len(everything), np.bool_)
    if opened.part.card.inputs.light_curve is not None:
        curves = alerts.light_curves(everything)
        mjd = alerts.column("mjd", everything)
        owner = np.repeat(everything, np.diff(curves.offsets))
        usable = np.bincount(owner[curves.mjd <= mjd[owner]], minlength=len(everything)) > 0
    sources = [f"{SIMULATED}{kind}" for kind in REAL]
    on_sky = rows.is_real & ~simulated_images(alerts, survey)
    of_source = np.isin(np.array(alerts.card.classes)[alerts.label], sources)
    found: dict[SurveyName, OrdinaryRows] = {}
    for name in opened.part.surveys:
        own = usable & (survey == Survey[name.upper()])
        real, simulated = own & on_sky, own & ~rows.is_real & of_source
        chosen, source = (real, "real") if real.sum() >= FEWEST_REAL else (simulated, "simulated")
        if chosen.any():
            kept = chosen[rows.alert]
            found[name] = OrdinaryRows(rows.z[kept], rows.alert[kept], source)
    if not found:
        raise LensError(f"{opened.directory}: has no ordinary alerts; collect a run with real or simulated alerts")
    return found


def read_features(file: Path) -> list[dict[str, str]]:
    """Return the rows of a study's table of features with the keys COLUMNS; none if there was no study.

    Raises LensError if the table is not one of features.
    """
    if not file.exists():
        return []
    try:
        with file.open(encoding="utf-8", newline="") as text:
            rows = list(csv.DictReader(text))
        return [
            row
            | {
                "stable": "true" if 2 * int(row["stable_in"]) > int(row["seeds"]) else "false",
                "enriched_class": row["enriched"],
            }
            for row in rows
        ]
    except (KeyError, ValueError, TypeError, csv.Error) as error:
        raise LensError(f"{file}: not a table of features ({error}); study the run again") from error


def read_measures(file: Path) -> dict[str, Any]:
    """Return the measures of a study; empty if there was none. Raises LensError if they cannot be read."""
    if not file.exists():
        return {}
    try:
        measures: dict[str, Any] = json.loads(file.read_bytes())
    except ValueError as error:
        raise LensError(f"{file}: not JSON ({error}); study the run again") from error
    return measures


def worth_of(measures: Mapping[str, Any], said: str | None) -> str:
    """Return how far a lens can be trusted: `said`, and what the study measured. It says so if there was no study."""
    measured = measures["worth"]["says"] if measures else "The features of this lens were not studied."
    return f"{said} {measured}" if said else str(measured)


def figures(measures: Mapping[str, Any]) -> dict[str, float | int | str]:
    """Return the figures of a study that the card states; none if there was no study."""
    return dict(measures["worth"]["figures"]) if measures else {}
