"""Trains the shipped bundle `rubin`: real/bogus and classes of LSST alerts, from images, PSF and metadata.

    python -m training train-rubin LSST_ALERTS ... --schemas DIR --detections TABLE ... --ztf ztf_alerts.tar --out rubin

The teacher is `reliability`, the score of the survey's own network; it is never an input. Few hundred alerts of LSSTCam
are at hand, so most is learnt elsewhere:

1. The image networks learn from ZTF alerts (drb), HSC's alerts (reliability) and simulated alerts (truth).
2. The metadata networks learn from tens of thousands of earlier detections, which have metadata and reliability but no
   images.
3. The image networks are trained a little more on alerts of LSSTCam.
4. Two weights and a bias join both logits. They are fitted to held-out logits, so the probability is calibrated.

The figures on the card come from a cross-validation in which no visit and no object is in training and test.
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
from safetensors.torch import load_file, save
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.stats import rankdata
from sklearn.ensemble import ExtraTreesRegressor
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from broker_filter.importers.write_bundle import write_bundle
from broker_filter.scoring.alerts import RawAlerts
from broker_filter.scoring.bundle import WEIGHTS, Architecture, Description, Outputs, Part, Training, open_bundle
from broker_filter.scoring.networks import load_network
from broker_filter.scoring.networks.snrnet import FEATURES, ImageNet, MetadataNet, SnrNet, derive, orient
from broker_filter.scoring.preprocess import prepare_images
from training.arguments import positive, seed
from training.atomic_write import write_whole
from training.bundles.distil import schedule
from training.bundles.rubin_data import INPUTS, KINDS, Detections, Seen, load_detections, load_lsst, load_ztf, simulate
from training.data.datasets import sha256_of
from training.errors import refuse_existing
from training.evaluation.bootstrap import INTERVALS, as_card, estimate
from training.evaluation.calibration import logit_of, slope_and_intercept
from training.evaluation.metrics import Values, Weights, rank

VERSION = "1.0"
CLASSES = ("asteroid", "agn", "variable", "transient", "bogus")
CLASS_OF_KIND = {"asteroid": 0, "agn": 1, "variable_star": 2, "supernova": 3}
"""The class of each kind of simulated alert that is real; all other kinds are bogus."""
BOGUS = CLASSES.index("bogus")
CLASS_OF_LABEL: dict[object, int] = {"asteroid": 0, "AGN": 1, "VS": 2, "likely_bogus": BOGUS}
"""The class of each weak label."""
CLEARLY_BOGUS = 0.3
"""An alert without another label is of class bogus if its reliability is below this value."""
INVERSE_L2_OF_JOIN, INVERSE_L2 = 1.0, 0.01
"""Inverse weight of the squared coefficients of the join of both logits, and of the class layer."""
ITERATIONS = 2000
CHUNK = 128
"""Alerts per run of a network over many alerts."""
DIGITS_OF_NIGHT = 8
"""Digits of a visit id that are its date."""
MEMBERS = 3
"""Number of image networks and of metadata networks that are averaged."""
ORIENTATIONS = 4
"""Number of orientations of an image whose logits are averaged. Eight would cost twice as much."""
SIMULATED = 1500
SIMULATION_SEED = 5
FOLDS = 6
SPLIT_SEED = 2026
TREES = 300
RARE = 5
"""Smallest number of alerts of each kind in a night whose ROC AUC is given."""
FLIPS = 8

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


class _Learner(nn.Module):
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
"""The outputs of `_Learner.real_head`."""


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
    parser.add_argument("--steps", type=positive, default=400, help="steps before LSSTCam (default: %(default)s)")
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
        learner = _Learner()
        learner.load_state_dict(resumed(parts / f"member_{member}.safetensors", recipe, train))
        begun.append(learner.eval())
    real = lsstcam.real.numpy() > 0.5
    fold = unrelated(lsstcam.visit, lsstcam.object_id, SPLIT_SEED)
    logits = np.empty((len(lsstcam), 2))
    for one in range(FOLDS):
        cross = partial(held_out_logits, lsstcam, detections, begun, fold == one, recipe)
        logits[fold == one] = resumed(parts / f"fold_{one}.safetensors", recipe, cross)["logits"].numpy()
    said = {
        "": joined(logits, real, fold),
        "image_only_": joined(logits[:, :1], real, fold),
        "metadata_only_": joined(logits[:, 1:], real, fold),
        "snr_": np.log(raw.metadata[on_sky, raw.columns.index("snr")]),
        "tree_": tree_logit(lsstcam, fold),
        "default_": default_logit(default, raw[on_sky]),
    }
    night = np.array([str(visit)[:DIGITS_OF_NIGHT] for visit in lsstcam.visit.tolist()])
    measure = partial(figures, lsstcam.real.double().numpy(), night, said)
    evaluation = describe_split(lsstcam, detections, real) | as_card(estimate(measure, lsstcam.visit.astype(np.str_)))
    log.info("held-out: %s", evaluation)

    network = untrained().eval()
    final = partial(assemble, lsstcam, detections, begun, recipe)
    network.load_state_dict(resumed(parts / "network.safetensors", recipe, final))
    weights, bias = join(logits, real)
    with torch.no_grad():
        network.head.weight.copy_(torch.from_numpy(weights)[None])
        network.head.bias.fill_(bias)
    evaluation |= learn_classes(network, lsst, simulated, read_classes(arguments.labels, lsst))
    evaluation |= {"dataset_sha256": sha256_of(lsstcam.alert_id, lsstcam.images.numpy(), lsstcam.metadata.numpy())}
    write_bundle(arguments.out, describe(lsstcam, hsc, ztf, detections, recipe, evaluation), network.eval())


def augment(images: Tensor, recipe: Recipe, rng: np.random.Generator) -> Tensor:
    """Return images [N, 4, S, S] in one random orientation, shifted, with noise added to the three cutouts."""
    images = orient(images, FLIPS)[int(rng.integers(FLIPS))]
    dy, dx = rng.integers(-recipe.shift, recipe.shift + 1, 2).tolist()
    images = images.roll((dy, dx), (-2, -1))
    cutouts, psf = images[:, :3], images[:, 3:]
    noise = torch.randn_like(cutouts) * (recipe.noise * torch.rand(len(images), 1, 1, 1))
    return torch.cat([(cutouts.sinh() + noise).asinh(), psf], dim=1)


def pretrain(ztf: Seen, hsc: Seen, simulated: Seen, recipe: Recipe, member: int) -> dict[str, Tensor]:
    """Return the state of an image network that has learnt from everything but LSSTCam."""
    torch.manual_seed(recipe.seed * 1000 + member)
    rng = np.random.default_rng([recipe.seed, member])
    learner = _Learner().train()
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


def tune(begun: _Learner, lsstcam: Seen, recipe: Recipe, member: int) -> _Learner:
    """Return the network after a short training on alerts of LSSTCam. Batch normalisation keeps its statistics."""
    torch.manual_seed(recipe.seed * 1000 + member)
    rng = np.random.default_rng([recipe.seed, member, 1])
    learner = copy.deepcopy(begun).train()
    for layer in learner.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eval()
    optimizer = torch.optim.AdamW(learner.parameters(), weight_decay=recipe.weight_decay)
    for step in range(recipe.tuning_steps):
        rows = torch.from_numpy(rng.integers(len(lsstcam), size=recipe.tuning_images))
        logit = learner.lsstcam(augment(lsstcam.images[rows], recipe, rng))
        loss = binary_cross_entropy_with_logits(logit, lsstcam.real[rows])
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


def resumed(part: Path, recipe: Recipe, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
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
def image_logit(learner: _Learner, images: Tensor) -> NDArray[np.float64]:
    """Return the real/bogus logits float64[N] of an image network, averaged over the orientations."""
    views = torch.stack([learner.lsstcam(view) for view in orient(images, ORIENTATIONS)])
    logit: NDArray[np.float64] = views.mean(dim=0).double().numpy()
    return logit


@torch.inference_mode()
def metadata_logit(network: MetadataNet, metadata: Tensor) -> NDArray[np.float64]:
    """Return the real/bogus logits float64[N] of a metadata network."""
    logit: NDArray[np.float64] = network(derive(metadata))[:, 0].double().numpy()
    return logit


def unrelated(visit: NDArray[np.int64], object_id: NDArray[np.str_], seed: int) -> NDArray[np.int64]:
    """Return the fold of each alert, int64[N]; folds have about the same number of alerts.

    Alerts that share a visit or an object, directly or through other alerts, are in the same fold.
    """
    visits, of_visit = np.unique(visit, return_inverse=True)
    _, of_object = np.unique(object_id, return_inverse=True)
    links = coo_array((np.ones(len(visit)), (of_visit, len(visits) + of_object)), shape=(2 * len(visit) + 1,) * 2)
    _, group = connected_components(links, directed=False)
    groups, of_alert, size = np.unique(group[of_visit], return_inverse=True, return_counts=True)
    rng = np.random.default_rng(seed)
    load, fold_of = np.zeros(FOLDS), np.zeros(len(groups), np.int64)
    for one in np.argsort(-size * rng.uniform(0.5, 1, len(groups))).tolist():
        fold_of[one] = np.argmin(load + rng.uniform(0, 1, FOLDS))
        load[fold_of[one]] += size[one]
    return fold_of[of_alert]


def held_out_logits(
    lsstcam: Seen, detections: Detections, begun: Sequence[_Learner], test: NDArray[np.bool_], recipe: Recipe
) -> dict[str, Tensor]:
    """Return the held-out logits of the M alerts of `test` bool[N], by name.

    `logits` float64[M, 2]: mean logits of images and of metadata, by networks that saw no alert of the same visits or
    objects.
    """
    train, unseen = lsstcam[~test], lsstcam[test]
    rows = ~np.isin(detections.visit, unseen.visit) & ~np.isin(detections.object_id, unseen.object_id)
    logits = np.zeros((len(unseen), 2))
    for member, learner in enumerate(begun):
        logits[:, 0] += image_logit(tune(learner, train, recipe, member), unseen.images) / len(begun)
        network = learn_metadata(detections, rows, recipe, member)
        logits[:, 1] += metadata_logit(network, unseen.metadata) / len(begun)
    log.info("%d held-out alerts of %d visits", len(unseen), len(np.unique(unseen.visit)))
    return {"logits": torch.from_numpy(logits)}


def join(logits: NDArray[np.float64], real: NDArray[np.bool_]) -> tuple[NDArray[np.float64], float]:
    """Return the weights [L] and the bias that make calibrated logits of held-out `logits` [N, L]."""
    fitted = LogisticRegression(C=INVERSE_L2_OF_JOIN).fit(logits, real)
    return fitted.coef_[0], float(fitted.intercept_[0])


def joined(logits: NDArray[np.float64], real: NDArray[np.bool_], fold: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return calibrated logits float64[N], each joined by weights that were fitted to the other folds."""
    said = np.empty(len(logits))
    for one in np.unique(fold).tolist():
        weights, bias = join(logits[fold != one], real[fold != one])
        said[fold == one] = logits[fold == one] @ weights + bias
    return said


