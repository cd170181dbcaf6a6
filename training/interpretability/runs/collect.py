"""`sae collect`: the activations of one attention layer for real and simulated alerts, as a run (see `rows`).

    python -m training sae collect embedder light_curve.0 ztf_alerts.tar --labels labels.parquet --out RUN

Half of the objects of each class of the real alerts are held out; dictionaries are trained on the other half and on all
simulated alerts. Labels play no part in the training.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from broker_filter.cli.options import add_registry_option
from broker_filter.console import progress
from broker_filter.packets.alert_rows import in_batches
from broker_filter.packets.batch import PLANES, AlertBatch, Plane, Survey
from broker_filter.packets.decode import Decoder
from broker_filter.packets.packet import FilePosition, Packet
from broker_filter.packets.schemas.registry import open_registry
from broker_filter.packets.surveys import DEFAULT_COLUMNS
from broker_filter.scoring.bundle import WEIGHTS, Inputs, Part, open_bundle
from broker_filter.scoring.labels import UNLABELLED, Labels, read_labels
from broker_filter.scoring.networks import load_network
from broker_filter.scoring.preprocess import prepare
from broker_filter.simulate import SCHEMAS, SimulatedAlert, simulate_night
from broker_filter.streaming.archives import read_packets
from training.arguments import positive
from training.bundles.train_classes import COLUMN
from training.data.build_dataset import source_names, write_dataset
from training.data.datasets import Dataset, sources_by_class
from training.data.simulated import KINDS
from training.errors import DatasetError, LensError
from training.interpretability.runs.quantities import COLUMNS
from training.interpretability.runs.rows import (
    ALERTS,
    RUN_CARD,
    TEST,
    TRAIN,
    CollectedRows,
    RunCard,
    write_card,
    write_rows,
)
from training.interpretability.sites.open_site import Site, open_site

SIMULATED = "simulated_"
"""Prefix of the classes of simulated alerts; the kind of the alert follows."""
WITHOUT_LABEL = "unlabelled"
HELD_OUT = 0.5
"""Fraction of the real objects of each class that are held out: rare classes need held-out alerts."""
SPLIT_SEED = 2026
SIMULATION_SEEDS: dict[Literal["ztf", "lsst"], int] = {"ztf": 31, "lsst": 32}
"""Seeds of the simulated nights. No bundle was trained on these nights."""
MOST_ROWS = 64
"""Default of the largest number of rows of one alert. Light curves have at most 33 tokens; the rows of an image's cells
are much alike."""
PACKETS_AT_ONCE = 256
ALERTS_AT_ONCE = 128

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `sae collect`."""
    parser.add_argument("bundle", metavar="BUNDLE", help="name of a shipped bundle, or directory of a bundle")
    parser.add_argument("site", metavar="SITE", help="attention layer, for example light_curve.0")
    parser.add_argument(
        "inputs", nargs="*", type=Path, metavar="INPUT", help="real alerts: files, folders, archives; or give --alerts"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="RUN", help="directory of the run")
    parser.add_argument(
        "--labels",
        action="append",
        default=[],
        type=Path,
        metavar="TABLE",
        help=f"table with alert ids and the column {COLUMN}; repeat for each survey. Labels are for reports only",
    )
    parser.add_argument(
        "--alerts",
        type=Path,
        metavar="DIR",
        help="data set of another run, for example OTHER/alerts, instead of INPUT: many sites of the same alerts",
    )
    parser.add_argument(
        "--simulated",
        type=int,
        default=3000,
        metavar="N",
        help="simulated alerts of each survey that the network scores (default: %(default)s)",
    )
    parser.add_argument(
        "--survey",
        choices=("ztf", "lsst"),
        default="ztf",
        help="a survey of the network, in a bundle of several networks (default: %(default)s)",
    )
    parser.add_argument(
        "--most-rows",
        type=positive,
        default=MOST_ROWS,
        metavar="N",
        help="draw at most this many rows of an alert (default: %(default)s)",
    )
    parser.add_argument("--threads", type=positive, default=1, help="CPU threads (default: %(default)s)")
    add_registry_option(parser)


