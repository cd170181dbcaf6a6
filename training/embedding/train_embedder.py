"""Trains the shipped bundle `embedder`: an alert's images, light curve and metadata as one vector.

    python -m training train-embedder ztf_alerts.tar --labels labels.parquet --out embedder

The training is self-supervised. Its data are public ZTF alerts, except those of the test split of the bundle `default`,
and simulated alerts of ZTF and LSST. The network of `--trunk` stays unchanged, and its probabilities are computed in
the same pass. Labels are used for evaluation only: the card states how well weak classes can be read from the embedding
on held-out objects.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
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
from broker_filter.packets.alert_rows import in_batches
from broker_filter.packets.batch import LightCurves
from broker_filter.packets.decode import Decoder
from broker_filter.packets.packet import Packet
from broker_filter.packets.photometry import NO_VALUE
from broker_filter.packets.schemas.registry import open_registry
from broker_filter.scoring.alerts import RawAlerts
from broker_filter.scoring.bundle import (
    POINT_COLUMNS,
    WEIGHTS,
    Architecture,
    Description,
    Inputs,
    LightCurveInput,
    MetadataColumn,
    Outputs,
    Part,
    Training,
    open_bundle,
)
from broker_filter.scoring.labels import UNLABELLED, parse_rule, read_labels
from broker_filter.scoring.networks.alert_embedder import MODALITIES, AlertEmbedder
from broker_filter.simulate import SCHEMAS
from broker_filter.streaming.archives import read_packets
from training.arguments import positive, seed
from training.bundles.train_classes import COLUMN
from training.bundles.train_default import SPLIT_SEED, TEST_FRACTION
from training.checkpoint import beside
from training.data.datasets import held_out, sha256_of
from training.data.record_distribution import record_archives
from training.data.simulated import SimulatedNight
from training.embedding.embedder import Recipe, embed, show, train
from training.embedding.probes import balanced_accuracy, linear_probe, nearest
from training.errors import DatasetError, TrainingError, refuse_existing
from training.evaluation.bootstrap import INTERVALS, as_card, estimate
from training.evaluation.metrics import Values, Weights, harmonic_mean

VERSION = "1.1"
SURVEYS: tuple[SurveyName, ...] = ("ztf", "lsst")
"""Surveys whose alerts the embedding is trained on."""
TRUNK = "stampnet"
OF_BOTH = ("magpsf", "sigmapsf", "snr", "isdiffpos", "ndethist")
OF_ZTF = (
    *("fwhm", "elong", "classtar", "sumrat", "nneg", "nbad", "magdiff", "scorr", "age", "nnotdet"),
    *("distnr", "magnr", "chinr", "sharpnr", "distpsnr1", "sgscore1", "srmag1", "distpsnr2", "nmtchps"),
    *("neargaia", "maggaia"),
)
OF_LSST = ("extendedness", "apFlux", "scienceFlux", "templateFlux", "trailLength")
METADATA = OF_BOTH + OF_ZTF + OF_LSST
"""Metadata columns of the embedder. Excluded are columns from which the weak labels were derived (ssdistnr, drb, rb,
positions), and columns that reveal when or by whom a packet was collected rather than what it shows."""
LIGHT_CURVE = LightCurveInput(points=32, flux_scale=100, time_scale=1)
"""Input of light curves. Three of four ZTF packets have at most 32 points. LSST's flux errors are some 100 nJy, ZTF's
some 5,000 nJy."""
CLASSES = ("VS=VS", "asteroid=asteroid", "bogus=bogus,likely_bogus", "SN=SN,SN_cand", "AGN=AGN")
"""Class rules (`scoring.labels`) of the evaluation. Unlike those of the bundle `classes`, they include candidates of
supernovae."""
SIZE = 32
"""Dimensions of a modality's vector."""
SIMULATED = 3000
"""Number of simulated alerts of each survey."""
SIMULATION_SEEDS: Mapping[SurveyName, int] = {"ztf": 11, "lsst": 12}
SYMMETRIES_OF_SIMULATED = 2
"""Symmetries used of each simulated alert: more alerts help more than more symmetries, at the same cost."""
SHARES = {"real": 0.6, "ztf": 0.15, "lsst": 0.25}
"""Fraction of the batches from each set of alerts."""
UNTRAINED = 5
"""Number of networks with random weights whose mean figures are the baseline."""
FOLDS = 5
"""Number of folds of the cross-validation over all objects, which is used because the test split holds few supernovae
and active galaxies."""
FOLD_SEED = 2026
SINGLE = (*MODALITIES, "untrained")
"""Baselines that the embedding is compared with."""
PACKETS_AT_ONCE = 256

