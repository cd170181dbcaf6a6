"""Trains the shipped bundle `rubin`: real/bogus and classes of LSST alerts, from images, PSF and metadata.

    python -m training train-rubin LSST_ALERTS ... --schemas DIR --detections TABLE ... --ztf ztf_alerts.tar --out rubin

The teacher is `reliability`, the score of the survey's own network; it is never an input. Few hundred alerts of LSSTCam
are at hand, so most is learnt elsewhere:

1. The image networks learn from ZTF alerts (drb), HSC's alerts (reliability) and simulated alerts (truth).
2. They are trained a little more on alerts of LSSTCam. Simulated alerts stay in each step, because the real ones have
   few bright artefacts.
3. Their mean logit is calibrated by held-out logits.
4. The class layer learns from image features, the logit and metadata.

For comparison, metadata networks learn from tens of thousands of earlier detections, which have metadata and
reliability but no images. Neither they nor their sum with the images did better, on real or simulated alerts, so `real`
depends on the images and the PSF alone. The figures on the
card come from a cross-validation in which no visit and no object is in training and test, and from simulated alerts
that were not used for training.
"""

from __future__ import annotations

import argparse
import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pyarrow import parquet
from safetensors import safe_open
from safetensors.torch import save
from scipy.special import expit
from scipy.stats import spearmanr
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from broker_filter.importers.write_bundle import write_bundle
from broker_filter.scoring.alerts import RawAlerts
from broker_filter.scoring.bundle import Architecture, Description, Outputs, Part, Training, open_bundle
from broker_filter.scoring.networks.snrnet import FEATURES, LIMIT, N_DERIVED, ImageNet, SnrNet, derive, orient
from broker_filter.simulate import LSST_RATES
from training.arguments import positive, seed
from training.atomic_write import write_whole
from training.bundles.distil import schedule
from training.bundles.rubin_data import (
    BOGUS_CLASS,
    CLASSES,
    INPUTS,
    OF_LSSTCAM,
    Detections,
    Seen,
    load_detections,
    load_lsst,
    load_ztf,
    simulate,
    simulated_classes,
)
from training.bundles.rubin_evaluation import (
    FOLDS,
    RARE,
    SPLIT_SEED,
    default_logit,
    describe_split,
    evaluate_simulated,
    figures,
    rankings,
    some_visits,
    tree_logit,
    unrelated,
)
from training.data.datasets import sha256_of
from training.data.record_distribution import record_archives
from training.data.simulated import KINDS
from training.errors import refuse_existing
from training.evaluation.bootstrap import as_card, estimate
from training.evaluation.evaluate import calibration_for_card
from training.evaluation.metrics import rank
from training.evaluation.predictions import Predictions