def run(arguments: argparse.Namespace) -> None:
    """Write the run, and print its counts.

    Raises LensError if the directory holds a run already, or if the network has no such site, before any alert is read.
    """
    out: Path = arguments.out
    if (out / RUN_CARD).exists():
        raise LensError(f"{out}: holds a run already; choose another directory, or remove it")
    torch.set_num_threads(arguments.threads)
    part = open_bundle(arguments.bundle).part(arguments.survey)
    site = open_network_site(part, arguments.site)
    out.mkdir(parents=True, exist_ok=True)
    directory = arguments.alerts or out / ALERTS
    if arguments.alerts is not None or directory.exists():
        dataset = Dataset.open(directory)
        log.info("%s alerts are read from %s, and not from INPUT", f"{len(dataset.alert_id):,}", directory)
    else:
        labels = [read_labels(table, COLUMN) for table in arguments.labels]
        dataset = build_alerts(
            directory, part, arguments.inputs, labels, arguments.simulated, arguments.schema_registry
        )
    check_fits(dataset, part.card.inputs)
    rows = collect(dataset, part, site, arguments.most_rows)
    write_rows(out, rows)
    counts = describe_split(dataset, rows)
    write_card(
        out,
        RunCard(
            bundle=arguments.bundle,
            name=part.card.name,
            version=part.card.version,
            weights_sha256=part.card.files[WEIGHTS],
            survey=arguments.survey,
            site=site.name,
            heads=site.heads,
            d_head=site.d_head,
            alerts=ALERTS if arguments.alerts is None else str(directory.resolve()),
            dataset_sha256=dataset.card.sha256,
            rows_sha256=rows.sha256,
            most_rows=arguments.most_rows,
            split=counts,
        ),
    )
    print(f"{out}: {len(rows.z):,} rows of {rows.z.shape[1]} dimensions at {site.name} of {part.card.name}; {counts}")


def open_network_site(part: Part, name: str) -> Site:
    """Return a site of a bundle's network. Raises LensError if the network has no such site."""
    return open_site(load_network(part.card.architecture, load_file(part.directory / WEIGHTS)), name)


def build_alerts(
    directory: Path, part: Part, inputs: Sequence[Path], labels: Sequence[Labels], simulated: int, schemas: str | None
) -> Dataset:
    """Write the data set of the real alerts in `inputs` and of `simulated` alerts of each survey of the network.

    Its metadata columns are those of the network, of the properties in `quantities`, and the usual ones. Raises
    DatasetError if there is no real alert.
    """
    wanted = part.card.inputs
    columns = tuple(dict.fromkeys((*DEFAULT_COLUMNS, *(column.name for column in wanted.metadata), *COLUMNS)))
    known = tuple(sorted({name for table in labels for name in table.classes} - {WITHOUT_LABEL}))
    classes = (*known, WITHOUT_LABEL, *(f"{SIMULATED}{kind}" for kind in KINDS))
    scored = [Survey[name.upper()] for name in part.surveys]

    def decoder(registry: str | Path | None) -> Decoder:
        planes: list[Plane] = [plane for plane in PLANES if plane in wanted.planes]
        located = None if registry is None else str(registry)
        return Decoder(open_registry(located), cutout_size=wanted.images.size, columns=columns, planes=planes)

    def batches() -> Iterator[tuple[AlertBatch, NDArray[np.int64]]]:
        read = 0
        for alerts in _decoded(decoder(schemas), read_packets(inputs) if inputs else ()):
            label = np.where(np.isin(alerts.survey, scored), _labels(alerts, labels, classes), UNLABELLED)
            read += int((label != UNLABELLED).sum())
            yield alerts, label
        if not read:
            given = ", ".join(map(str, inputs)) or "no INPUT"
            raise DatasetError(f"{given}: no alert of {' or '.join(part.surveys)} could be decoded: give real alerts")
        for survey in part.surveys:
            night = simulate_night(simulated, SIMULATION_SEEDS[survey], survey)
            kind_of: dict[int, str] = {}
            for alerts in _decoded(decoder(SCHEMAS), _packets(night, kind_of)):
                names = [f"{SIMULATED}{kind_of[alert]}" for alert in alerts.alert_id.tolist()]
                yield alerts, np.array([classes.index(name) for name in names], np.int64)

    def split(object_id: NDArray[np.str_], label: NDArray[np.int64]) -> NDArray[np.int64]:
        return split_by_object(object_id, label, simulated_classes(classes))

    sources = ", ".join(f"{COLUMN} of {table.table.name}" for table in labels) or "none"
    return write_dataset(directory, batches(), split, classes, f"{sources}; simulated alerts: their kind")


def simulated_classes(classes: Sequence[str]) -> NDArray[np.bool_]:
    """Return which classes are those of simulated alerts, bool[C]."""
    return np.array([name.startswith(SIMULATED) for name in classes])


