"""The evaluation of `train-rubin`: the split of real alerts, baselines, and figures on real and simulated alerts."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from scipy.stats import rankdata
from sklearn.ensemble import ExtraTreesRegressor

from broker_filter.scoring.alerts import RawAlerts
from broker_filter.scoring.bundle import WEIGHTS, Part
from broker_filter.scoring.networks import load_network
from broker_filter.scoring.networks.snrnet import derive
from broker_filter.scoring.preprocess import prepare_images
from training.bundles.rubin_data import CLASSES, Detections, Seen, simulated_classes
from training.data.datasets import connected
from training.data.simulated import KINDS
from training.evaluation.bootstrap import INTERVALS, as_card, estimate
from training.evaluation.calibration import logit_of, slope_and_intercept
from training.evaluation.metrics import Values, Weights, rank, ratio

FOLDS = 6
SPLIT_SEED = 2026
TREES = 300
RARE = 5
"""Smallest number of alerts of each kind in a night whose ROC AUC is given, and of a group of simulated alerts."""
STAGES = {"first": (1, 1), "second_or_third": (2, 3), "later": (4, np.inf)}
"""Smallest and largest number of an object's detections at each stage at which classes are evaluated."""


def unrelated(visit: NDArray[np.int64], object_id: NDArray[np.str_], seed: int) -> NDArray[np.int64]:
    """Return the fold of each alert, int64[N]; folds have about the same number of alerts.

    Alerts that share a visit or an object, directly or through other alerts, are in the same fold.
    """
    groups, of_alert, size = np.unique(connected(visit, object_id), return_inverse=True, return_counts=True)
    rng = np.random.default_rng(seed)
    load, fold_of = np.zeros(FOLDS), np.zeros(len(groups), np.int64)
    for one in np.argsort(-size * rng.uniform(0.5, 1, len(groups))).tolist():
        fold_of[one] = np.argmin(load + rng.uniform(0, 1, FOLDS))
        load[fold_of[one]] += size[one]
    return fold_of[of_alert]


def some_visits(visit: NDArray[np.int64], share: float, seed: int) -> NDArray[np.bool_]:
    """Return which alerts are of a random `share` of the visits, bool[N]; at least one visit is chosen."""
    visits = np.unique(visit)
    chosen = np.random.default_rng(seed).permutation(visits)[: max(1, round(share * len(visits)))]
    return np.isin(visit, chosen)


def tree_logit(lsstcam: Seen, fold: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return held-out logits, float64[N], of extremely randomised trees (Geurts et al. 2006).

    The trees learnt the reliability from the metadata that the class layer takes.
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
    calibrated: Mapping[str, NDArray[np.float64]],
    weight: Weights,
) -> dict[str, Values]:
    """Return how well logits [N] of each model reproduce `reliability` [N], for weights [..., N] of the alerts.

    `roc_auc` takes reliability > 0.5 as the truth. `spearman` is the correlation of the ranks among all alerts. The
    first model is compared with each other one: `roc_auc_minus_...`. The ROC AUC within a night is given for nights
    with at least RARE alerts of each kind. The calibration is that of the logits [N] in `calibrated`.
    """
    real = reliability > 0.5
    found = rankings(reliability, logits, weight)
    for name, logit in calibrated.items():
        slope, intercept = slope_and_intercept(logit, real, weight)
        found |= {f"{name}calibration_slope": slope, f"{name}calibration_intercept": intercept}
    first, *others = logits
    for name in others:
        found[f"{first}roc_auc_minus_{name}roc_auc"] = found[f"{first}roc_auc"] - found[f"{name}roc_auc"]
    for one in np.unique(night).tolist():
        here = night == one
        if min((here & real).sum(), (here & ~real).sum()) >= RARE:
            for name, logit in logits.items():
                found[f"{name}roc_auc_of_{one}"] = rank(real[here], logit[here], weight[..., here]).roc_auc
    return found