VERSION = "1.2"
CLASS_OF_LABEL: dict[object, int] = {"asteroid": 0, "AGN": 1, "VS": 2, "likely_bogus": BOGUS_CLASS}
"""The class of each weak label."""
CLEARLY_BOGUS = 0.3
"""An alert without another label is of class bogus if its reliability is below this value."""
IMAGES, METADATA_ALONE = (1.0, 0.0), (0.0, 1.0)
COMBINATIONS = (IMAGES, (0.8, 0.2), (0.5, 0.5), METADATA_ALONE)
"""Weights of the logits of images and metadata; the evaluation compares the best of them with images alone."""
INVERSE_L2_OF_SLOPE, INVERSE_L2 = 1.0, 0.01
"""Inverse weight of the squared coefficients of the calibration, and of the class layer."""
REAL_SHARE = 2 / 3
"""Weight of real alerts in a class. With half, fewer of the real active nuclei are told from variable stars."""
ITERATIONS = 2000
HIDDEN = 48
"""Units of each hidden layer of a metadata network."""
CHUNK = 128
"""Alerts per run of a network over many alerts."""
DIGITS_OF_NIGHT = 8
"""Digits of a visit id that are its date."""
MEMBERS = 3
"""Number of image networks and of metadata networks that are averaged."""
ORIENTATIONS = 1
"""Number of orientations of an image whose logits are averaged. More cost more and gained nothing in the
cross-validation on 176 alerts of LSSTCam: ROC AUC 0.919 for one, 0.922 for two, 0.919 for four."""
SIMULATED, SIMULATION_SEED = 4000, 11
EVALUATED, EVALUATION_SEED = 1500, 2027
"""Number and seed of the simulated alerts of the evaluation, whose kinds are as frequent as in a simulated night."""
SHARES = (0.25, 0.5, 0.75)
"""Shares of the visits for which the evaluation of the image networks is repeated, which learn from them alone."""
FLIPS = 8
TRIALS = 7
"""Number of tunings that were compared by cross-validation before this recipe was taken."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Recipe:
    """The hyperparameters of the training.

    They were chosen by cross-validations on the same alerts, so figures on the card are optimistic.
    """

    seed: int
    steps: int
    """Steps of the training that precedes LSSTCam's alerts."""
    per_step: tuple[int, int, int] = (48, 24, 48)
    """Images of ZTF, HSC and the simulation in a step."""
    bogus_share: float = 0.4
    """Fraction of ZTF's images, and of the detections, that are bogus."""
    learning_rate: float = 3e-3
    weight_decay: float = 2e-2
    kind_weight: float = 0.5
    """Weight of the kinds of simulated alerts in the loss."""
    shared_weight: float = 0.4
    """Weight, in the loss, of the output that is later trained on LSSTCam, for ZTF and simulated alerts."""
    tuning_steps: int = 120
    tuning_images: int = 64
    tuning_simulated: int = 48
    """Simulated images in a step of the tuning, so that what was learnt of bright artefacts is kept."""
    simulated_weight: float = 0.15
    """Weight of the simulated images in the loss of the tuning. With a larger weight, faint alerts are scored less like
    the survey does, because the truth of a simulated alert and the survey's reliability differ."""
    tuning_rate: float = 1e-3
    metadata_steps: int = 600
    metadata_rows: int = 256
    metadata_rate: float = 4e-3
    metadata_decay: float = 1e-2
    warm_up: float = 0.06
    noise: float = 0.5
    """Largest standard deviation of the noise added to an image, in units of the pixels' noise."""
    shift: int = 1
    """Largest shift of an image in pixels."""


class Learner(nn.Module):
    """An image network with outputs for each source of labels: LSSTCam, ZTF, HSC, simulated alerts and their kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.net = ImageNet()
        self.real_head = nn.Linear(FEATURES, 4)
        self.kind_head = nn.Linear(FEATURES, len(KINDS))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return real/bogus logits [N, 4] for LSSTCAM, ZTF, HSC and SIMULATION, and logits of KINDS [N, K]."""
        features = self.net(images)
        return self.real_head(features), self.kind_head(features)

    def lsstcam(self, images: Tensor) -> Tensor:
        """Return the real/bogus logits [N] for LSSTCam."""
        return self.real_head(self.net(images))[:, LSSTCAM]  # type: ignore[no-any-return]


LSSTCAM, ZTF, HSC, SIMULATION = range(4)
"""The outputs of `Learner.real_head`."""


class MetadataNet(nn.Module):
    """Features of `derive` [N, K] -> real/bogus logit [N, 1]. Features are standardised and clipped first.

    It is not part of the bundle: the evaluation compares the images with metadata.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, dropout: float = 0.1, noise: float = 0.05) -> None:
        """`noise`: standard deviation of the noise that is added to the standardised features during training."""
        super().__init__()
        self.noise = noise
        self.register_buffer("mean", torch.zeros(N_DERIVED))
        self.register_buffer("deviation", torch.ones(N_DERIVED))
        self.layers = nn.Sequential(
            nn.Linear(N_DERIVED, HIDDEN),
            nn.SiLU(),
            nn.Dropout(dropout),
            nn.Linear(HIDDEN, HIDDEN),
            nn.SiLU(),
            nn.Dropout(dropout),
            nn.Linear(HIDDEN, 1),
        )

    def forward(self, derived: Tensor) -> Tensor:
        """Return the logit [N, 1]."""
        features = self.standardised(derived)
        if self.training:
            features = features + self.noise * torch.randn_like(features)
        return self.layers(features)  # type: ignore[no-any-return]

    def standardised(self, derived: Tensor) -> Tensor:
        """Return the features in units of their standard deviations from the mean, clipped to LIMIT."""
        return ((derived - self.mean) / self.deviation).clamp(-LIMIT, LIMIT)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `train-rubin`."""
    parser.add_argument("inputs", metavar="INPUT", nargs="+", type=Path, help="LSST alerts: files, folders, archives")
    parser.add_argument("--schemas", help="schema registry, or directory of schemas, of alerts in wire format")
    parser.add_argument(
        "--detections", nargs="+", type=Path, required=True, help="Parquet files of diaSources, or of alerts with them"
    )
    parser.add_argument("--labels", type=Path, help="Parquet file with diaSourceId and weak_class, for the classes")
    parser.add_argument("--ztf", nargs="+", type=Path, required=True, help="ZTF alerts: files, folders, archives")
    parser.add_argument("--teacher", default="default", help="bundle that scores ZTF alerts without drb")
    parser.add_argument("--out", required=True, type=Path, help="directory of the new bundle")
    parser.add_argument("--checkpoint", type=Path, help="directory for trained parts (default: OUT.parts, beside OUT)")
    parser.add_argument("--curve", action="store_true", help="evaluate networks that learnt from fewer visits as well")
    parser.add_argument("--steps", type=positive, default=600, help="steps before LSSTCam (default: %(default)s)")
    parser.add_argument("--seed", type=seed, default=1, help="seed of weights and images (default: %(default)s)")
    parser.add_argument("--threads", type=positive, default=1, help="threads of torch (default: %(default)s)")


