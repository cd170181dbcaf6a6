"""Calibrates a trained classifier: corrects its probabilities for the class frequencies of the validation split.

Class weights in the loss shift the logits: the network learns the probabilities for equally common classes. This known
shift is undone first. Then a scale and a shift of each logit, fitted on the validation split, correct the rest: Platt
scaling for two classes (Platt 1999), temperature scaling with a bias for each class for more classes (Guo et al. 2017,
arXiv:1706.04599, section 4.2). Both are linear in the logits, so they are merged into the network's last layer and
serving needs no extra step. The test split is never used.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader

from training.data.datasets import View, sources_by_class
from training.errors import TrainingError
from training.evaluation.bootstrap import Estimate, as_card
from training.evaluation.evaluate import (
    ReliabilityBin,
    calibration_for_card,
    describe_calibration,
    describe_reliability,
)
from training.evaluation.predictions import Predictions
from training.evaluation.scaling import Calibration, fit_calibration
from training.vision.classifier import Shown

FOLDS = 5
"""Number of folds of the validation split's sources. To evaluate the calibration, each fold is calibrated with the
other folds."""


def last_layer(network: nn.Module) -> nn.Linear:
    """Return the layer that computes the logits.

    Raises TrainingError if the network's `head` does not end with a linear layer.
    """
    head = getattr(network, "head", None)
    layer = head[-1] if isinstance(head, nn.Sequential) and len(head) else head
    if not isinstance(layer, nn.Linear):
        raise TrainingError(
            f"network {type(network).__name__}: its `head` does not end with a linear layer, into which the "
            "calibration is merged: choose another architecture"
        )
    return layer


def calibrate(
    network: nn.Module, batches: DataLoader[Shown], view: View, classes: Sequence[str], weights: Tensor
) -> tuple[Calibration, dict[str, float | int | str], dict[str, tuple[ReliabilityBin, ...]]]:
    """Calibrate a trained network on the alerts of `view`, which `batches` yields in the same order.

    `weights` [C]: class weights of the loss that it was trained with. Returns the calibration, figures for the card,
    and the reliability curves before and after the calibration, by title.
    """
    logits = logits_of(network, batches)
    unweighted = undo_weights(weights)
    chosen = fit_calibration(logits, view.label, unweighted)
    apply(network, chosen)
    sources = sources_by_class(view.object_id, view.label, len(classes), seed=0)
    fold_of = {name: i % FOLDS for names in sources for i, name in enumerate(names.tolist())}
    fold = np.array([fold_of[name] for name in view.object_id.tolist()])
    crossed = np.empty_like(logits)
    for one in np.unique(fold).tolist():
        crossed[fold == one] = fit_calibration(logits[fold != one], view.label[fold != one], unweighted)(
            logits[fold == one]
        )
    labels = classes[-logits.shape[1] :]
    shifts = {f"unweighted_{name}": float(by) for name, by in zip(labels, unweighted, strict=True)}
    shifts |= {f"calibration_shift_{name}": float(by) for name, by in zip(labels, chosen.shift, strict=True)}
    before = {
        stage: _as_predictions(view, classes, values)
        for stage, values in (("trained_", logits), ("unweighted_", logits + unweighted))
    }
    after = _as_predictions(view, classes, crossed)
    figures: dict[str, Estimate] = {}
    for stage, predictions in before.items():
        figures |= {f"{stage}{name}": figure for name, figure in describe_calibration(predictions).items()}
    curves = {"as trained": describe_reliability(before["trained_"]), "calibrated": describe_reliability(after)}
    card = {
        "calibration": "Merged into the network's last layer: calibration_scale * (logit + unweighted) + "
        "calibration_shift, where unweighted undoes the class weights. Scale and shift were fitted on the validation "
        "split, and all these figures were measured on it: those with prefix trained_ on the logits as trained, those "
        "with prefix unweighted_ on the logits with the class weights undone, and those without prefix on calibrated "
        f"logits, where each object was calibrated with the other {FOLDS - 1} of {FOLDS} folds. A calibrated model has "
        "a calibration_slope of 1 and a calibration_intercept of 0; ece_if_calibrated is the expected ECE of a "
        "perfectly calibrated model for the same number of alerts; reliability_ compares the mean predicted "
        "probability of the most probable label (with one label: of this label) with the observed frequency. The "
        "probabilities are valid if the classes are as common as in this split: see calibration_share.",
        "calibration_alerts": len(view),
        "calibration_objects": len(np.unique(view.object_id)),
        **{f"calibration_share_{name}": round(float((view.label == c).mean()), 4) for c, name in enumerate(classes)},
        **{name: round(by, 4) for name, by in shifts.items()},
        "calibration_scale": round(chosen.scale, 4),
        **as_card(figures),
        **calibration_for_card(after),
    }
    return chosen, card, curves


def logits_of(network: nn.Module, batches: DataLoader[Shown]) -> NDArray[np.float64]:
    """Return the logits of all batches, float64[N, P], of a network in evaluation mode."""
    with torch.inference_mode():
        said = [network(images, metadata) if metadata.shape[1] else network(images) for images, metadata, _ in batches]
    return torch.cat([logits for logits, _ in said]).double().numpy()


def undo_weights(weights: Tensor) -> NDArray[np.float64]:
    """Return the offset [P] that undoes class `weights` [C] in logits.

    At the minimum of the weighted loss, the odds of a class are too high by the factor of its weight, so the logarithm
    of the weight is subtracted. For two balanced classes with n0 and n1 alerts, log(n1 / n0) is added to the logit of
    the second.
    """
    logarithm = weights.double().log().numpy()
    return logarithm[:1] - logarithm[1:] if len(weights) == 2 else -logarithm


def apply(network: nn.Module, calibration: Calibration) -> None:
    """Merge the calibration into the network's last layer, in place."""
    calibration.merge_into(last_layer(network))


def _as_predictions(view: View, classes: Sequence[str], logits: NDArray[np.float64]) -> Predictions:
    values = torch.from_numpy(logits)
    probabilities = values.sigmoid() if values.shape[1] == 1 else values.softmax(dim=1)
    return Predictions(
        tuple(classes),
        view.alert_id,
        view.object_id,
        np.full(len(view), np.nan),
        view.label,
        probabilities.numpy().astype(np.float32),
        threshold=0.5,
    )