def rankings(
    reliability: NDArray[np.float64], logits: Mapping[str, NDArray[np.float64]], weight: Weights
) -> dict[str, Values]:
    """Return `roc_auc` and `spearman` of the logits [N] of each model, as `figures` does."""
    found: dict[str, Values] = {}
    for name, logit in logits.items():
        found[f"{name}roc_auc"] = rank(reliability > 0.5, logit, weight).roc_auc
        found[f"{name}spearman"] = correlation(rankdata(logit), rankdata(reliability), weight)
    return found


def correlation(x: NDArray[np.float64], y: NDArray[np.float64], weight: Weights) -> Values:
    """Return the weighted correlation [...] of x [N] and y [N]."""
    share = weight / weight.sum(axis=-1, keepdims=True)
    mean_x, mean_y = share @ x, share @ y
    covariance = share @ (x * y) - mean_x * mean_y
    variance = (share @ x**2 - mean_x**2) * (share @ y**2 - mean_y**2)
    found: Values = covariance / np.sqrt(variance)
    return found


def describe_split(lsstcam: Seen, detections: Detections) -> dict[str, float | int | str]:
    """Return what the figures were measured on, for the card."""
    return {
        "truth": "the survey's reliability > 0.5, for roc_auc and calibration; reliability itself, for spearman",
        "split": f"cross-validation, {FOLDS} folds, seed {SPLIT_SEED}; no visit and no object is in training and test",
        "intervals": INTERVALS.replace("objects", "visits").replace("object ", "visit "),
        "ranking": "roc_auc and spearman are of held-out logits as the networks gave them, calibration of logits that "
        "were calibrated by the other folds",
        "alerts": len(lsstcam),
        "visits": len(np.unique(lsstcam.visit)),
        "objects": len(np.unique(lsstcam.object_id)),
        "unreliable": int((lsstcam.real <= 0.5).sum()),
        "detections": len(detections),
    }


def evaluate_simulated(simulated: Seen, logits: NDArray[np.float64]) -> dict[str, float | int | str]:
    """Return the figures for the truth of simulated alerts, with intervals, for the card.

    `logits` [N, 1 + classes] are those of the network. The figures are the ROC AUC of `real`; the fraction of the real
    alerts, of the bogus ones and of each kind that are called real; and the fraction of each class that is recognised,
    by the number of the object's detections.
    """
    real, truth = simulated.real.numpy() > 0.5, simulated_classes(simulated)
    called_real, winner = logits[:, 0] > 0, logits[:, 1:].argmax(axis=1)
    groups = {f"{kind}_called_real": (simulated.kind == k, called_real) for k, kind in enumerate(KINDS)}
    groups |= {"real_called_real": (real, called_real), "bogus_called_real": (~real, called_real)}
    for c, name in enumerate(CLASSES):
        groups[f"{name}_recall"] = (truth == c, winner == c)
        for stage, (least, most) in STAGES.items():
            seen = (simulated.detections >= least) & (simulated.detections <= most)
            groups[f"{name}_recall_at_{stage}_detection"] = (seen & (truth == c), winner == c)
    groups = {name: (rows, yes) for name, (rows, yes) in groups.items() if rows.sum() >= RARE}

    def measure(weight: Weights) -> dict[str, Values]:
        found = {"roc_auc": rank(real, logits[:, 0], weight).roc_auc}
        for name, (rows, yes) in groups.items():
            found[name] = ratio(weight[..., rows] @ yes[rows], weight[..., rows].sum(axis=-1))
        return found

    def trials(weight: Weights) -> dict[str, Values]:
        return {name: weight[..., rows].sum(axis=-1) for name, (rows, _) in groups.items()}

    card: dict[str, float | int | str] = {"alerts": len(simulated), "bogus": int((~real).sum())}
    card |= as_card(estimate(measure, simulated.object_id, trials))
    return {f"simulated_{name}": value for name, value in card.items()}