def run(arguments: argparse.Namespace) -> None:
    """Train, evaluate and write the bundle. Raises DatasetError before training if the input cannot be used."""
    refuse_existing(arguments.out)
    torch.set_num_threads(arguments.threads)
    default = open_bundle(arguments.teacher).part("ztf")
    detections = load_detections(arguments.detections)
    lsst, raw = load_lsst(arguments.inputs, arguments.schemas)
    ztf, simulated = load_ztf(arguments.ztf, default), simulate(SIMULATED, SIMULATION_SEED)
    on_sky = lsst.of_lsstcam
    lsstcam, hsc = lsst[on_sky], lsst[lsst.of_hsc]
    log.info(
        "%d alerts of LSSTCam, %d of HSC, %d of ZTF; %d earlier detections",
        *(len(lsstcam), len(hsc), len(ztf), len(detections)),
    )

    recipe = Recipe(seed=arguments.seed, steps=arguments.steps)
    parts = arguments.checkpoint or arguments.out.with_name(f"{arguments.out.name}.parts")
    begun = []
    for member in range(MEMBERS):
        train = partial(pretrain, ztf, hsc, simulated, recipe, member)
        learner = Learner()
        learner.load_state_dict(resumed(parts / f"member_{member}.safetensors", recipe, train))
        begun.append(learner.eval())
    fold = unrelated(lsstcam.visit, lsstcam.object_id, SPLIT_SEED)
    logits = np.empty((len(lsstcam), 2))
    for one in range(FOLDS):
        cross = partial(held_out_logits, lsstcam, simulated, detections, begun, fold == one, recipe)
        logits[fold == one] = resumed(parts / f"fold_{one}.safetensors", recipe, cross)["logits"].numpy()
    evaluation = describe_split(lsstcam, detections) | evaluate(lsstcam, raw[on_sky], fold, logits, default)
    if arguments.curve:
        make = partial(learning_curve, lsstcam, simulated, begun, fold, recipe)
        fewer = resumed(parts / "curve.safetensors", recipe, make)
        evaluation |= evaluate_fewer(lsstcam, {name: logit.numpy() for name, logit in fewer.items()})
    log.info("held-out: %s", evaluation)

    network = untrained().eval()
    final = partial(assemble, lsstcam, simulated, detections, begun, recipe)
    network.load_state_dict(resumed(parts / "network.safetensors", recipe, final))
    weights, bias = calibrate(logits, lsstcam.real.double().numpy(), IMAGES)
    with torch.no_grad():
        network.calibration.weight.fill_(weights[0])
        network.calibration.bias.fill_(bias)
    evaluation |= learn_classes(network, lsst, simulated, read_classes(arguments.labels, lsst))
    unseen = simulate(EVALUATED, EVALUATION_SEED, LSST_RATES)
    evaluation |= evaluate_simulated(unseen, score(network, unseen))
    evaluation |= {"dataset_sha256": sha256_of(lsstcam.alert_id, lsstcam.images.numpy(), lsstcam.metadata.numpy())}
    write_bundle(arguments.out, describe(lsstcam, hsc, ztf, detections, recipe, evaluation), network.eval())
    record_archives(arguments.out, arguments.inputs, arguments.schemas, OF_LSSTCAM)