Classify = Callable[[NDArray[np.float32], NDArray[np.int64], NDArray[np.str_], NDArray[np.float32]], NDArray[np.int64]]
PROBES: dict[str, Classify] = {"linear_probe": linear_probe, "neighbours": nearest}

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Named:
    """N alerts with their ids."""

    raw: RawAlerts
    alert_id: NDArray[np.int64]  # [N]
    object_id: NDArray[np.str_]  # [N]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `train-embedder`."""
    parser.add_argument("inputs", metavar="INPUT", nargs="+", type=Path, help="ZTF alerts: files, folders, archives")
    parser.add_argument("--labels", required=True, type=Path, help=f"table with the columns candid and {COLUMN}")
    parser.add_argument("--trunk", default="default", help="bundle with the network StampNet (default: %(default)s)")
    parser.add_argument("--out", required=True, type=Path, help="directory of the new bundle")
    parser.add_argument("--steps", type=positive, default=Recipe.steps, help="training steps (default: %(default)s)")
    parser.add_argument(
        "--seed", type=seed, default=Recipe.seed, help="seed of weights and batches (default: %(default)s)"
    )


def run(arguments: argparse.Namespace) -> None:
    """Train, evaluate and write the bundle.

    Raises TrainingError or DatasetError before training if the input cannot be used.
    """
    refuse_existing(arguments.out)
    torch.set_num_threads(1)
    trunk = open_bundle(arguments.trunk).part("ztf")
    if trunk.card.architecture.name != TRUNK:
        raise TrainingError(f"{arguments.trunk}: its network is not {TRUNK}, so it cannot be the trunk")
    labels = read_labels(arguments.labels, COLUMN, [parse_rule(rule) for rule in CLASSES])
    inputs = Inputs(
        images=trunk.card.inputs.images,
        metadata=tuple(MetadataColumn(name=name, fill=NO_VALUE) for name in METADATA),
        light_curve=LIGHT_CURVE,
    )
    recipe = Recipe(steps=arguments.steps, seed=arguments.seed)
    alerts = decode(read_packets(arguments.inputs), inputs)
    simulated = {
        survey: decode(SimulatedNight(SIMULATED, seed, survey), inputs) for survey, seed in SIMULATION_SEEDS.items()
    }
    unseen = held_out(alerts.object_id, TEST_FRACTION, SPLIT_SEED)
    log.info("%d real training alerts, %d real test alerts", (~unseen).sum(), unseen.sum())

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
    record_archives(arguments.out, arguments.inputs)
    checkpoint.unlink(missing_ok=True)


def decode(
    packets: Iterable[Packet], inputs: Inputs, columns: Sequence[str] = METADATA, schemas: str | None = str(SCHEMAS)
) -> Named:
    """Decode every alert of the packets for a network that takes `inputs`, with metadata `columns`, each alert id once.

    `schemas`: the registry, or the directory of schemas, of packets in wire format. Packets that cannot be decoded are
    skipped.

    Raises DatasetError if there is no alert.
    """
    decoder = Decoder(open_registry(schemas), cutout_size=inputs.images.size, columns=columns, planes=inputs.planes)
    batches = [batch for batch, _ in decoder.decode_batches(in_batches(packets, PACKETS_AT_ONCE))]
    if not sum(map(len, batches)):
        raise DatasetError("no alert was read from the inputs: give files or archives of alerts")
    alert_id, first = np.unique(np.concatenate([batch.alert_id for batch in batches]), return_index=True)
    raw = RawAlerts(
        np.concatenate([batch.cutouts for batch in batches])[first],
        np.concatenate([batch.cutout_box for batch in batches])[first],
        np.concatenate([batch.metadata for batch in batches])[first],
        tuple(columns),
        np.concatenate([batch.mjd for batch in batches])[first],
        LightCurves.join([batch.light_curves for batch in batches])[first],
        _joined([batch.variance for batch in batches], first),
        _joined([batch.psf for batch in batches], first),
        np.concatenate([batch.survey for batch in batches])[first],
    )
    return Named(raw, alert_id, np.array([name for batch in batches for name in batch.object_id], np.str_)[first])


def _joined(planes: Sequence[NDArray[np.float32] | None], rows: NDArray[np.int64]) -> NDArray[np.float32] | None:
    """Return the `rows` of the concatenated planes, or None if the planes were not decoded."""
    decoded = [plane for plane in planes if plane is not None]
    return np.concatenate(decoded)[rows] if decoded else None


