"""Trains the bundle that ships as `embedder`: an alert's images, light curve and metadata as one vector.

    python -m training train-embedder ztf_alerts.tar --labels labels.parquet --out embedder

Self-supervised: of public ZTF alerts, those of the bundle `default`'s test excepted, and of simulated ones, ZTF's and
LSST's. The network of `--trunk` stays as it is, and its probabilities come from the same pass. Labels only measure: the
card says how well weak classes are read from the embedding, of objects that neither saw among them.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import normalize

from broker_filter.config import SurveyName
from broker_filter.importers.write_bundle import write_bundle
from broker_filter.packets.batch import LightCurves
from broker_filter.packets.decode import Decoder
from broker_filter.packets.packet import FilePosition, Packet
from broker_filter.packets.photometry import NO_VALUE
from broker_filter.packets.registry import open_registry
from broker_filter.scoring.alerts import RawAlerts
from broker_filter.scoring.bundle import (
    POINT_COLUMNS,
    WEIGHTS,
    Architecture,
    Bundle,
    Description,
    Inputs,
    LightCurveInput,
    MetadataColumn,
    Outputs,
    Training,
    load_bundle,
)
from broker_filter.scoring.labels import parse_rule, read_labels
from broker_filter.scoring.networks.alert_embedder import MODALITIES, AlertEmbedder
from broker_filter.simulate import SCHEMAS, simulate_night
from broker_filter.streaming.archives import read_packets
from training.arguments import positive, seed
from training.bundles.train_classes import CLASSES, COLUMN, UNLABELLED
from training.bundles.train_default import SPLIT_SEED, TEST_FRACTION
from training.checkpoint import beside
from training.data.datasets import held_out, sha256_of
from training.embedding.embedder import Recipe, embed, show, train
from training.embedding.probes import balanced_accuracy, linear_probe, nearest
from training.errors import DatasetError, TrainingError, refuse_existing
from training.evaluation.bootstrap import INTERVALS, as_card, estimate
from training.evaluation.metrics import Values, Weights, harmonic_mean

VERSION = "1.1"
SURVEYS: tuple[SurveyName, ...] = ("ztf", "lsst")
"""Whose alerts the embedding is learnt from."""
TRUNK = "stampnet"
OF_BOTH = ("magpsf", "sigmapsf", "snr", "isdiffpos", "ndethist")
OF_ZTF = (
    *("fwhm", "elong", "classtar", "sumrat", "nneg", "nbad", "magdiff", "scorr", "age", "nnotdet"),
    *("distnr", "magnr", "chinr", "sharpnr", "distpsnr1", "sgscore1", "srmag1", "distpsnr2", "nmtchps"),
    *("neargaia", "maggaia"),
)
OF_LSST = ("extendedness", "apFlux", "scienceFlux", "templateFlux", "trailLength")
METADATA = OF_BOTH + OF_ZTF + OF_LSST
"""Left out: what the weak labels were made from (ssdistnr, drb, rb, positions), and what tells when or by whom a packet
was taken rather than what it shows."""
LIGHT_CURVE = LightCurveInput(points=32, flux_scale=100, time_scale=1)
"""As many points as three of four ZTF packets have at most. LSST's errors are some 100 nJy, ZTF's some 5,000."""
SIZE = 32
"""Of a modality's vector."""
SIMULATED = 3000
"""Alerts of each survey."""
SIMULATION_SEEDS = {"ztf": 11, "lsst": 12}
SYMMETRIES_OF_SIMULATED = 2
"""Another alert is worth more than another turn of one, and costs as much."""
SHARES = {"real": 0.6, "ztf": 0.15, "lsst": 0.25}
"""Of the batches."""
UNTRAINED = 5
"""Networks with random weights, the mean of whose figures stands for them all."""
FOLDS = 5
"""Few supernovae and active galaxies are in the test split; over all objects they say more."""
FOLD_SEED = 2026
SINGLE = (*MODALITIES, "untrained")
"""What the embedding is compared with."""
PACKETS_AT_ONCE = 256