def evaluate(
    lsstcam: Seen,
    raw: RawAlerts,
    fold: NDArray[np.int64],
    logits: NDArray[np.float64],
    default: Part,
) -> dict[str, float | int | str]:
    """Return the figures for alerts of LSSTCam, beside those of baselines, for the card.

    `logits` [N, 2] are held-out logits of images and metadata.
    """
    reliability = lsstcam.real.double().numpy()
    choices: dict[str, Sequence[float] | None] = {"": IMAGES, "joined_": None, "metadata_only_": METADATA_ALONE}
    both = {name: held_out(logits, reliability, fold, weights) for name, weights in choices.items()}
    said = {name: combined for name, (combined, _) in both.items()} | {
        "snr_": raw.metadata[:, raw.columns.index("snr")],
        "tree_": tree_logit(lsstcam, fold),
        "default_": default_logit(default, raw),
    }
    night = np.array([str(visit)[:DIGITS_OF_NIGHT] for visit in lsstcam.visit.tolist()])
    calibrated = {name: logit for name, (_, logit) in both.items()}
    measure = partial(figures, reliability, night, said, calibrated)
    visit = lsstcam.visit.astype(np.str_)
    return as_card(estimate(measure, visit)) | calibration_for_card(
        Predictions(
            ("unreliable", "real"),
            lsstcam.alert_id,
            visit,  # resampled like objects
            np.full(len(visit), np.nan),
            (reliability > 0.5).astype(np.int64),
            expit(calibrated[""])[:, None].astype(np.float32),
            threshold=0.5,
        )
    )


def evaluate_fewer(lsstcam: Seen, logits: Mapping[str, NDArray[np.float64]]) -> dict[str, float | int | str]:
    """Return the figures, for the card, of the logits [N] of networks that learnt from fewer visits, by their names."""
    measure = partial(rankings, lsstcam.real.double().numpy(), {f"{name}_": logit for name, logit in logits.items()})
    return as_card(estimate(measure, lsstcam.visit.astype(np.str_)))


def augment(images: Tensor, recipe: Recipe, rng: np.random.Generator) -> Tensor:
    """Return images [N, 4, S, S] in one random orientation, shifted, with noise added to the three cutouts.

    The noise is added to pixels in units of their noise, whose asinh the images are. Exponentials and logarithms, and
    an image's channels next to each other in memory, make a step of training 1.6 times as fast as `sinh`, `asinh` and
    the usual order.
    """
    images = orient(images, FLIPS)[int(rng.integers(FLIPS))]
    dy, dx = rng.integers(-recipe.shift, recipe.shift + 1, 2).tolist()
    images = images.roll((dy, dx), (-2, -1))
    cutouts, psf = images[:, :3], images[:, 3:]
    noise = torch.randn_like(cutouts) * (recipe.noise * torch.rand(len(images), 1, 1, 1))
    growth = cutouts.exp()
    noisy = (growth - 1 / growth) / 2 + noise  # sinh(cutouts) + noise
    stretched = (noisy.abs() + (noisy.square() + 1).sqrt()).log().copysign(noisy)  # asinh
    return torch.cat([stretched, psf], dim=1).contiguous(memory_format=torch.channels_last)


def pretrain(ztf: Seen, hsc: Seen, simulated: Seen, recipe: Recipe, member: int) -> dict[str, Tensor]:
    """Return the state of an image network that has learnt from everything but LSSTCam."""
    torch.manual_seed(recipe.seed * 1000 + member)
    rng = np.random.default_rng([recipe.seed, member])
    learner = Learner().train()
    optimizer = torch.optim.AdamW(learner.parameters(), weight_decay=recipe.weight_decay)
    of_ztf = chances(ztf.real.numpy(), recipe.bogus_share)
    kind = torch.from_numpy(simulated.kind)
    n_ztf, n_hsc, n_simulated = recipe.per_step
    for step in range(recipe.steps):
        z = torch.from_numpy(rng.choice(len(ztf), n_ztf, p=of_ztf))
        h, s = (torch.from_numpy(rng.integers(len(one), size=n)) for one, n in ((hsc, n_hsc), (simulated, n_simulated)))
        images = torch.cat([ztf.images[z], hsc.images[h], simulated.images[s]])
        every_real, every_kind = learner(augment(images, recipe, rng))
        real, kinds = every_real.split(recipe.per_step), every_kind[-n_simulated:]
        of_sky, of_hsc, of_truth = ztf.real[z], hsc.real[h], simulated.real[s]
        loss = (
            binary_cross_entropy_with_logits(real[0][:, ZTF], of_sky)
            + binary_cross_entropy_with_logits(real[1][:, HSC], of_hsc)
            + binary_cross_entropy_with_logits(real[2][:, SIMULATION], of_truth)
            + recipe.kind_weight * cross_entropy(kinds, kind[s])
            + recipe.shared_weight * binary_cross_entropy_with_logits(real[0][:, LSSTCAM], of_sky)
            + recipe.shared_weight * binary_cross_entropy_with_logits(real[2][:, LSSTCAM], of_truth)
        )
        take_step(optimizer, loss, recipe.learning_rate * schedule(step / recipe.steps, recipe.warm_up))
        if (step + 1) % 100 == 0:
            log.info("member %d, step %d of %d: loss %.3f", member, step + 1, recipe.steps, loss.item())
    return learner.state_dict()


