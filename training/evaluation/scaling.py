"""Fits a scale and shifts of logits that calibrate a classifier.

For two classes this is Platt scaling (Platt 1999), for more classes temperature scaling with a bias for each class (Guo
et al. 2017, arXiv:1706.04599, section 4.2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

WIDEST = math.log(10)
"""Largest |log(scale)|: logits are scaled by at most a factor of ten, and never change sign. A network that needs more
has not learnt."""
ITERATIONS = 200
"""Maximum number of L-BFGS iterations; some dozens are enough."""
LEAST_INFORMATION = 1e-9
"""Value that is added to the Fisher information, whose logarithm is undefined if all logits are equal."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """A map of logits [N, P] to `scale * (logits + unweighted) + shift`."""

    unweighted: NDArray[np.float64]  # [P] offset that undoes the class weights
    scale: float
    shift: NDArray[np.float64]  # [P]

    def __call__(self, logits: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the calibrated logits float64[N, P]."""
        return self.scale * (logits + self.unweighted) + self.shift

    @torch.no_grad()
    def merge_into(self, layer: nn.Linear) -> None:
        """Change the layer that computes the logits, in place, so that it computes the calibrated ones."""
        bias = layer.bias.double() + torch.from_numpy(self.unweighted)
        layer.bias.copy_(self.scale * bias + torch.from_numpy(self.shift))
        layer.weight.mul_(self.scale)


def fit_calibration(
    logits: NDArray[np.float64], label: NDArray[np.int64], unweighted: NDArray[np.float64]
) -> Calibration:
    """Return the most likely scale and shifts of logits [N, P] for class indices `label` [N].

    `unweighted` is added to the logits before they are scaled. P = 1 means the logit of the second of two classes.
    Firth's penalised likelihood (1993, Biometrika 80, 27) gives finite estimates for few alerts, and also if the logits
    separate the classes.
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
