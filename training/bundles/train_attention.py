"""Trains the bundle `attention`: a standard network with attention, pre-trained, then trained for ZTF and for LSST.

    broker-filter models import braai d6_m7.weights.h5 --normalisation row --name d6_m7 --out study/d6_m7
    python -m training pretrain training/bundles/attention_encoder.yaml
    python -m training train-attention ztf_alerts.tar archives --lsst LSST_ALERTS ... --schemas DIR \\
        --teacher study/d6_m7 --encoder study/encoders/attention --out study/attention

The network is the architecture on the encoder's card. One network, with one normalisation, learns both surveys in the
same steps. ZTF's alerts are distilled as for `default`, on the same alerts and the same split, so that both can be
compared alert by alert. LSST's alerts have labels of their own: the survey's `reliability` for alerts of LSSTCam, and
the truth for simulated alerts. A fine-tuning with a low learning rate follows.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import nn

from broker_filter.config import Runtime
from broker_filter.importers.encoders import load_encoder_weights
from broker_filter.importers.write_bundle import write_bundle
from broker_filter.scoring.alerts import RawAlerts
from broker_filter.scoring.bundle import (
    WEIGHTS,
    Architecture,
    Description,
    ImageInput,
    Part,
    open_bundle,
    write_card,
)
from broker_filter.scoring.networks import build_network, load_network
from broker_filter.scoring.preprocess import prepare_images
from broker_filter.scoring.scorer import open_scorer
from broker_filter.simulate import REAL, SCHEMAS
from training.arguments import positive, seed
from training.bundles.distil import Hint, Labelled, Recipe, distil, run_over
from training.bundles.rubin_data import OF_LSSTCAM, Seen, load_lsst
from training.bundles.rubin_evaluation import FOLDS, unrelated
from training.bundles.rubin_evaluation import figures as lsst_figures
from training.bundles.train_default import (
    SPLIT_SEED,
    TEACHER,
    TEST_FRACTION,
    check_rated,
    data_sha256,
    describe,
    evaluate,
    published_score,
)
from training.bundles.train_rubin import DIGITS_OF_NIGHT, chances
from training.checkpoint import beside
from training.data.datasets import Alerts, held_out, load_alerts
from training.data.record_distribution import record_archives
from training.data.simulated import RATES, SimulatedNight, simulate_cutouts
from training.errors import DatasetError, TrainingError, refuse_existing
from training.evaluation.bootstrap import INTERVALS, as_card, estimate
from training.evaluation.metrics import Values, Weights, rank
from training.evaluation.served_speed import measure_served
from training.recipe import ENCODER_CARD, ENCODER_WEIGHTS

NAME, VERSION = "attention", "1.0"
SOURCE = "training/bundles/train_attention.py"
HINTS = {
    "mobilevit_xxs": (
        Hint(student="encoder.backbone.stages.2", teacher="features.10"),
        Hint(student="encoder", teacher="features.14"),
    )
}
"""The layers of student and teacher that are compared, by timm's name of the backbone: MobileViT's first map with
attention, of 8 x 8 px, whose inner 6 x 6 px cover the same sky as VGG6's map; and the embeddings. A network with other
maps gets no hints."""
LEARNING_RATE = 1e-3
"""Peak learning rate of the distillation, half of that of `default`."""
WEIGHT_DECAY = 0.05
"""The value of pre-training."""
TUNING_SHARE = 0.2
"""Steps of the fine-tuning, as a fraction of those of the distillation."""
TUNING_RATE = 1e-4
TUNING_SEED = 1
"""Added to the seed, so that fine-tuning sees other images than the first steps of the distillation."""
TEST_FOLDS = 2
"""Number of the FOLDS of LSSTCam's alerts that are held out. Folds differ in size, because visits do."""
LSSTCAM_SHARE = 0.4
"""Fraction of LSST's training images that are of LSSTCam; the others are simulated. A larger one would repeat the few
alerts too often."""
UNRELIABLE_SHARE = 0.4
"""Fraction of the images of LSSTCam with a reliability below 0.5, as for the bundle `rubin`."""
SIMULATED, SIMULATED_TEST = 2000, 1000
"""Number of simulated alerts of LSST to train on, and to evaluate with."""
SIMULATION_SEED, TEST_SEED = 3, 2027
"""Seeds of these alerts. The encoder's recipe has other ones."""
BATCH, REPETITIONS = 128, 3
"""Alerts in a batch, and number of processes, with which time and memory are measured."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Lsst:
    """N alerts of LSSTCam: the labels, and the same alerts as decoded."""

    seen: Seen
    raw: RawAlerts

    def __len__(self) -> int:
        return len(self.seen)

    def __getitem__(self, rows: NDArray[np.bool_]) -> Lsst:
        return Lsst(self.seen[rows], self.raw[rows])

    @property
    def reliability(self) -> NDArray[np.float32]:
        """The score of the survey's own network, float32[N]."""
        values: NDArray[np.float32] = self.seen.real.numpy()
        return values


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `train-attention`."""
    parser.add_argument("inputs", metavar="INPUT", nargs="+", type=Path, help="ZTF alerts: files, folders, archives")
    parser.add_argument(
        "--lsst", metavar="INPUT", nargs="+", type=Path, required=True, help="LSST alerts: files, folders, archives"
    )
    parser.add_argument("--schemas", help="schema registry, or directory of schemas, of alerts in wire format")
    parser.add_argument("--teacher", required=True, help="bundle of braai d6_m7, the teacher for ZTF")
    parser.add_argument("--encoder", required=True, type=Path, help="directory that `pretrain` wrote")
    parser.add_argument(
        "--begin-with", metavar="BUNDLE", help="earlier bundle of this command, to train further (default: the encoder)"
    )
    parser.add_argument("--out", required=True, type=Path, help="directory of the new bundle")
    parser.add_argument("--steps", type=positive, default=8000, help="steps of distillation (default: %(default)s)")
    parser.add_argument(
        "--simulated", type=positive, default=SIMULATED, help="simulated LSST alerts to train on (default: %(default)s)"
    )
    parser.add_argument("--seed", type=seed, default=1, help="seed of weights and images (default: %(default)s)")
    parser.add_argument("--threads", type=positive, default=1, help="threads of torch (default: %(default)s)")


def run(arguments: argparse.Namespace) -> None:
    """Train, or resume training, evaluate and write the bundle.

    Raises TrainingError or DatasetError before training if the input cannot be used.
    """
    refuse_existing(arguments.out)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    bundle = open_bundle(arguments.teacher).part("ztf")
    if bundle.card.architecture.name != TEACHER:
        raise TrainingError(
            f"{arguments.teacher}: its network is not {TEACHER}: import braai's weights with `models import braai`"
        )
    teacher = load_network(bundle.card.architecture, load_file(bundle.directory / WEIGHTS))
    architecture, origin = _read_card(arguments.encoder / ENCODER_CARD)
    network = build_network(architecture)
    load_encoder_weights(network, str(arguments.encoder / ENCODER_WEIGHTS))
    begun = open_bundle(arguments.begin_with).part("ztf") if arguments.begin_with else None
    if begun:
        network = load_network(architecture, load_file(begun.directory / WEIGHTS))

    images = bundle.card.inputs.images
    alerts = load_alerts(arguments.inputs, images.size, ("drb",))
    unseen = held_out(alerts.object_id, TEST_FRACTION, SPLIT_SEED)
    train, test = alerts[~unseen], alerts[unseen]
    check_rated(test)
    lsst_train, lsst_test = _split_lsst(arguments.lsst, arguments.schemas)
    simulated, _, kinds = simulate_cutouts(arguments.simulated, SIMULATION_SEED, "lsst", images.size)
    log.info("ZTF: %d training alerts, %d test alerts", len(train), len(test))
    log.info("LSSTCam: %d training alerts, %d test alerts", len(lsst_train), len(lsst_test))

    long = Recipe(
        arguments.steps,
        arguments.seed,
        learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        hints=HINTS.get(str(architecture.arguments.get("backbone")), ()),
    )
    short = replace(
        long,
        steps=max(1, round(TUNING_SHARE * long.steps)),
        seed=long.seed + TUNING_SEED,
        learning_rate=TUNING_RATE,
        hints=(),
    )
    checkpoints = [beside(arguments.out.with_name(f"{arguments.out.name}.{stage}")) for stage in ("distil", "tune")]
    labelled = _labelled(lsst_train, simulated, np.isin(kinds, tuple(REAL)))
    for recipe, checkpoint in zip((long, short), checkpoints, strict=True):
        network = distil(network, teacher, images, train, recipe, checkpoint, labelled)

    evaluation = evaluate(network, teacher, images, train, test) | {"dataset_sha256": data_sha256(train)}
    evaluation |= _compare_with_default(network, images, test)
    evaluation |= _evaluate_lsst(network, images, lsst_test)
    learned = (
        f"LSST: {len(lsst_train)} alerts of LSSTCam from {len(np.unique(lsst_train.seen.visit))} visits with the "
        f"survey's reliability, which is the opinion of another network, and {len(simulated)} simulated alerts with "
        "their truth. The alerts of LSSTCam are few, so read the intervals."
    )
    method = _method(bundle, origin, long, short)
    if begun:
        method = f"{begun.card.training.method} After that, the same method was applied again to the network: {method}"
    with tempfile.TemporaryDirectory(dir=arguments.out.parent) as scratch:
        made = Path(scratch) / NAME
        write_bundle(made, _describe(bundle, architecture, train, learned, method, evaluation), network)
        evaluation |= _serve_beside_default(made)
        log.info("on held-out objects: %s", evaluation)
        [card] = (part.card for part in open_bundle(made).parts)
        training = card.training.model_copy(update={"evaluation": evaluation})
        write_card(made, card.model_copy(update={"training": training}))
        archives = (*arguments.inputs, *arguments.lsst)
        record_archives(made, archives, arguments.schemas, f"survey == 'ztf' or {OF_LSSTCAM}")
        made.rename(arguments.out)
    for checkpoint in checkpoints:
        checkpoint.unlink(missing_ok=True)


def _read_card(card: Path) -> tuple[Architecture, str]:
    """Return the architecture of an encoder and the images that it learnt from.

    Raises TrainingError if the encoder has no readable card.
    """
    try:
        said = yaml.safe_load(card.read_bytes())
        return Architecture.model_validate(said["architecture"]), str(said["galaxies"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValidationError) as error:
        raise TrainingError(f"{card}: not the card of an encoder that `pretrain` wrote: {error}") from error


def _split_lsst(inputs: list[Path], schemas: str | None) -> tuple[Lsst, Lsst]:
    """Return the alerts of LSSTCam for training and for the test, which have no visit and no object in common.

    Raises DatasetError if one of the two has no reliable or no unreliable alert.
    """
    seen, raw = load_lsst(inputs, schemas)
    lsstcam = Lsst(seen, raw)[seen.of_lsstcam]
    unseen = unrelated(lsstcam.seen.visit, lsstcam.seen.object_id, SPLIT_SEED) < TEST_FOLDS
    for rows in (~unseen, unseen):
        reliable = lsstcam.reliability[rows] > 0.5
        if not reliable.any() or reliable.all():
            raise DatasetError(
                f"{', '.join(map(str, inputs))}: the {len(lsstcam)} alerts of LSSTCam are too few to have reliable and "
                "unreliable ones both for training and for the test"
            )
    return lsstcam[~unseen], lsstcam[unseen]


def _labelled(lsstcam: Lsst, simulated: NDArray[np.float32], real: NDArray[np.bool_]) -> Labelled:
    """Return the labelled alerts of LSST, and how often an image is made of each.

    `simulated`: cutouts of simulated alerts [M, 3, S, S]; `real` [M]: their truth.
    """
    return Labelled(
        np.concatenate([lsstcam.raw.cutouts, simulated]),
        np.concatenate([lsstcam.reliability, real.astype(np.float32)]),
        np.concatenate(
            [
                LSSTCAM_SHARE * chances(lsstcam.reliability, UNRELIABLE_SHARE),
                np.full(len(simulated), (1 - LSSTCAM_SHARE) / len(simulated)),
            ]
        ),
    )


def _compare_with_default(network: nn.Module, images: ImageInput, test: Alerts) -> dict[str, float | int | str]:
    """Return the accuracy of the bundle `default` on the same alerts with drb, and the differences, for the card."""
    part = open_bundle("default").part("ztf")
    default = load_network(part.card.architecture, load_file(part.directory / WEIGHTS))
    drb = published_score(test)
    rated = np.isfinite(drb)
    alerts, real = test[rated], drb[rated] > 0.5
    own = run_over(network, images, alerts)[0][:, 0].numpy()
    other = run_over(default, part.card.inputs.images, alerts)[0][:, 0].numpy()

    def measure(weight: Weights) -> dict[str, Values]:
        areas = [rank(real, logit, weight).roc_auc for logit in (own, other)]
        agreements = [weight @ ((logit > 0) == real) / weight.sum(axis=-1) for logit in (own, other)]
        return {
            "default_roc_auc": areas[1],
            "roc_auc_minus_default_roc_auc": areas[0] - areas[1],
            "default_agreement": agreements[1],
            "agreement_minus_default_agreement": agreements[0] - agreements[1],
        }

    return {"compared_with": part.card.title} | as_card(estimate(measure, alerts.object_id))


def _evaluate_lsst(network: nn.Module, images: ImageInput, test: Lsst) -> dict[str, float | int | str]:
    """Return the figures on held-out alerts of LSSTCam for the card, beside those of the signal-to-noise ratio."""
    said = {
        "": _logits(network, images, test.raw.cutouts, test.raw.cutout_box),
        "snr_": np.log(test.raw.metadata[:, test.raw.columns.index("snr")]),
    }
    night = np.array([str(visit)[:DIGITS_OF_NIGHT] for visit in test.seen.visit.tolist()])
    measure = partial(lsst_figures, test.reliability.astype(np.float64), night, said, said)
    measured: dict[str, float | int | str] = {
        "truth": "the survey's reliability > 0.5, for roc_auc and calibration; reliability itself, for spearman",
        "split": f"{TEST_FOLDS} of {FOLDS} folds of LSSTCam's alerts, seed {SPLIT_SEED}, held out from training; no "
        "visit and no object is in training and test",
        "intervals": INTERVALS.replace("objects", "visits").replace("object ", "visit "),
        "alerts": len(test),
        "visits": len(np.unique(test.seen.visit)),
        "unreliable": int((test.reliability <= 0.5).sum()),
        "default": "`default` scores LSST by the network of `rubin`, which was trained on these alerts too: compare "
        "with the figures of its own cross-validation",
    }
    measured |= as_card(estimate(measure, test.seen.visit.astype(np.str_)))
    return {f"lsst_{name}": value for name, value in measured.items()}


@torch.inference_mode()
def _logits(
    network: nn.Module, images: ImageInput, cutouts: NDArray[np.float32], box: NDArray[np.int16]
) -> NDArray[np.float64]:
    """Return the logits float64[N] of cutouts [N, 3, S, S] with boxes [N, 3, 4]."""
    parts = [
        network(torch.from_numpy(prepare_images(cutouts[start : start + BATCH], box[start : start + BATCH], images)))[0]
        for start in range(0, len(cutouts), BATCH)
    ]
    logits: NDArray[np.float64] = torch.cat(parts)[:, 0].double().numpy()
    return logits


def _serve_beside_default(bundle: Path) -> dict[str, float | int | str]:
    """Return the figures that need the written bundle, for the card, each beside that of the bundle `default`.

    They are the accuracy on simulated LSST alerts, time, memory and size.
    """
    default = open_bundle("default").part("ztf").directory
    speeds = [[measure_served(one, BATCH, threads=1) for one in (bundle, default)] for _ in range(REPETITIONS)]
    card = _evaluate_simulated(bundle)
    card["cost"] = (
        f"preprocessing and network on onnxruntime, one thread, batches of {BATCH}, medians of {REPETITIONS} processes "
        "for each network, in turn; memory is the peak of the whole process; `default` is its network for ZTF; the "
        "machine was shared"
    )
    for n, (prefix, one) in enumerate((("", bundle), ("default_", default))):
        card |= {
            f"{prefix}cpu_microseconds": round(float(np.median([pair[n].cpu_microseconds for pair in speeds])), 1),
            f"{prefix}peak_megabytes": round(float(np.median([pair[n].peak_megabytes for pair in speeds])), 1),
            f"{prefix}megabytes_on_disk": round(sum(file.stat().st_size for file in one.iterdir()) / 1e6, 2),
        }
    return card


def _evaluate_simulated(bundle: Path) -> dict[str, float | int | str]:
    """Return the figures on simulated alerts of LSST, labelled by truth, as served, beside those of `default`."""
    night = SimulatedNight(SIMULATED_TEST, TEST_SEED, "lsst", RATES)
    scorer = open_scorer([str(bundle), "default"], Runtime(engine="onnxruntime", device="cpu"))
    alerts, _ = scorer.decoder(SCHEMAS).decode(list(night))
    real = np.isin(night.kinds(alerts.alert_id), tuple(REAL))
    scores = scorer.score(alerts).columns()

    def measure(weight: Weights) -> dict[str, Values]:
        found: dict[str, Values] = {}
        for prefix, name in (("", NAME), ("default_", "default")):
            score = scores[f"{name}.real"]
            found |= {
                f"simulated_lsst_{prefix}roc_auc": rank(real, score, weight).roc_auc,
                f"simulated_lsst_{prefix}real_above_0.5": weight @ (real & (score > 0.5)) / (weight @ real),
                f"simulated_lsst_{prefix}bogus_above_0.5": weight @ (~real & (score > 0.5)) / (weight @ ~real),
            }
        return found

    card: dict[str, float | int | str] = {
        "simulated_lsst_alerts": len(alerts),
        "simulated_lsst_truth": f"truth of the simulation, all kinds equally frequent, seed {TEST_SEED}; both bundles "
        "were trained on other simulated alerts",
    }
    return card | as_card(estimate(measure, alerts.alert_id.astype(np.str_)))


def _describe(
    teacher: Part,
    architecture: Architecture,
    train: Alerts,
    learned: str,
    method: str,
    evaluation: dict[str, float | int | str],
) -> Description:
    """Return the description of the bundle for the card.

    `learned`: what was learned from alerts of LSST; `method`: how the network was trained.
    """
    described = describe(NAME, VERSION, architecture, teacher, train, method, SOURCE, evaluation)
    return described.model_copy(
        update={
            "surveys": ("ztf", "lsst"),
            "citation": f"{described.citation}; for LSST: the reliability in its alert packets, by Rubin Observatory",
            "training": described.training.model_copy(update={"data": f"{described.training.data} {learned}"}),
        }
    )


def _method(teacher: Part, origin: str, long: Recipe, short: Recipe) -> str:
    """Return how the network was trained, for the card."""
    hinted = "In the first of these two trainings, it also learns a map and the embedding of the teacher. "
    return (
        f"The encoder was pre-trained on {origin}. Then {long.steps} steps at a peak learning rate of "
        f"{long.learning_rate:g}, and {short.steps} at {short.learning_rate:g}. In each step, the network learns "
        f"{long.batch} images made on the fly from one or two real ZTF alerts, labelled by the teacher, "
        f"{teacher.card.name} of {teacher.card.source} (knowledge distillation), and {long.labelled_batch} images of "
        f"LSST alerts: {LSSTCAM_SHARE:.0%} of LSSTCam with the survey's reliability, which is never an input, the "
        f"others simulated with their truth. {hinted if long.hints else ''}AdamW, averaged weights, seed {long.seed}."
    )