def chances(real: NDArray[np.float32], bogus_share: float) -> NDArray[np.float64]:
    """Return probabilities [N] to draw each alert, of which those with real < 0.5 have a total of `bogus_share`."""
    bogus = real < 0.5
    chance: NDArray[np.float64] = np.where(bogus, bogus_share / bogus.sum(), (1 - bogus_share) / (~bogus).sum())
    chance /= chance.sum()
    return chance


def take_step(optimizer: torch.optim.Optimizer, loss: Tensor, learning_rate: float) -> None:
    """Change the parameters once."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def tune(begun: Learner, lsstcam: Seen, simulated: Seen, recipe: Recipe, member: int) -> Learner:
    """Return the network after a short training on alerts of LSSTCam and simulated alerts.

    Batch normalisation keeps its statistics.
    """
    torch.manual_seed(recipe.seed * 1000 + member)
    rng = np.random.default_rng([recipe.seed, member, 1])
    learner = copy.deepcopy(begun).train()
    for layer in learner.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eval()
    optimizer = torch.optim.AdamW(learner.parameters(), weight_decay=recipe.weight_decay)
    for step in range(recipe.tuning_steps):
        n, s = (
            torch.from_numpy(rng.integers(len(one), size=size))
            for one, size in ((lsstcam, recipe.tuning_images), (simulated, recipe.tuning_simulated))
        )
        images = torch.cat([lsstcam.images[n], simulated.images[s]])
        logit = learner.lsstcam(augment(images, recipe, rng))
        loss = binary_cross_entropy_with_logits(logit[: len(n)], lsstcam.real[n])
        loss = loss + recipe.simulated_weight * binary_cross_entropy_with_logits(logit[len(n) :], simulated.real[s])
        take_step(optimizer, loss, recipe.tuning_rate * schedule(step / recipe.tuning_steps, 0))
    return learner.eval()


def learn_metadata(detections: Detections, rows: NDArray[np.bool_], recipe: Recipe, member: int) -> MetadataNet:
    """Return a metadata network that has learnt from the detections in `rows` bool[N]."""
    torch.manual_seed(recipe.seed * 1000 + member)
    rng = np.random.default_rng([recipe.seed, member, 2])
    chosen = torch.from_numpy(rows)
    derived, real = derive(detections.metadata[chosen]), detections.real[chosen]
    network = MetadataNet().train()
    network.mean.copy_(derived.mean(dim=0))
    network.deviation.copy_(derived.std(dim=0) + SMALLEST_DEVIATION)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=recipe.metadata_decay)
    cumulative = np.cumsum(chances(real.numpy(), recipe.bogus_share))
    for step in range(recipe.metadata_steps):
        drawn = np.searchsorted(cumulative, rng.random(recipe.metadata_rows)).clip(max=len(real) - 1)
        row = torch.from_numpy(drawn)
        loss = binary_cross_entropy_with_logits(network(derived[row])[:, 0], real[row])
        take_step(optimizer, loss, recipe.metadata_rate * schedule(step / recipe.metadata_steps, 0))
    return network.eval()


SMALLEST_DEVIATION = 0.05
"""Added to the standard deviation of a feature, so that a flag that is almost always 0 does not become huge."""


def resumed(part: Path, recipe: Recipe | str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors in the file `part` if the same recipe wrote it, else make them and write the file."""
    if part.exists():
        with safe_open(part, "pt") as file:
            if (file.metadata() or {}).get("recipe") == repr(recipe):
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    made = make()
    part.parent.mkdir(parents=True, exist_ok=True)
    write_whole(part, save(made, {"recipe": repr(recipe)}))
    return made


@torch.inference_mode()
def image_logit(learner: Learner, images: Tensor) -> NDArray[np.float64]:
    """Return the real/bogus logits float64[N] of an image network, averaged over the orientations."""
    views = torch.stack([learner.lsstcam(view) for view in orient(images, ORIENTATIONS)])
    logit: NDArray[np.float64] = views.mean(dim=0).double().numpy()
    return logit