Classify = Callable[[NDArray[np.float32], NDArray[np.int64], NDArray[np.str_], NDArray[np.float32]], NDArray[np.int64]]
PROBES: dict[str, Classify] = {"linear_probe": linear_probe, "neighbours": nearest}

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Named:
    """N alerts and what they are called."""

    raw: RawAlerts
    alert_id: NDArray[np.int64]  # [N]
    object_id: NDArray[np.str_]  # [N]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("inputs", metavar="INPUT", nargs="+", type=Path, help="ZTF alerts: files, folders, archives")
    parser.add_argument("--labels", required=True, type=Path, help=f"table with the column {COLUMN}, by candid")
    parser.add_argument("--trunk", default="default", help="bundle of StampNet (default: %(default)s)")
    parser.add_argument("--out", required=True, type=Path, help="the new bundle's directory")
    parser.add_argument("--steps", type=positive, default=Recipe.steps)
    parser.add_argument("--seed", type=seed, default=Recipe.seed)


def run(arguments: argparse.Namespace) -> None:
    """Trains, evaluates, writes the bundle. Raises TrainingError, before training, where that cannot be."""
    refuse_existing(arguments.out)
    torch.set_num_threads(1)
    trunk = load_bundle(arguments.trunk)
    if trunk.card.architecture.name != TRUNK:
        raise TrainingError(f"{arguments.trunk}: is no {TRUNK}: its network cannot be the trunk")
    labels = read_labels(arguments.labels, COLUMN, [parse_rule(rule) for rule in CLASSES])
    inputs = Inputs(
        images=trunk.card.inputs.images,
        metadata=tuple(MetadataColumn(name=name, fill=NO_VALUE) for name in METADATA),
        light_curve=LIGHT_CURVE,
    )
    recipe = Recipe(steps=arguments.steps, seed=arguments.seed)
    size = inputs.images.size
    alerts = decode(read_packets(arguments.inputs), size)
    simulated = {survey: decode(simulate(survey, seed), size) for survey, seed in SIMULATION_SEEDS.items()}
    unseen = held_out(alerts.object_id, TEST_FRACTION, SPLIT_SEED)
    log.info("%d real alerts to train on, %d to test with", (~unseen).sum(), unseen.sum())

    torch.manual_seed(recipe.seed)
    network = AlertEmbedder(TRUNK, len(METADATA), SIZE)
    network.trunk.network.load_state_dict(load_file(trunk.directory / WEIGHTS))
    shown = show(network, alerts.raw, inputs)
    groups = {"real": shown[~unseen]}
    groups |= {name: show(network, made.raw, inputs, SYMMETRIES_OF_SIMULATED) for name, made in simulated.items()}
    everything = [(alerts, ~unseen), *((made, np.ones(len(made.raw), bool)) for made in simulated.values())]
    of = {"dataset_sha256": data_sha256(everything), "trunk_sha256": trunk.card.files[WEIGHTS]}
    checkpoint = beside(arguments.out)
    shares = [(group, SHARES[name]) for name, group in groups.items()]
    train(network, shares, recipe, checkpoint=checkpoint, of=str(of))

    label = labels.of(alerts.alert_id, alerts.object_id)
    modalities = embed(network, shown)
    embeddings = {"embedding": [side_by_side(modalities)]}
    embeddings |= {name: [modalities[:, m].numpy()] for m, name in enumerate(MODALITIES)}
    embeddings["untrained"] = [untrained(seed, alerts.raw, inputs, unseen) for seed in range(UNTRAINED)]
    evaluation = evaluate(embeddings, label, alerts.object_id, unseen)
    print(table(evaluation))
    evaluation |= {"dataset_sha256": of["dataset_sha256"]}
    description = describe(trunk, inputs, recipe, alerts.object_id[~unseen], evaluation)
    write_bundle(arguments.out, description, network)
    checkpoint.unlink(missing_ok=True)


def decode(packets: Iterator[Packet], size: int) -> Named:
    """Every alert of the packets, each alert id once; what does not decode is left out. Raises DatasetError where there
    is none."""
    decoder = Decoder(open_registry(str(SCHEMAS)), cutout_size=size, columns=METADATA)
    batches = []
    while some := list(islice(packets, PACKETS_AT_ONCE)):
        batches.append(decoder.decode(some)[0])
    if not sum(map(len, batches)):
        raise DatasetError("no alert was read from the inputs: give files or archives of alerts")
    alert_id, first = np.unique(np.concatenate([batch.alert_id for batch in batches]), return_index=True)
    raw = RawAlerts(
        np.concatenate([batch.cutouts for batch in batches])[first],
        np.concatenate([batch.cutout_box for batch in batches])[first],
        np.concatenate([batch.metadata for batch in batches])[first],
        METADATA,
        np.concatenate([batch.mjd for batch in batches])[first],
        LightCurves.join([batch.light_curves for batch in batches])[first],
    )
    return Named(raw, alert_id, np.array([name for batch in batches for name in batch.object_id], np.str_)[first])


