"""Calibrates a classifier that was trained: its probabilities become those of the data that it is to be used on.

Class weights in a loss shift the logits: what is learnt are the probabilities of classes that are equally common. The
shift is known, and is undone first. A temperature and a shift of each logit, fitted on the validation split, then
correct what is left: Platt scaling where there are two classes (Platt 1999), temperature scaling with a bias for each
class where there are more (Guo et al. 2017, arXiv:1706.04599, section 4.2). Both are linear in the logits, so they
become a part of the network's last layer: what serves the network takes no other step. Never looks at the test split.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader

from training.data.datasets import View, sources_by_class
from training.errors import TrainingError
from training.evaluation.bootstrap import Estimate, as_card
from training.evaluation.evaluate import describe_calibration
from training.evaluation.predictions import Predictions
from training.vision.classifier import Shown

WIDEST = math.log(10)
"""Logits are stretched or shrunk tenfold at most: a network that would need more has not learnt, and none is turned
round."""
ITERATIONS = 200
"""Of L-BFGS at most; it takes some dozens."""
LEAST_INFORMATION = 1e-9
"""Added to the Fisher information, which has no logarithm where all logits are equal."""
FOLDS = 5
"""Of the validation split's sources: each is calibrated by the others, to say what the calibration is worth."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """What becomes of logits [N, P]: `scale * (logits + unweighted) + shift`."""

    unweighted: NDArray[np.float64]  # [P] undoes the class weights
    scale: float
    shift: NDArray[np.float64]  # [P]

    def __call__(self, logits: NDArray[np.float64]) -> NDArray[np.float64]:
        """The calibrated logits [N, P]."""
        return self.scale * (logits + self.unweighted) + self.shift


def last_layer(network: nn.Module) -> nn.Linear:
    """The layer that gives the logits. Raises TrainingError where the network's `head` does not end with one."""
    head = getattr(network, "head", None)
    layer = head[-1] if isinstance(head, nn.Sequential) and len(head) else head
    if not isinstance(layer, nn.Linear):
        raise TrainingError(
            f"network {type(network).__name__}: its `head` does not end with a linear layer, which a calibration "
            "becomes a part of: choose another architecture"
        )
    return layer


def calibrate(
    network: nn.Module, batches: DataLoader[Shown], view: View, classes: Sequence[str], weights: Tensor
) -> tuple[Calibration, dict[str, float | int | str]]:
    """Calibrates a trained network on the alerts of `view`, which `batches` show it in order; returns how, and what the
    card says of it.

    `weights` [C]: of the classes in the loss that it was trained with.
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
    said = {"trained_": logits, "unweighted_": logits + unweighted, "": crossed}
    figures: dict[str, Estimate] = {}
    for stage, values in said.items():
        predictions = _as_predictions(view, classes, values)
        figures |= {f"{stage}{name}": figure for name, figure in describe_calibration(predictions).items()}
    return chosen, {
        "calibration": "Part of the network's last layer: to a logit, unweighted is added, which undoes the class "
        "weights; the sum is multiplied by calibration_scale, and calibration_shift is added. Scale and shift were "
        "fitted on the validation split, of which all these figures are: those with the prefix trained_ of the logits "
        "as trained, those with unweighted_ of the logits with the class weights undone, and those without a prefix of "
        f"calibrated logits, each object's by the other {FOLDS - 1} of {FOLDS} folds. A calibrated model has a "
        "calibration_slope of 1 and a calibration_intercept of 0; ece_if_calibrated is the ECE that a perfectly "
        "calibrated model would show with as many alerts. The probabilities hold where the classes are as common as in "
        "this split: see calibration_share.",
        "calibration_alerts": len(view),
        "calibration_objects": len(np.unique(view.object_id)),
        **{f"calibration_share_{name}": round(float((view.label == c).mean()), 4) for c, name in enumerate(classes)},
        **{name: round(by, 4) for name, by in shifts.items()},
        "calibration_scale": round(chosen.scale, 4),
        **as_card(figures),
    }


def logits_of(network: nn.Module, batches: DataLoader[Shown]) -> NDArray[np.float64]:
    """What a network in evaluation mode says of all batches, float64[N, P]."""
    with torch.inference_mode():
        said = [network(images, metadata) if metadata.shape[1] else network(images) for images, metadata, _ in batches]
    return torch.cat([logits for logits, _ in said]).double().numpy()


def undo_weights(weights: Tensor) -> NDArray[np.float64]:
    """What is added to logits [P] that were learnt with classes of `weights` [C].

    The loss is lowest where the odds of a class are as much too high as its weight is too large, so the logarithm of
    the weight goes: of two classes with n0 and n1 alerts that were balanced, log(n1 / n0) is added.
    """
    logarithm = weights.double().log().numpy()
    return logarithm[:1] - logarithm[1:] if len(weights) == 2 else -logarithm


def fit_calibration(
    logits: NDArray[np.float64], label: NDArray[np.int64], unweighted: NDArray[np.float64]
) -> Calibration:
    """The most likely scale and shifts of logits [N, P] for the classes `label` [N], after `unweighted` is added.

    One logit is of the second of two classes. The likelihood is Firth's (1993, Biometrika 80, 27): finite estimates of
    few alerts, also where the logits separate the classes.
    """
    values = torch.from_numpy(logits + unweighted)
    if values.shape[1] == 1:
        values = torch.cat([torch.zeros_like(values), values], dim=1)
    n, c = values.shape
    rows, truth = torch.arange(n), torch.from_numpy(label)
    stretch = torch.zeros((), dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(c - 1, dtype=torch.float64, requires_grad=True)  # the first class's is 0: only differences count
    shifts = torch.eye(c, dtype=torch.float64)[:, 1:].expand(n, -1, -1)

    def scale() -> Tensor:
        return (WIDEST * torch.tanh(stretch)).exp()

    def loss() -> Tensor:
        optimizer.zero_grad()
        logarithm = (scale() * values + nn.functional.pad(bias, (1, 0))).log_softmax(dim=1)
        p = logarithm.exp()
        slopes = torch.cat([values.unsqueeze(2), shifts], dim=2)  # [N, C, 1 + C - 1] of the logits, by parameter
        centred = slopes - (p.unsqueeze(2) * slopes).sum(dim=1, keepdim=True)
        information = torch.einsum("nc,nci,ncj->ij", p, centred, centred)
        information = information + LEAST_INFORMATION * torch.eye(c, dtype=torch.float64)
        penalised = -logarithm[rows, truth].sum() - 0.5 * torch.logdet(information)
        penalised.backward()  # type: ignore[no-untyped-call]
        return penalised

    optimizer = torch.optim.LBFGS([stretch, bias], max_iter=ITERATIONS, line_search_fn="strong_wolfe")
    optimizer.step(loss)  # type: ignore[no-untyped-call]
    shift = nn.functional.pad(bias, (1, 0)).detach().numpy()
    return Calibration(unweighted, float(scale().detach()), shift[-logits.shape[1] :])


def apply(network: nn.Module, calibration: Calibration) -> None:
    """Makes the calibration a part of the network's last layer."""
    layer = last_layer(network)
    with torch.no_grad():
        bias = layer.bias.double() + torch.from_numpy(calibration.unweighted)
        layer.bias.copy_(calibration.scale * bias + torch.from_numpy(calibration.shift))
        layer.weight.mul_(calibration.scale)


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