@torch.inference_mode()
def metadata_logit(network: MetadataNet, metadata: Tensor) -> NDArray[np.float64]:
    """Return the real/bogus logits float64[N] of a metadata network."""
    logit: NDArray[np.float64] = network(derive(metadata))[:, 0].double().numpy()
    return logit


def held_out_logits(
    lsstcam: Seen,
    simulated: Seen,
    detections: Detections,
    begun: Sequence[Learner],
    test: NDArray[np.bool_],
    recipe: Recipe,
) -> dict[str, Tensor]:
    """Return the held-out logits of the M alerts of `test` bool[N], by name.

    `logits` float64[M, 2]: mean logits of images and of metadata, by networks that saw no alert of the same visits or
    objects.
    """
    train, unseen = lsstcam[~test], lsstcam[test]
    rows = ~np.isin(detections.visit, unseen.visit) & ~np.isin(detections.object_id, unseen.object_id)
    logits = np.zeros((len(unseen), 2))
    for member, learner in enumerate(begun):
        logits[:, 0] += image_logit(tune(learner, train, simulated, recipe, member), unseen.images) / len(begun)
        network = learn_metadata(detections, rows, recipe, member)
        logits[:, 1] += metadata_logit(network, unseen.metadata) / len(begun)
    log.info("%d held-out alerts of %d visits", len(unseen), len(np.unique(unseen.visit)))
    return {"logits": torch.from_numpy(logits)}


def learning_curve(
    lsstcam: Seen, simulated: Seen, begun: Sequence[Learner], fold: NDArray[np.int64], recipe: Recipe
) -> dict[str, Tensor]:
    """Return mean held-out logits float64[N] of image networks that learnt from each of SHARES of the other visits."""
    found = {f"images_of_{100 * share:.0f}_percent_of_visits": np.zeros(len(lsstcam)) for share in SHARES}
    for share, logit in zip(SHARES, found.values(), strict=True):
        for one in range(FOLDS):
            test = fold == one
            train = lsstcam[~test]
            some = train[some_visits(train.visit, share, SPLIT_SEED)]
            for member, learner in enumerate(begun):
                tuned = tune(learner, some, simulated, recipe, member)
                logit[test] += image_logit(tuned, lsstcam.images[test]) / len(begun)
        log.info("%.0f %% of the visits: done", 100 * share)
    return {name: torch.from_numpy(logit) for name, logit in found.items()}


def calibrate(
    logits: NDArray[np.float64], reliability: NDArray[np.float64], weights: Sequence[float] | None = None
) -> tuple[NDArray[np.float64], float]:
    """Return the weights [2] and the bias that make calibrated logits of held-out `logits` [N, 2].

    `weights`: a combination; by default, the one of COMBINATIONS whose ranks are most like those of `reliability` [N].
    """
    if weights is None:
        weights = max(COMBINATIONS, key=lambda one: spearmanr(logits @ one, reliability).statistic)
    combined = logits @ np.array(weights)
    fitted = LogisticRegression(C=INVERSE_L2_OF_SLOPE).fit(combined[:, None], reliability > 0.5)
    return np.array(weights) * fitted.coef_[0, 0], float(fitted.intercept_[0])