def split_by_object(
    object_id: NDArray[np.str_], label: NDArray[np.int64], simulated: NDArray[np.bool_]
) -> NDArray[np.int64]:
    """Return the split of each of N alerts, int64[N]: TRAIN or TEST, an index into SPLITS.

    All simulated alerts are for training. Of the real objects of each class, HELD_OUT are for the test; `simulated`
    bool[C] says which classes are simulated. All alerts of an object are in one split.
    """
    held: list[str] = []
    for number, objects in enumerate(sources_by_class(object_id, label, len(simulated), SPLIT_SEED)):
        if not simulated[number]:
            held += objects[: round(HELD_OUT * len(objects))].tolist()
    return np.where(np.isin(object_id, held), TEST, TRAIN)


def check_fits(dataset: Dataset, inputs: Inputs) -> None:
    """Raise DatasetError if the data set lacks something that the network needs."""
    dataset.check_pixels(inputs.images)
    missing = [column.name for column in inputs.metadata if column.name not in dataset.card.columns]
    lacking = [*missing, *dataset.missing_planes(inputs)]
    if inputs.light_curve is not None and not dataset.has_light_curves:
        lacking.append("light curves")
    if dataset.card.cutout_size < inputs.images.size:
        lacking.append(f"cutouts of {inputs.images.size} px")
    if lacking:
        raise DatasetError(
            f"{dataset.directory}: lacks what the network needs ({', '.join(lacking)}): collect the alerts for it"
        )


def collect(dataset: Dataset, part: Part, site: Site, most_rows: int) -> CollectedRows:
    """Return the activations of all alerts of the data set at the site; padding is never a row.

    Of an alert with more than `most_rows` query tokens, that many are drawn at random.
    """
    draws = np.random.default_rng(SPLIT_SEED)
    z: list[NDArray[np.float32]] = []
    alert: list[NDArray[np.int64]] = []
    query: list[NDArray[np.int64]] = []
    count = len(dataset.alert_id)
    with torch.inference_mode(), progress("Attending", count, "alerts") as advance:
        for start in range(0, count, ALERTS_AT_ONCE):
            here = np.arange(start, min(start + ALERTS_AT_ONCE, count))
            prepared = prepare(dataset.read(here).raw, part.card.inputs)
            attention = site.attend({name: torch.from_numpy(array) for name, array in prepared.items()})
            exists = attention.queries.numpy()
            order = np.where(exists, draws.random(exists.shape), np.inf).argsort(axis=1).argsort(axis=1)
            row, token = np.nonzero(exists & (order < most_rows))
            z.append(attention.z.numpy()[row, token])
            alert.append(here[row])
            query.append(token)
            advance(len(here))
    is_real = ~simulated_classes(dataset.card.classes)[dataset.label]
    return CollectedRows(np.concatenate(z), np.concatenate(alert), np.concatenate(query), is_real, dataset.split)


def describe_split(dataset: Dataset, rows: CollectedRows) -> str:
    """Return the rule of the split and the alerts in it, in one sentence."""
    train = rows.split == TRAIN
    real, held = (len(np.unique(dataset.object_id[rows.is_real & side])) for side in (train, ~train))
    return (
        f"trained on {(rows.is_real & train).sum()} real alerts of {real} objects and {(~rows.is_real).sum()} "
        f"simulated alerts; held out: {(~train).sum()} real alerts of {held} other objects ({HELD_OUT:.0%} of the "
        f"objects of each class, seed {SPLIT_SEED})"
    )


def _decoded(decoder: Decoder, packets: Iterable[Packet]) -> Iterator[AlertBatch]:
    return (alerts for alerts, _ in decoder.decode_batches(in_batches(packets, PACKETS_AT_ONCE)))


def _packets(night: Iterator[SimulatedAlert], kind_of: dict[int, str]) -> Iterator[Packet]:
    """Yield the packets of a simulated night, and note the kind of each alert in `kind_of`."""
    for alert in night:
        kind_of[alert.alert_id] = alert.kind
        yield Packet(alert.packet, FilePosition(f"simulated {alert.survey} {alert.alert_id}"))


def _labels(alerts: AlertBatch, labels: Sequence[Labels], classes: Sequence[str]) -> NDArray[np.int64]:
    """Return the class of each of N real alerts, int64[N]: that of the first table that has its id."""
    label = np.full(len(alerts), classes.index(WITHOUT_LABEL))
    for table in reversed(labels):
        found = table.of(alerts.alert_id, source_names(alerts))
        place = np.array([classes.index(name) for name in table.classes])
        label = np.where(found == UNLABELLED, label, place[found])
    return label