def simulate(survey: str, seed: int) -> Iterator[Packet]:
    """A simulated night's packets."""
    for alert in simulate_night(SIMULATED, seed, "lsst" if survey == "lsst" else "ztf"):
        yield Packet(alert.packet, FilePosition(f"simulated {survey} {alert.alert_id}"))


def untrained(seed: int, alerts: RawAlerts, inputs: Inputs, unseen: NDArray[np.bool_]) -> NDArray[np.float32]:
    """The embedding [N, D] by a network with random weights, the trunk's among them. It scales as the trained one does:
    its constants are of the same alerts."""
    torch.manual_seed(seed)
    network = AlertEmbedder(TRUNK, len(METADATA), SIZE).eval()
    shown = show(network, alerts, inputs, symmetries=1)
    network.features.fit(shown.features[~unseen].flatten(0, 1))
    network.metadata.fit(shown.metadata[~unseen])
    return side_by_side(embed(network, shown))


def side_by_side(modalities: Tensor) -> NDArray[np.float32]:
    """The embedding [N, M * D] of modalities [N, M, D], as the network joins them."""
    embedding: NDArray[np.float32] = normalize(modalities.flatten(1), dim=1).numpy()
    return embedding


def evaluate(
    embeddings: dict[str, list[NDArray[np.float32]]],
    label: NDArray[np.int64],
    object_id: NDArray[np.str_],
    unseen: NDArray[np.bool_],
) -> dict[str, float | int | str]:
    """The card's figures: balanced accuracies, and how far the embedding is ahead.

    First of unseen objects, classified by those that were trained on; then of all, in folds by object.
    """
    known = label != UNLABELLED
    embeddings = {name: [each[known] for each in several] for name, several in embeddings.items()}
    label, object_id, unseen = label[known], object_id[known], unseen[known]
    card: dict[str, float | int | str] = {
        "truth": f"{COLUMN}: weak labels, which training never saw",
        "figures": "balanced accuracy over the classes; all_: of all objects, each classified by other folds'",
        "split": f"{TEST_FRACTION:.0%} of the objects, seed {SPLIT_SEED}: none of their alerts were trained on",
        "intervals": INTERVALS,
        "alerts": int(unseen.sum()),
        "objects": len(np.unique(object_id[unseen])),
        "all_alerts": len(label),
        "all_objects": len(np.unique(object_id)),
    }
    folds = [fold_of(object_id) == fold for fold in range(FOLDS)]
    for prefix, sides in (("", [unseen]), ("all_", folds)):
        judged = np.logical_or.reduce(sides)
        for probe, classify in PROBES.items():
            right = {
                name: [classified(classify, each, label, object_id, sides)[judged] == label[judged] for each in several]
                for name, several in embeddings.items()
            }
            found = estimate(
                partial(figures, f"{prefix}{probe}", right, label[judged]),
                object_id[judged],
                partial(trials, f"{prefix}{probe}", right, label[judged]),
            )
            card |= as_card(found)
    return card


def figures(
    prefix: str, right: dict[str, list[NDArray[np.bool_]]], label: NDArray[np.int64], weight: Weights
) -> dict[str, Values]:
    """Balanced accuracies, of several networks their mean; the differences are of the same weights."""
    accuracy = {
        name: np.mean([balanced_accuracy(each, label, weight) for each in several], axis=0)
        for name, several in right.items()
    }
    whole = accuracy.pop("embedding")
    ahead = {f"{prefix}_ahead_of_{name}": whole - figure for name, figure in accuracy.items()}
    return {prefix: whole, **{f"{prefix}_{name}": figure for name, figure in accuracy.items()}, **ahead}


def trials(
    prefix: str, right: dict[str, list[NDArray[np.bool_]]], label: NDArray[np.int64], weight: Weights
) -> dict[str, Values]:
    """How many objects each of the `figures` that are shares is of; differences are none."""
    objects = harmonic_mean([weight @ (label == c) for c in np.unique(label).tolist()])
    return {prefix: objects} | {f"{prefix}_{name}": objects for name in right}