def untrained(seed: int, alerts: RawAlerts, inputs: Inputs, unseen: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Return the embedding float32[N, D] by a network with random weights, including the trunk.

    Its standardisation is fitted to the same alerts as that of the trained network.
    """
    torch.manual_seed(seed)
    network = AlertEmbedder(TRUNK, len(METADATA), SIZE).eval()
    shown = show(network, alerts, inputs, symmetries=1)
    network.features.fit(shown.features[~unseen].flatten(0, 1))
    network.metadata.fit(shown.metadata[~unseen])
    return side_by_side(embed(network, shown))


def side_by_side(modalities: Tensor) -> NDArray[np.float32]:
    """Return the embedding float32[N, M * D] of modalities [N, M, D], concatenated and normalised as in the network."""
    embedding: NDArray[np.float32] = normalize(modalities.flatten(1), dim=1).numpy()
    return embedding


def evaluate(
    embeddings: dict[str, list[NDArray[np.float32]]],
    label: NDArray[np.int64],
    object_id: NDArray[np.str_],
    unseen: NDArray[np.bool_],
) -> dict[str, float | int | str]:
    """Return the card's figures: balanced accuracies, and the advantage of the embedding over the baselines.

    First of held-out objects, classified with the training objects; then (prefix `all_`) of all objects,
    cross-validated by object.
    """
    known = label != UNLABELLED
    embeddings = {name: [each[known] for each in several] for name, several in embeddings.items()}
    label, object_id, unseen = label[known], object_id[known], unseen[known]
    card: dict[str, float | int | str] = {
        "truth": f"{COLUMN}: weak labels, not used in training",
        "figures": "balanced accuracy over the classes; all_: of all objects, each classified with the objects of "
        "other folds",
        "split": f"{TEST_FRACTION:.0%} of the objects, seed {SPLIT_SEED}, held out from training",
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
    """Return balanced accuracies, and the embedding's differences from them, for weights [..., N].

    A value is a mean if there are several networks.
    """
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
    """Return the number of objects behind each figure that is a fraction; differences have none."""
    objects = harmonic_mean([weight @ (label == c) for c in np.unique(label).tolist()])
    return {prefix: objects} | {f"{prefix}_{name}": objects for name in right}


def classified(
    classify: Classify,
    embedding: NDArray[np.float32],
    label: NDArray[np.int64],
    object_id: NDArray[np.str_],
    sides: Sequence[NDArray[np.bool_]],
) -> NDArray[np.int64]:
    """Return the class of each alert, int64[N].

    An alert in one of the `sides` is classified with all alerts outside that side; other alerts are UNLABELLED.
    """
    classes = np.full(len(label), UNLABELLED)
    for side in sides:
        classes[side] = classify(embedding[~side], label[~side], object_id[~side], embedding[side])
    return classes


def fold_of(object_id: NDArray[np.str_]) -> NDArray[np.int64]:
    """Return the fold of each alert, int64[N]; all alerts of an object are in one fold."""
    objects, index = np.unique(object_id, return_inverse=True)
    folds: NDArray[np.int64] = (np.random.default_rng(FOLD_SEED).permutation(len(objects)) % FOLDS)[index]
    return folds


def table(evaluation: Mapping[str, float | int | str]) -> str:
    """Return the figures of a card as Markdown: one row per embedding, one column per probe and set of objects."""
    columns = [f"{prefix}{probe}" for prefix in ("", "all_") for probe in PROBES]
    titles = [f"{probe.replace('_', ' ')}, {who}" for who in ("held-out objects", "all objects") for probe in PROBES]
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
    """Return the sha256 of the training data: ids, pixels, metadata and light curves of the chosen alerts."""
    arrays: list[NDArray[Any]] = []
    for alerts, rows in data:
        raw = alerts.raw[rows]
        assert raw.mjd is not None
        assert raw.light_curves is not None
        arrays += [alerts.alert_id[rows], raw.cutouts, raw.cutout_box, raw.metadata, raw.mjd]
        arrays += [getattr(raw.light_curves, name) for name in ("offsets", *POINT_COLUMNS)]
    return sha256_of(*arrays)


def describe(
    trunk: Part,
    inputs: Inputs,
    recipe: Recipe,
    trained_on: NDArray[np.str_],
    evaluation: dict[str, float | int | str],
) -> Description:
    """Return the bundle's description for the card. `trained_on`: object ids of the real training alerts."""
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
        citation=f"Method: Rizhko & Bloom 2024 (arXiv:2411.08842). Trunk: {card.citation}",
        training=Training(
            method=f"The trunk and the output {', '.join(card.outputs.labels)} are the unchanged bundle {card.name} "
            f"{card.version}, which was trained for {' and '.join(card.surveys)} only; the output is null for other "
            "surveys. All other parameters: contrastive learning between the modalities, in steps of one augmented "
            f"view of {recipe.batch} alerts of one survey (symmetries, masked columns, dropped points), {recipe.steps} "
            f"steps, AdamW, peak learning rate {recipe.learning_rate:g}, seed {recipe.seed}. The hyperparameters were "
            "chosen by cross-validation on training objects.",
            data=f"{len(trained_on)} public ZTF alerts of {len(np.unique(trained_on))} objects and {SIMULATED} "
            "simulated alerts of each survey, without labels. No real LSST alerts were used.",
            evaluation=evaluation,
        ),
    )
