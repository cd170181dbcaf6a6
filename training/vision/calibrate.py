"""Calibrates a trained classifier: corrects its probabilities for the class frequencies of the validation split.

Class weights in the loss shift the logits: the network learns the probabilities for equally common classes. This known
shift is undone first. Then a scale and a shift of each logit, fitted on the validation split, correct the rest: Platt
scaling for two classes (Platt 1999), temperature scaling with a bias for each class for more classes (Guo et al. 2017,
arXiv:1706.04599, section 4.2). Both are linear in the logits, so they are merged into the network's last layer and
serving needs no extra step. The test split is never used.
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
"""Largest |log(scale)|: logits are scaled by at most a factor of ten, and never change sign. A network that needs more
has not learnt."""
ITERATIONS = 200
"""Maximum number of L-BFGS iterations; some dozens are enough."""
LEAST_INFORMATION = 1e-9
"""Value that is added to the Fisher information, whose logarithm is undefined if all logits are equal."""
FOLDS = 5
"""Number of folds of the validation split's sources. To evaluate the calibration, each fold is calibrated with the
other folds."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """A map of logits [N, P] to `scale * (logits + unweighted) + shift`."""

    unweighted: NDArray[np.float64]  # [P] offset that undoes the class weights
    scale: float
    shift: NDArray[np.float64]  # [P]

    def __call__(self, logits: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the calibrated logits float64[N, P]."""
        return self.scale * (logits + self.unweighted) + self.shift


def last_layer(network: nn.Module) -> nn.Linear:
    """Return the layer that computes the logits. Raises TrainingError if the network's `head` does not end with a
    linear layer."""
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
) -> tuple[Calibration, dict[str, float | int | str]]:
    """Calibrate a trained network on the alerts of `view`, which `batches` yields in the same order.

    `weights` [C]: class weights of the loss that it was trained with. Returns the calibration, and figures for the
    card.
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
        "calibration": "Merged into the network's last layer: calibration_scale * (logit + unweighted) + "
        "calibration_shift, where unweighted undoes the class weights. Scale and shift were fitted on the validation "
        "split, and all these figures were measured on it: those with prefix trained_ on the logits as trained, those "
        "with prefix unweighted_ on the logits with the class weights undone, and those without prefix on calibrated "
        f"logits, where each object was calibrated with the other {FOLDS - 1} of {FOLDS} folds. A calibrated model has "
        "a calibration_slope of 1 and a calibration_intercept of 0; ece_if_calibrated is the expected ECE of a "
        "perfectly calibrated model for the same number of alerts. The probabilities are valid if the classes are as "
        "common as in this split: see calibration_share.",
        "calibration_alerts": len(view),
        "calibration_objects": len(np.unique(view.object_id)),
        **{f"calibration_share_{name}": round(float((view.label == c).mean()), 4) for c, name in enumerate(classes)},
        **{name: round(by, 4) for name, by in shifts.items()},
        "calibration_scale": round(chosen.scale, 4),
        **as_card(figures),
    }


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


def fit_calibration(
    logits: NDArray[np.float64], label: NDArray[np.int64], unweighted: NDArray[np.float64]
) -> Calibration:
    """Return the most likely scale and shifts of logits [N, P] for class indices `label` [N], after `unweighted` is
    added.

    P = 1 means the logit of the second of two classes. Firth's penalised likelihood (1993, Biometrika 80, 27) gives
    finite estimates for few alerts, and also if the logits separate the classes.
    """
    values = torch.from_numpy(logits + unweighted)
    if values.shape[1] == 1:
        values = torch.cat([torch.zeros_like(values), values], dim=1)
    n, c = values.shape
    rows, truth = torch.arange(n), torch.from_numpy(label)
    stretch = torch.zeros((), dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(
        c - 1, dtype=torch.float64, requires_grad=True
    )  # the first class has bias 0, since only differences matter
    shifts = torch.eye(c, dtype=torch.float64)[:, 1:].expand(n, -1, -1)

    def scale() -> Tensor:
        return (WIDEST * torch.tanh(stretch)).exp()

    def loss() -> Tensor:
        optimizer.zero_grad()
        logarithm = (scale() * values + nn.functional.pad(bias, (1, 0))).log_softmax(dim=1)
        p = logarithm.exp()
        slopes = torch.cat(
            [values.unsqueeze(2), shifts], dim=2
        )  # [N, C, 1 + C - 1] derivatives of the logits by the parameters
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
    """Merge the calibration into the network's last layer, in place."""
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