def classified(
    classify: Classify,
    embedding: NDArray[np.float32],
    label: NDArray[np.int64],
    object_id: NDArray[np.str_],
    sides: Sequence[NDArray[np.bool_]],
) -> NDArray[np.int64]:
    """The class of each alert on one of the `sides`, told by all that are not on its own, [N]; UNLABELLED elsewhere."""
    classes = np.full(len(label), UNLABELLED)
    for side in sides:
        classes[side] = classify(embedding[~side], label[~side], object_id[~side], embedding[side])
    return classes


def fold_of(object_id: NDArray[np.str_]) -> NDArray[np.int64]:
    """The fold of each alert [N], all of an object in one."""
    objects, index = np.unique(object_id, return_inverse=True)
    folds: NDArray[np.int64] = (np.random.default_rng(FOLD_SEED).permutation(len(objects)) % FOLDS)[index]
    return folds


def table(evaluation: Mapping[str, float | int | str]) -> str:
    """The figures of a card as Markdown: a row for what was judged, a column for each probe and set of objects."""
    columns = [f"{prefix}{probe}" for prefix in ("", "all_") for probe in PROBES]
    titles = [f"{probe.replace('_', ' ')}, {who}" for who in ("unseen objects", "all objects") for probe in PROBES]
    rows = {"embedding": "", **{name: f"_{name}" for name in SINGLE}}
    rows |= {f"ahead of {name}": f"_ahead_of_{name}" for name in SINGLE}
    lines = [" | ".join(["", *titles]), "|".join(["---"] * (1 + len(columns)))]
    for row, suffix in rows.items():
        figures = [
            f"{evaluation[f'{column}{suffix}']:.3f} ({evaluation[f'{column}{suffix}_95']})" for column in columns
        ]
        lines.append(" | ".join([row.replace("_", " "), *figures]))
    return "\n".join(f"| {line} |" for line in lines)


def data_sha256(data: Sequence[tuple[Named, NDArray[np.bool_]]]) -> str:
    """Of all that was trained on: ids, pixels, metadata, light curves of the chosen alerts."""
    arrays: list[NDArray[Any]] = []
    for alerts, rows in data:
        raw = alerts.raw[rows]
        assert raw.mjd is not None
        assert raw.light_curves is not None
        arrays += [alerts.alert_id[rows], raw.cutouts, raw.cutout_box, raw.metadata, raw.mjd]
        arrays += [getattr(raw.light_curves, name) for name in ("offsets", *POINT_COLUMNS)]
    return sha256_of(*arrays)


def describe(
    trunk: Bundle,
    inputs: Inputs,
    recipe: Recipe,
    trained_on: NDArray[np.str_],
    evaluation: dict[str, float | int | str],
) -> Description:
    """What the card says of the bundle, besides its files. `trained_on`: the real alerts' objects."""
    card = trunk.card
    return Description(
        name="embedder",
        version=VERSION,
        task="embedding of an alert's images, light curve and metadata, and real/bogus classification",
        surveys=SURVEYS,
        inputs=inputs,
        outputs=Outputs(
            labels=card.outputs.labels,
            activation=card.outputs.activation,
            surveys={label: surveys for label in card.outputs.labels if (surveys := card.surveys_of(label)) != SURVEYS},
            thresholds=card.outputs.thresholds,
            embedding=len(MODALITIES) * SIZE,
            modalities=MODALITIES,
        ),
        architecture=Architecture(
            name="alert_embedder", arguments={"trunk": TRUNK, "metadata": len(METADATA), "size": SIZE}
        ),
        licence="BSD-3-Clause",
        source="training/embedding/train_embedder.py of broker-filter",
        citation=f"after Rizhko & Bloom 2025 (arXiv:2411.08842); of the trunk: {card.citation}",
        training=Training(
            method=f"The trunk, and {', '.join(card.outputs.labels)}, are the bundle {card.name} {card.version} "
            f"unchanged, which was trained for {' and '.join(card.surveys)} alone: it is null for other surveys. All "
            f"else: contrastive, a view of {recipe.batch} alerts of one survey a step (symmetries, lost columns, "
            f"forgotten points), {recipe.steps} steps, AdamW, peak learning rate {recipe.learning_rate:g}, seed "
            f"{recipe.seed}. Chosen by cross-validation on training objects.",
            data=f"{len(trained_on)} public ZTF alerts of {len(np.unique(trained_on))} objects and {SIMULATED} "
            "simulated alerts of each survey; no labels. Real LSST alerts were none among them.",
            evaluation=evaluation,
        ),
    )