def tree_logit(lsstcam: Seen, fold: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return held-out logits, float64[N], of extremely randomised trees (Geurts et al. 2006).

    The trees learnt the reliability from the same metadata as the network.
    """
    told, reliability = derive(lsstcam.metadata).numpy(), lsstcam.real.numpy()
    share = np.empty(len(told))
    for one in np.unique(fold).tolist():
        trees = ExtraTreesRegressor(TREES, min_samples_leaf=2, max_features=0.5, random_state=SPLIT_SEED)
        share[fold == one] = trees.fit(told[fold != one], reliability[fold != one]).predict(told[fold == one])
    return logit_of(share.clip(1 / TREES, 1 - 1 / TREES))


def default_logit(bundle: Part, raw: RawAlerts) -> NDArray[np.float64]:
    """Return the logits float64[N] of the bundle `default`, which was trained on ZTF."""
    network = load_network(bundle.card.architecture, load_file(bundle.directory / WEIGHTS))
    images = prepare_images(raw.cutouts, raw.cutout_box, bundle.card.inputs.images)
    with torch.inference_mode():
        logit: NDArray[np.float64] = network(torch.from_numpy(images))[0][:, 0].double().numpy()
    return logit


def figures(
    reliability: NDArray[np.float64],
    night: NDArray[np.str_],
    logits: Mapping[str, NDArray[np.float64]],
    weight: Weights,
) -> dict[str, Values]:
    """Return how well logits [N] of each model reproduce `reliability` [N], for weights [..., N] of the alerts.

    `roc_auc` and `calibration_slope` take reliability > 0.5 as the truth. `spearman` is the correlation of the ranks
    among all alerts. The first model is compared with each other one: `roc_auc_minus_...`. The ROC AUC within a night
    is given for nights with at least RARE alerts of each kind.
    """
    real = reliability > 0.5
    found: dict[str, Values] = {}
    for name, logit in logits.items():
        found[f"{name}roc_auc"] = rank(real, logit, weight).roc_auc
        found[f"{name}spearman"] = correlation(rankdata(logit), rankdata(reliability), weight)
        found[f"{name}calibration_slope"], found[f"{name}calibration_intercept"] = slope_and_intercept(
            logit, real, weight
        )
    first, *others = logits
    for name in others:
        found[f"{first}roc_auc_minus_{name}roc_auc"] = found[f"{first}roc_auc"] - found[f"{name}roc_auc"]
    for one in np.unique(night).tolist():
        here = night == one
        if min((here & real).sum(), (here & ~real).sum()) >= RARE:
            for name, logit in logits.items():
                found[f"{name}roc_auc_of_{one}"] = rank(real[here], logit[here], weight[..., here]).roc_auc
    return found


def correlation(x: NDArray[np.float64], y: NDArray[np.float64], weight: Weights) -> Values:
    """Return the weighted correlation [...] of x [N] and y [N]."""
    share = weight / weight.sum(axis=-1, keepdims=True)
    mean_x, mean_y = share @ x, share @ y
    covariance = share @ (x * y) - mean_x * mean_y
    variance = (share @ x**2 - mean_x**2) * (share @ y**2 - mean_y**2)
    found: Values = covariance / np.sqrt(variance)
    return found


def describe_split(lsstcam: Seen, detections: Detections, real: NDArray[np.bool_]) -> dict[str, float | int | str]:
    """Return what the figures were measured on, for the card."""
    return {
        "truth": "the survey's reliability > 0.5, for roc_auc and calibration; reliability itself, for spearman",
        "split": f"cross-validation, {FOLDS} folds, seed {SPLIT_SEED}; no visit and no object is in training and test",
        "intervals": INTERVALS.replace("objects", "visits").replace("object ", "visit "),
        "alerts": len(lsstcam),
        "visits": len(np.unique(lsstcam.visit)),
        "objects": len(np.unique(lsstcam.object_id)),
        "unreliable": int((~real).sum()),
        "detections": len(detections),
    }


def untrained() -> SnrNet:
    """Return the network with random weights."""
    return SnrNet(members=MEMBERS, classes=len(CLASSES), orientations=ORIENTATIONS)


def assemble(lsstcam: Seen, detections: Detections, begun: Sequence[_Learner], recipe: Recipe) -> dict[str, Tensor]:
    """Return the state of the network that has learnt from all alerts; its last layers are untrained."""
    network = untrained()
    everything = np.ones(len(detections), np.bool_)
    for member, learner in enumerate(begun):
        tuned = tune(learner, lsstcam, recipe, member)
        network.image_nets[member].load_state_dict(tuned.net.state_dict())
        with torch.no_grad():
            head = network.image_heads[member]
            assert isinstance(head, nn.Linear)
            head.weight.copy_(tuned.real_head.weight[LSSTCAM : LSSTCAM + 1])
            head.bias.copy_(tuned.real_head.bias[LSSTCAM : LSSTCAM + 1])
        told = learn_metadata(detections, everything, recipe, member)
        network.metadata_nets[member].load_state_dict(told.state_dict())
    return network.state_dict()


def read_classes(table: Path | None, lsst: Seen) -> NDArray[np.int64]:
    """Return the class of each alert of LSSTCam, int64[N], -1 where it is unknown.

    An alert without a class is bogus if its reliability is below CLEARLY_BOGUS. Alerts of HSC have no class: most of
    those with a label are bogus, so the layer would learn to recognise the camera.
    """
    classes = np.where(lsst.of_lsstcam & (lsst.real.numpy() < CLEARLY_BOGUS), BOGUS, -1)
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

    It learns from real alerts with a weak label `weak` int64[N], and from simulated alerts with their truth. Each class
    has the same weight, and so have its real and its simulated alerts.
    """
    known = weak >= 0
    real = lsst[known]
    truth = np.array([CLASS_OF_KIND.get(KINDS[kind], BOGUS) for kind in simulated.kind.tolist()])
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
    """Return the fitted regression; every class, and within it real and simulated alerts, have the same weight."""
    group = 2 * label + is_real
    _, of_alert, size = np.unique(group, return_inverse=True, return_counts=True)
    weight = 1 / size[of_alert]
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
            method=f"{MEMBERS} image networks and {MEMBERS} metadata networks, averaged. The image networks learnt "
            f"from ZTF (drb), HSC (reliability) and simulated alerts (truth) in {recipe.steps} steps, then from "
            f"LSSTCam (reliability) in {recipe.tuning_steps} steps of {recipe.tuning_images} images. The score is the "
            f"mean over {ORIENTATIONS} orientations of the images. The metadata networks learnt from earlier "
            f"detections of alerts' objects (reliability) in {recipe.metadata_steps} steps. Two weights and a bias "
            "join the logits; they were fitted to held-out logits. The reliability in a packet is the target and "
            "never an input, and no input is derived from it. The classes are a multinomial logistic regression on "
            "image features, the real/bogus logit and metadata, for equally common classes. The recipe was chosen by "
            "cross-validations on the same alerts, so the figures are optimistic; the ridge strength of the join was "
            "chosen after the calibration slope of five strengths had been seen, and the trees were changed from a "
            f"classifier to a regressor, which made this baseline stronger. Seed {recipe.seed}.",
            data=f"{len(lsstcam)} alerts of LSSTCam from {len(np.unique(lsstcam.visit))} visits, {len(hsc)} of HSC, "
            f"{len(ztf)} of ZTF, {SIMULATED} simulated, and {len(detections)} earlier detections of LSSTCam without "
            "images. Limits: the teacher is the opinion of another network, so `real` is the probability that the "
            "survey's network says real, not that an astronomer does. Nearly all unreliable alerts are of two nights "
            "(2025-09-05 and 2025-12-31); alerts since March 2026 were published only above a reliability of 0.5. "
            "`transient` was learnt from simulated alerts alone. Alerts without variance or PSF are scored with a "
            "noise estimated from the pixels and a Gaussian PSF of 1 arcsec, which was not evaluated.",
            evaluation=evaluation,
        ),
    )
