"""Trains the network for LSST of the shipped bundle `embedder`.

    python -m training train-embedder-lsst LSST_ALERTS ... --schemas DIR --histories TABLE ... --labels TABLE --out DIR
    broker-filter models combine --ztf embedder --lsst DIR --name embedder --version 2.0 --out embedder_2

The training is self-supervised, as that of `train-embedder`; its data are real LSST alerts, earlier detections of LSST
objects, and simulated LSST alerts. The trunk is the network of the bundle `rubin`, unchanged, whose probabilities are
computed in the same pass. Labels are used for evaluation only. For the figures of the card, a network is trained
without the labelled alerts; the trunk, however, has learnt the reliability of all alerts.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from sklearn.decomposition import PCA
from torch import Tensor

from broker_filter.config import Runtime
from broker_filter.importers.write_bundle import write_bundle
from broker_filter.packets.batch import LightCurves, Survey
from broker_filter.packets.photometry import NO_VALUE
from broker_filter.scoring.alerts import RawAlerts
from broker_filter.scoring.bundle import (
    WEIGHTS,
    Architecture,
    Description,
    Inputs,
    MetadataColumn,
    Outputs,
    Part,
    Training,
    open_bundle,
)
from broker_filter.scoring.labels import UNLABELLED
from broker_filter.scoring.networks import build_network
from broker_filter.scoring.networks.alert_embedder import MODALITIES
from broker_filter.scoring.networks.snr_embedder import SnrEmbedder, flagged
from broker_filter.scoring.networks.snrnet import METADATA, derive
from broker_filter.scoring.preprocess import prepare, prepare_light_curves, prepare_metadata
from broker_filter.scoring.scorer import LoadedPart, open_model
from broker_filter.simulate import REAL
from training.arguments import positive, seed
from training.bundles.rubin_data import INPUTS as OF_TRUNK
from training.bundles.rubin_data import OF_LSSTCAM, RATES
from training.bundles.rubin_evaluation import SPLIT_SEED
from training.bundles.train_rubin import resumed
from training.data.datasets import held_out, sha256_of
from training.data.light_curve_features import light_curve_features
from training.data.record_distribution import record_archives
from training.data.simulated import SimulatedNight
from training.embedding.embedder import AT_ONCE, Recipe, Shown, embed, train
from training.embedding.lsst_alerts import (
    CLASSES,
    OF_EVALUATION,
    Histories,
    LsstAlerts,
    load_histories,
    load_lsst_alerts,
)
from training.embedding.train_embedder import (
    LIGHT_CURVE,
    PROBES,
    SIZE,
    Named,
    classified,
    decode,
    figures,
    fold_of,
    side_by_side,
    trials,
)
from training.errors import TrainingError, refuse_existing
from training.evaluation.bootstrap import INTERVALS, as_card, estimate

VERSION = "2.0"
TRUNK = "snrnet"
INPUTS = Inputs(
    images=OF_TRUNK.images,
    metadata=tuple(MetadataColumn(name=name, fill=NO_VALUE) for name in METADATA),
    light_curve=LIGHT_CURVE,
    psf=OF_TRUNK.psf,
)
"""The inputs: images and metadata are those of the trunk. Neither the number of detections of the object nor its age is
an input: for known asteroids, the survey publishes neither, so that they would reveal its catalogue match."""
STEPS = 250
BATCH = 128
SHARES = {"lsstcam": 0.2, "other_cameras": 0.1, "histories": 0.1, "simulated": 0.6}
"""Fraction of the batches from each set of alerts."""
SIMULATION_SEED = 12
KINDS = tuple(REAL)
"""The kinds of simulated alerts that are no artefacts."""
UNTRAINED = 5
"""Number of networks with random weights whose mean figures are the baseline."""
COMPONENTS = 32
"""Number of principal components of the pixels that the baseline of pixels takes."""
HISTORY = ("ndethist", "age", "nnotdet")
"""Columns that are missing for known asteroids, so that they would reveal the class."""
METHODS = (*MODALITIES, "untrained", "compared", "pixels", "features")
"""What the embedding is compared with: its modalities, and other methods."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Data:
    """All alerts that the embedder learns from, as decoded and as the network sees them."""

    lsstcam: LsstAlerts
    shown: Shown  # of `lsstcam`
    other_cameras: Shown
    histories: Histories
    shown_histories: Shown
    simulated: Named
    shown_simulated: Shown
    kind: NDArray[np.str_]  # of `simulated`
    compared: LoadedPart  # another network with an embedding

    def groups(
        self, rows: NDArray[np.bool_], histories: bool = True, simulated: NDArray[np.bool_] | None = None
    ) -> dict[str, Shown]:
        """Return what is learnt if only the alerts of LSSTCam in `rows` bool[N] are known, by the names in SHARES.

        Histories of objects or visits of the other alerts are left out; without `histories`, all are. `simulated`: the
        simulated alerts that are known, by default all.
        """
        unseen = self.lsstcam[~rows]
        known = ~np.isin(self.histories.object_id, unseen.named.object_id)
        known &= ~np.isin(self.histories.visit, unseen.visit) & histories
        groups = {
            "lsstcam": self.shown[rows],
            "other_cameras": self.other_cameras,
            "histories": self.shown_histories[known],
            "simulated": self.shown_simulated if simulated is None else self.shown_simulated[simulated],
        }
        return {name: group for name, group in groups.items() if len(group)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `train-embedder-lsst`."""
    add_data_arguments(parser)
    parser.add_argument("--out", required=True, type=Path, help="directory of the new bundle")
    parser.add_argument("--checkpoint", type=Path, help="directory for trained parts (default: OUT.parts, beside OUT)")


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that all trainings of the embedder for LSST share."""
    parser.add_argument("inputs", metavar="INPUT", nargs="+", type=Path, help="LSST alerts: files, folders, archives")
    parser.add_argument("--schemas", help="schema registry, or directory of schemas, of alerts in wire format")
    parser.add_argument(
        "--histories", nargs="+", type=Path, required=True, help="Parquet files of diaSources, or of alerts with them"
    )
    parser.add_argument("--labels", type=Path, required=True, help="Parquet file with diaSourceId and weak_class")
    parser.add_argument("--trunk", default="rubin", help="bundle with the network SnrNet (default: %(default)s)")
    parser.add_argument(
        "--compare", default="embedder", help="bundle with the embedding to compare with (default: %(default)s)"
    )
    parser.add_argument("--simulated", type=positive, default=2000, help="simulated alerts (default: %(default)s)")
    parser.add_argument("--steps", type=positive, default=STEPS, help="steps of each training (default: %(default)s)")
    parser.add_argument("--seed", type=seed, default=1, help="seed of weights and batches (default: %(default)s)")


def run(arguments: argparse.Namespace) -> None:
    """Train, evaluate and write the bundle.

    Raises TrainingError or DatasetError before training if the input cannot be used.
    """
    refuse_existing(arguments.out)
    torch.set_num_threads(1)
    trunk = open_trunk(arguments.trunk)
    data = load(arguments, trunk)
    recipe = recipe_of(arguments)
    parts = arguments.checkpoint or arguments.out.with_name(f"{arguments.out.name}.parts")
    made_of = f"{recipe} {data_sha256(data)} {trunk.card.files[WEIGHTS]}"
    sets = [Probed.of_real(data.lsstcam), Probed.of_simulated(data.simulated, data.kind)]
    probed = partial(embedded_without, data, trunk, recipe, sets)
    modalities = resumed(parts / "probed.safetensors", made_of, probed)
    evaluation = evaluate(data, trunk, sets, modalities)
    print(table(evaluation))

    network = new_network(trunk, recipe.seed)
    everything = np.ones(len(data.lsstcam), np.bool_)
    final = partial(learnt_state, network, data, recipe, everything)
    network.load_state_dict(resumed(parts / "network.safetensors", made_of, final))
    evaluation |= {"dataset_sha256": data_sha256(data)}
    write_bundle(arguments.out, describe(trunk, data, recipe, evaluation), network.eval())
    record_archives(arguments.out, arguments.inputs, arguments.schemas, OF_LSSTCAM)


def recipe_of(arguments: argparse.Namespace) -> Recipe:
    """Return the recipe. Metadata are masked by the network itself."""
    return Recipe(steps=arguments.steps, seed=arguments.seed, batch=BATCH, lost_columns=0)


def open_trunk(bundle: str) -> Part:
    """Return the network for LSST of a bundle. Raises TrainingError if it is not SnrNet."""
    trunk = open_bundle(bundle).part("lsst")
    if trunk.card.architecture.name != TRUNK:
        raise TrainingError(f"{bundle}: its network for LSST is not {TRUNK}, so it cannot be the trunk")
    return trunk


def load(arguments: argparse.Namespace, trunk: Part) -> Data:
    """Return the alerts that the arguments name. Raises DatasetError if there is none of LSSTCam, or no history."""
    compared = open_compared(arguments.compare)
    names = {column.name for column in compared.inputs.metadata}
    columns = (*METADATA, *sorted(names - {*METADATA, *OF_EVALUATION}))
    size = max(INPUTS.images.size, compared.inputs.images.size)
    decoded = INPUTS.model_copy(update={"images": INPUTS.images.model_copy(update={"size": size})})
    alerts = load_lsst_alerts(arguments.inputs, arguments.schemas, arguments.labels, decoded, columns)
    histories = load_histories(arguments.histories, SPLIT_SEED)
    night = SimulatedNight(arguments.simulated, SIMULATION_SEED, "lsst", RATES)
    simulated = decode(iter(night), decoded, columns)
    network = new_network(trunk, arguments.seed)
    shown = show(network, alerts.named.raw)
    on_sky = alerts.of_lsstcam
    log.info(
        "%d alerts of LSSTCam, %d of other cameras, %d earlier detections of %d objects",
        *(on_sky.sum(), (~on_sky).sum(), len(histories), len(np.unique(histories.object_id))),
    )
    return Data(
        alerts[on_sky],
        shown[on_sky],
        shown[~on_sky],
        histories,
        show_histories(histories, shown.features.shape[2]),
        simulated,
        show(network, simulated.raw),
        night.kinds(simulated.alert_id),
        compared,
    )


def open_compared(bundle: str) -> LoadedPart:
    """Return the network for LSST of a bundle with an embedding of MODALITIES. Raises TrainingError if it has none."""
    part = open_model(bundle, Runtime(engine="onnxruntime", device="cpu", inference_threads=1)).part(Survey.LSST)
    if part.bundle.card.outputs.modalities != MODALITIES:
        raise TrainingError(
            f"{bundle}: gives no embedding of {', '.join(MODALITIES)} for LSST, so it cannot be compared"
        )
    return part


def new_network(trunk: Part, seed: int) -> SnrEmbedder:
    """Return an untrained embedder with the given trunk."""
    torch.manual_seed(seed)
    network = untrained(trunk)
    network.trunk.load_state_dict(load_file(trunk.directory / WEIGHTS))
    return network.eval()


def untrained(trunk: Part) -> SnrEmbedder:
    """Return an embedder for the architecture of the trunk, all of whose weights are random."""
    network = build_network(architecture(trunk))
    assert isinstance(network, SnrEmbedder)
    return network.eval()


def architecture(trunk: Part) -> Architecture:
    """Return the architecture of an embedder with the trunk."""
    return Architecture(name="snr_embedder", arguments={**trunk.card.architecture.arguments, "size": SIZE})


@torch.inference_mode()
def show(network: SnrEmbedder, alerts: RawAlerts) -> Shown:
    """Return the preprocessed alerts and the trunk's features, both computed as in serving.

    The trunk averages over the orientations of an image itself, so its features are given for one orientation only.
    """
    seen = {name: torch.from_numpy(array) for name, array in prepare(alerts, INPUTS).items()}
    features = [
        network.trunk(
            seen["images"][start : start + AT_ONCE],
            flagged(seen["metadata"][start : start + AT_ONCE]),
            seen["psf"][start : start + AT_ONCE],
        )[1]
        for start in range(0, len(alerts), AT_ONCE)
    ]
    return Shown(torch.cat(features).unsqueeze(1), seen["metadata"], seen["light_curve"], seen["light_curve_mask"])


def show_histories(histories: Histories, features: int) -> Shown:
    """Return the preprocessed detections without images."""
    metadata = prepare_metadata(histories.metadata, METADATA, INPUTS.metadata)
    curves = prepare_light_curves(histories.light_curves, histories.mjd, LIGHT_CURVE)
    absent = torch.full((len(histories), 1, features), torch.nan)
    return Shown(absent, torch.from_numpy(metadata), *map(torch.from_numpy, curves))


def at_first_detection(alerts: RawAlerts) -> RawAlerts:
    """Return the alerts as if each were the first detection of its object: its own point is the whole light curve."""
    curves, mjd = alerts.light_curves, alerts.mjd
    assert curves is not None
    assert mjd is not None
    alert = np.repeat(np.arange(len(alerts)), np.diff(curves.offsets))
    own = np.zeros(len(alerts), np.int64)
    np.maximum.at(own, alert, np.where(curves.mjd <= mjd[alert], np.arange(len(alert)), 0))
    first = LightCurves(
        np.arange(len(alerts) + 1),
        curves.mjd[own],
        curves.band[own],
        curves.flux[own],
        curves.flux_err[own],
        curves.kind[own],
    )
    return replace(alerts, light_curves=first)


def learn(network: SnrEmbedder, groups: Mapping[str, Shown], recipe: Recipe) -> None:
    """Train `network` on the groups of alerts, by the names in SHARES, in place."""
    train(network, [(group, SHARES[name]) for name, group in groups.items()], recipe)


def learnt_state(network: SnrEmbedder, data: Data, recipe: Recipe, rows: NDArray[np.bool_]) -> dict[str, Tensor]:
    """Train `network` on the alerts of LSSTCam in `rows` bool[N], and on all others, and return its state."""
    learn(network, data.groups(rows), recipe)
    return network.state_dict()


@dataclass(frozen=True, slots=True)
class Probed:
    """N labelled alerts whose classes are read from the embedding of a network that did not learn from them."""

    prefix: str  # of the names of the figures
    raw: RawAlerts
    object_id: NDArray[np.str_]  # [N]
    label: NDArray[np.int64]  # [N]
    fold: NDArray[np.int64]  # [N] alerts of a fold are classified with those of the other folds

    @classmethod
    def of_real(cls, sky: LsstAlerts) -> Self:
        """Return the alerts of LSSTCam with a label."""
        rows = sky.label != UNLABELLED
        objects = sky.named.object_id[rows]
        return cls("", sky.named.raw[rows], objects, sky.label[rows], fold_of(objects))

    @classmethod
    def of_simulated(cls, named: Named, kind: NDArray[np.str_]) -> Self:
        """Return the half of the simulated alerts that `embedded_without` holds out; every artefact is bogus."""
        rows = held_out_of(named)
        label = np.array([KINDS.index(one) if one in KINDS else len(KINDS) for one in kind[rows].tolist()])
        return cls("simulated_", named.raw[rows], named.object_id[rows], label, fold_of(named.object_id[rows]))

    def views(self) -> dict[str, RawAlerts]:
        """Return the alerts as they came, and as they would have come at their first detections, by prefix."""
        return {self.prefix: self.raw, f"{self.prefix}first_detection_": at_first_detection(self.raw)}


def held_out_of(simulated: Named) -> NDArray[np.bool_]:
    """Return which simulated alerts are held out for the figures, bool[N]: half of the objects."""
    return held_out(simulated.object_id, 0.5, SPLIT_SEED)


def embedded_without(data: Data, trunk: Part, recipe: Recipe, sets: Sequence[Probed]) -> dict[str, Tensor]:
    """Return the modalities [N, M, size] of the alerts in `sets` by the prefix of each view.

    The network learnt from none of these alerts, and from no history of their objects and visits.
    """
    network = new_network(trunk, recipe.seed)
    unlabelled = data.lsstcam.label == UNLABELLED
    learn(network, data.groups(unlabelled, simulated=~held_out_of(data.simulated)), recipe)
    return {prefix: embed(network, show(network, raw)) for one in sets for prefix, raw in one.views().items()}


def evaluate(
    data: Data, trunk: Part, sets: Sequence[Probed], modalities: Mapping[str, Tensor]
) -> dict[str, float | int | str]:
    """Return the card's figures: how well classes are read from the `modalities` of alerts that were held out."""
    real = sets[0]
    card: dict[str, float | int | str] = {
        "truth": "asteroid: the packet names a known object; variable: active nuclei and variable stars, weak labels "
        "by position. simulated_: the truth, four kinds and bogus. Not used in training",
        "figures": "balanced accuracy over the classes; first_detection: of the same alerts, each with its own "
        "measurement as the whole light curve",
        "split": "the embedder learnt from none of the labelled alerts; each is classified with those of other "
        "objects. They are of few visits. The trunk has learnt the reliability of all alerts",
        "intervals": INTERVALS,
        "alerts": len(real.label),
        "objects": len(np.unique(real.object_id)),
        "visits": len(np.unique(data.lsstcam.visit[data.lsstcam.label != UNLABELLED])),
        **{f"{name}_alerts": int((real.label == c).sum()) for c, name in enumerate(CLASSES)},
    }
    for one in sets:
        folds = [one.fold == fold for fold in np.unique(one.fold).tolist()]
        for prefix, raw in one.views().items():
            vectors = modalities[prefix]
            methods = {
                "embedding": [side_by_side(vectors)],
                **{name: [vectors[:, m].numpy()] for m, name in enumerate(MODALITIES)},
                "untrained": by_untrained(trunk, raw),
                "compared": [by_compared(data.compared, raw)],
                "pixels": [by_pixels(raw)],
                "features": [by_features(raw)],
            }
            for probe, classify in PROBES.items():
                right = {
                    method: [
                        classified(classify, each, one.label, one.object_id, folds) == one.label for each in several
                    ]
                    for method, several in methods.items()
                }
                name = f"{prefix}{probe}"
                found = estimate(
                    partial(figures, name, right, one.label), one.object_id, partial(trials, name, right, one.label)
                )
                card |= as_card(found)
    return card


def by_untrained(trunk: Part, alerts: RawAlerts) -> list[NDArray[np.float32]]:
    """Return embeddings float32[N, D] by networks with random weights, the trunk included.

    Their inputs are scaled with constants from the same alerts.
    """
    found = []
    for one in range(UNTRAINED):
        torch.manual_seed(one)
        network = untrained(trunk)
        shown = show(network, alerts)
        network.features.fit(shown.features.flatten(0, 1))
        network.metadata.fit(shown.metadata)
        found.append(side_by_side(embed(network, shown)))
    return found


def by_compared(part: LoadedPart, alerts: RawAlerts) -> NDArray[np.float32]:
    """Return the embedding float32[N, D] by another network, without the columns of HISTORY."""
    metadata = alerts.metadata.copy()
    metadata[:, np.isin(alerts.columns, HISTORY)] = np.nan
    return side_by_side(torch.from_numpy(part.run(replace(alerts, metadata=metadata))["modalities"]))


def by_pixels(alerts: RawAlerts) -> NDArray[np.float32]:
    """Return the first principal components float32[N, COMPONENTS] of the images of N alerts."""
    images = prepare(alerts, INPUTS)["images"].reshape(len(alerts), -1)
    components: NDArray[np.float32] = PCA(min(COMPONENTS, *images.shape), random_state=SPLIT_SEED).fit_transform(images)
    return components


def by_features(alerts: RawAlerts) -> NDArray[np.float32]:
    """Return the features of N alerts, standardised, float32[N, F]; 0 where missing."""
    features = features_of(alerts)
    known = np.isfinite(features).any(axis=0)
    mean, deviation = (statistic(features[:, known], axis=0) for statistic in (np.nanmean, np.nanstd))
    unit = (features[:, known] - mean) / np.where(deviation > 0, deviation, 1)
    return np.asarray(np.nan_to_num(unit), np.float32)


def features_of(alerts: RawAlerts) -> NDArray[np.float64]:
    """Return features of the metadata and the light curves of N alerts, float64[N, F], NaN where missing."""
    assert alerts.light_curves is not None
    metadata = torch.from_numpy(prepare_metadata(alerts.metadata, alerts.columns, INPUTS.metadata))
    derived = derive(flagged(metadata)).double().numpy()
    return np.concatenate([derived, light_curve_features(alerts.light_curves)], axis=1)


def table(evaluation: Mapping[str, float | int | str]) -> str:
    """Return the figures of a card as Markdown: one row per method, one column per probe and view."""
    views = [f"{alerts}{view}" for alerts in ("", "simulated_") for view in ("", "first_detection_")]
    columns = [f"{view}{probe}" for view in views for probe in PROBES]
    rows = {"embedding": ""} | {name: f"_{name}" for name in METHODS}
    rows |= {f"ahead of {name}": f"_ahead_of_{name}" for name in METHODS}
    lines = [
        " | ".join(["", *(column.replace("_", " ") for column in columns)]),
        "|".join(["---"] * (1 + len(columns))),
    ]
    for row, suffix in rows.items():
        cells = [f"{evaluation[f'{column}{suffix}']:.3f} ({evaluation[f'{column}{suffix}_95']})" for column in columns]
        lines.append(" | ".join([row.replace("_", " "), *cells]))
    return "\n".join(f"| {line} |" for line in lines)


def data_sha256(data: Data) -> str:
    """Return the sha256 of the training data: ids, and all that the network sees of them."""
    arrays = [data.lsstcam.named.alert_id, data.histories.mjd]
    for shown in (data.shown, data.other_cameras, data.shown_histories, data.shown_simulated):
        arrays += [tensor.numpy() for tensor in (shown.features, shown.metadata, shown.light_curve)]
    return sha256_of(*arrays)


def describe(trunk: Part, data: Data, recipe: Recipe, evaluation: dict[str, float | int | str]) -> Description:
    """Return the bundle's description for the card."""
    card = trunk.card
    return Description(
        name="embedder_lsst",
        version=VERSION,
        task="embedding of an alert's images, light curve and metadata, and real/bogus classification",
        surveys=("lsst",),
        inputs=INPUTS,
        outputs=Outputs(
            labels=card.outputs.labels,
            activation=card.outputs.activation,
            thresholds=card.outputs.thresholds,
            embedding=len(MODALITIES) * SIZE,
            modalities=MODALITIES,
        ),
        architecture=architecture(trunk),
        licence="BSD-3-Clause",
        source="training/embedding/train_embedder_lsst.py of broker-filter",
        citation=f"Method: Rizhko & Bloom 2024 (arXiv:2411.08842). Trunk: {card.citation}",
        training=Training(
            method=f"The trunk and the probabilities are the unchanged bundle {card.name} {card.version}. All other "
            "parameters: contrastive learning between the modalities, in steps of one augmented view of "
            f"{recipe.batch} alerts of one kind (masked metadata, dropped points), {recipe.steps} steps, AdamW, peak "
            f"learning rate {recipe.learning_rate:g}, seed {recipe.seed}.",
            data=f"{len(data.lsstcam)} public alerts of LSSTCam on the sky of {len(np.unique(data.lsstcam.visit))} "
            f"visits, {len(data.other_cameras)} of HSC and of simulated images, processed by Rubin's pipeline, "
            f"{len(data.histories)} earlier detections without images of "
            f"{len(np.unique(data.histories.object_id))} objects, and {len(data.simulated.raw)} simulated alerts; "
            "without labels. No weight depends on `reliability` except through the trunk.",
            evaluation=evaluation,
        ),
    )