def held_out(
    logits: NDArray[np.float64],
    reliability: NDArray[np.float64],
    fold: NDArray[np.int64],
    weights: Sequence[float] | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the combined and the calibrated logits, both float64[N].

    For each fold, the combination and its calibration are those of the other folds.
    """
    combined, calibrated = np.empty(len(logits)), np.empty(len(logits))
    for one in np.unique(fold).tolist():
        scaled, bias = calibrate(logits[fold != one], reliability[fold != one], weights)
        combined[fold == one] = logits[fold == one] @ (scaled / scaled.sum())
        calibrated[fold == one] = logits[fold == one] @ scaled + bias
    return combined, calibrated


def untrained() -> SnrNet:
    """Return the network with random weights."""
    return SnrNet(members=MEMBERS, classes=len(CLASSES), orientations=ORIENTATIONS)


def assemble(
    lsstcam: Seen, simulated: Seen, detections: Detections, begun: Sequence[Learner], recipe: Recipe
) -> dict[str, Tensor]:
    """Return the state of the network that has learnt from all alerts; its last layers are untrained."""
    network = untrained()
    derived = derive(detections.metadata)
    network.mean.copy_(derived.mean(dim=0))
    network.deviation.copy_(derived.std(dim=0) + SMALLEST_DEVIATION)
    for member, learner in enumerate(begun):
        tuned = tune(learner, lsstcam, simulated, recipe, member)
        network.image_nets[member].load_state_dict(tuned.net.state_dict())
        with torch.no_grad():
            head = network.image_heads[member]
            assert isinstance(head, nn.Linear)
            head.weight.copy_(tuned.real_head.weight[LSSTCAM : LSSTCAM + 1])
            head.bias.copy_(tuned.real_head.bias[LSSTCAM : LSSTCAM + 1])
    return network.state_dict()


def read_classes(table: Path | None, lsst: Seen) -> NDArray[np.int64]:
    """Return the class of each alert of LSSTCam, int64[N], -1 where it is unknown.

    An alert without a class is bogus if its reliability is below CLEARLY_BOGUS. Alerts of HSC have no class: most of
    those with a label are bogus, so the layer would learn to recognise the camera.
    """
    classes = np.where(lsst.of_lsstcam & (lsst.real.numpy() < CLEARLY_BOGUS), BOGUS_CLASS, -1)
    if table is None:
        return classes
    rows = parquet.read_table(table, columns=["diaSourceId", "weak_class"]).to_pydict()
    named = dict(zip(rows["diaSourceId"], rows["weak_class"], strict=True))
    for n, alert_id in enumerate(lsst.alert_id.tolist()):
        classes[n] = CLASS_OF_LABEL.get(named.get(alert_id), classes[n])
    return np.where(lsst.of_lsstcam, classes, -1)


def learn_classes(
    network: SnrNet, lsst: Seen, simulated: Seen, weak: NDArray[np.int64]
) -> dict[str, float | int | str]:
    """Fit the class layer, a multinomial logistic regression, and return its figures for the card.

    It learns from real alerts with a weak label `weak` int64[N], and from simulated alerts with their truth.
    """
    known = weak >= 0
    real = lsst[known]
    truth = simulated_classes(simulated)
    told = [class_evidence(network, one) for one in (real, simulated)]
    inputs, label = np.concatenate(told), np.concatenate([weak[known], truth])
    is_real = np.arange(len(label)) < len(real)
    fold = np.concatenate(
        [
            unrelated(real.visit, real.object_id, SPLIT_SEED),
            np.random.default_rng(SPLIT_SEED).integers(FOLDS, size=len(simulated)),
        ]
    )
    scores = np.empty((len(label), len(CLASSES)))
    for one in range(FOLDS):
        train = fold != one
        fitted = fit_classes(inputs[train], label[train], is_real[train])
        scores[fold == one] = fitted.decision_function(inputs[fold == one])
    fitted = fit_classes(inputs, label, is_real)
    with torch.no_grad():
        network.classes.weight.copy_(torch.from_numpy(fitted.coef_))
        network.classes.bias.copy_(torch.from_numpy(fitted.intercept_))
    figures: dict[str, float | int | str] = {
        "classes_truth": f"weak labels of LSSTCam's alerts (catalogue matches; bogus: reliability < {CLEARLY_BOGUS}); "
        f"the truth of simulated alerts. No real alert is labelled as a transient. {FOLDS} folds; the networks below "
        "the class layer saw all alerts of LSSTCam with their reliability, not their classes",
    }
    for where, rows in (("real", is_real), ("simulated", ~is_real)):
        log_odds_of = torch.from_numpy(scores[rows]).log_softmax(dim=1).numpy()
        for c, name in enumerate(CLASSES):
            own = label[rows] == c
            if min(own.sum(), (~own).sum()) >= RARE:
                area = rank(own, log_odds_of[:, c], np.ones(len(own))).roc_auc
                figures |= {f"{name}_{where}_alerts": int(own.sum()), f"{name}_{where}_roc_auc": round(float(area), 4)}
        for c, name in enumerate(CLASSES):
            if (own := label[rows] == c).sum() >= RARE:
                figures[f"{name}_{where}_recall"] = round(float((scores[rows][own].argmax(axis=1) == c).mean()), 4)
    log.info("classes: %s", figures)
    return figures


@torch.inference_mode()
def score(network: SnrNet, seen: Seen) -> NDArray[np.float64]:
    """Return the logits of the network, float64[N, 1 + classes]."""
    parts = [
        network(images[:, :3], metadata, images[:, 3:])[0]
        for images, metadata in zip(torch.split(seen.images, CHUNK), torch.split(seen.metadata, CHUNK), strict=True)
    ]
    return torch.cat(parts).double().numpy()


@torch.inference_mode()
def class_evidence(network: SnrNet, seen: Seen) -> NDArray[np.float64]:
    """Return the inputs of the class layer, float64[N, D]."""
    parts = [
        network.evidence(images[:, :3], metadata, images[:, 3:])[2]
        for images, metadata in zip(torch.split(seen.images, CHUNK), torch.split(seen.metadata, CHUNK), strict=True)
    ]
    return torch.cat(parts).double().numpy()


def fit_classes(
    inputs: NDArray[np.float64], label: NDArray[np.int64], is_real: NDArray[np.bool_]
) -> LogisticRegression:
    """Return the fitted regression.

    Every class has the same weight. Where it has real and simulated alerts, the real ones have REAL_SHARE of it.
    """
    group = 2 * label + is_real
    _, of_alert, size = np.unique(group, return_inverse=True, return_counts=True)
    weight = np.where(is_real, REAL_SHARE, 1 - REAL_SHARE) / size[of_alert]
    by_class = np.bincount(label, weight)
    weight /= by_class[label]
    return LogisticRegression(C=INVERSE_L2, max_iter=ITERATIONS).fit(inputs, label, weight * len(label) / len(CLASSES))


def describe(
    lsstcam: Seen,
    hsc: Seen,
    ztf: Seen,
    detections: Detections,
    recipe: Recipe,
    evaluation: dict[str, float | int | str],
) -> Description:
    """Return the bundle's description for the card."""
    return Description(
        name="rubin",
        version=VERSION,
        task="real/bogus and classes of LSST alerts",
        surveys=("lsst",),
        inputs=INPUTS,
        outputs=Outputs(labels=("real", *CLASSES), activation="sigmoid", thresholds={"real": 0.5}),
        architecture=Architecture(
            name="snrnet",
            arguments={"members": MEMBERS, "classes": len(CLASSES), "orientations": ORIENTATIONS},
        ),
        licence="BSD-3-Clause",
        source="training/bundles/train_rubin.py of broker-filter",
        citation="Teacher: the reliability in LSST's alert packets, by Rubin Observatory",
        training=Training(
            method=f"{MEMBERS} networks, averaged, give `real` from images and PSF alone. They learnt "
            f"from ZTF (drb), HSC (reliability) and simulated alerts (truth) in {recipe.steps} steps, then from "
            f"{recipe.tuning_images} images of LSSTCam (reliability) and {recipe.tuning_simulated} simulated ones "
            f"(truth; weight {recipe.simulated_weight:g}) in each of {recipe.tuning_steps} steps. The "
            f"calibration of the score was fitted to held-out logits. For comparison, {MEMBERS} networks learnt from "
            f"metadata of earlier detections of alerts' objects (reliability) in {recipe.metadata_steps} steps; "
            f"`joined` is the best of {len(COMBINATIONS)} weighted "
            "sums of both logits, by the rank correlation with reliability in the training folds. With metadata in the "
            "sum, more simulated artefacts were called real. The reliability in a packet is the target and "
            "never an input, and no input is derived from it. The classes are a multinomial logistic regression on "
            "image features, the real/bogus logit and metadata, for equally common classes. The recipe was chosen by "
            "cross-validations on the same alerts, so the figures are optimistic: about 40 models were compared for "
            f"version 1.0, {TRIALS} tunings with simulated alerts for this version. Seed {recipe.seed}.",
            data=f"{len(lsstcam)} alerts of LSSTCam from {len(np.unique(lsstcam.visit))} visits, {len(hsc)} of HSC, "
            f"{len(ztf)} of ZTF, {SIMULATED} simulated (another {EVALUATED} were held out), and {len(detections)} "
            "earlier detections of LSSTCam without images. Limits: the teacher is the opinion of another network, so "
            "`real` is the probability that the survey's network says real, not that an astronomer does. "
            "Nearly all unreliable alerts are of two nights (2025-09-05 and 2025-12-31); alerts since March 2026 were "
            "published only above a reliability of 0.5. How well bright artefacts are found was measured on simulated "
            "alerts alone. `transient` was learnt from simulated alerts alone. Alerts without variance or PSF are "
            "scored with a noise estimated from the pixels and a Gaussian PSF of 1 arcsec, which was not evaluated.",
            evaluation=evaluation,
        ),
    )
