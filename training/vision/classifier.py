"""Training of classifiers: the alerts that are shown to the network, and the loss.

The network sees exactly what serving gives it: the data set's raw cutouts after `scoring.preprocess`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader

from broker_filter.scoring.bundle import Inputs
from broker_filter.scoring.preprocess import prepare
from training.data.datasets import View, sources_by_class
from training.learner import Learner, loader
from training.recipe import Hardware, Optimisation, Recipe

ALERTS_AT_ONCE = 256

Shown = tuple[Tensor, Tensor, Tensor]
"""A batch of N alerts: images float32[N, C, S, S], metadata float32[N, F], class indices int64[N]. PSF images are the
last channels of the images."""


class ShownAlerts(torch.utils.data.Dataset[Shown]):
    """A torch data set of a view's alerts, preprocessed, a batch at a time."""

    def __init__(self, view: View, inputs: Inputs) -> None:
        self.view = view
        self.inputs = inputs

    def __len__(self) -> int:
        return len(self.view)

    def __getitems__(self, rows: Sequence[int]) -> Shown:
        """Return the batch of these rows; called by torch's DataLoader."""
        alerts = self.view[np.array(rows)].read()
        prepared = {name: torch.from_numpy(array) for name, array in prepare(alerts.raw, self.inputs).items()}
        images = torch.cat([prepared["images"], prepared["psf"]], dim=1) if "psf" in prepared else prepared["images"]
        return images, prepared.get("metadata", torch.empty(len(rows), 0)), torch.from_numpy(alerts.label)


def alerts_loader(
    view: View, inputs: Inputs, recipe: Recipe, hardware: Hardware, *, training: bool
) -> DataLoader[Shown]:
    """Return batches of the view; see `learner.loader`."""
    return loader(ShownAlerts(view, inputs), recipe, hardware, training=training, collate=_as_it_is)


def _as_it_is(batch: Any) -> Any:
    return batch


def chosen_to_train(view: View, n_classes: int, recipe: Recipe) -> View:
    """Return the alerts that the recipe trains on.

    They are a fraction of each class's sources, with at most N_max alerts of each source. For one seed, the selection
    of a smaller fraction is a subset of that of a larger one.
    """
    sources = sources_by_class(view.object_id, view.label, n_classes, recipe.seed)
    kept = np.concatenate([names[: max(1, round(recipe.fraction * len(names)))] for names in sources])
    rows = np.flatnonzero(np.isin(view.object_id, kept))
    rows = np.random.default_rng(recipe.seed).permutation(rows)
    order = rows[np.argsort(view.object_id[rows], kind="stable")]
    _, first, count = np.unique(view.object_id[order], return_index=True, return_counts=True)
    rank = np.arange(len(order)) - np.repeat(first, count)
    return view[np.sort(order[rank < recipe.max_alerts_per_source])]


def corrupt(view: View) -> NDArray[np.bool_]:
    """Return a mask bool[N] of alerts with a cutout that BTSbot calls corrupt (`make_triplet` in its `alert_utils.py`).

    Such a cutout has an infinite median, or consists of zeros and missing pixels only.
    """
    found = [np.zeros(0, np.bool_)]
    for alerts in view.batches(ALERTS_AT_ONCE):
        cutouts, boxes = alerts.cutouts, alerts.cutout_box
        bad = ~(np.nan_to_num(cutouts) != 0).any(axis=(2, 3))
        for n, channel in np.argwhere(np.isinf(cutouts).any(axis=(2, 3))).tolist():
            y0, x0, height, width = boxes[n, channel].tolist()
            bad[n, channel] |= np.isinf(np.nanmedian(cutouts[n, channel, y0 : y0 + height, x0 : x0 + width]))
        found.append(bad.any(axis=1))
    return np.concatenate(found)


def class_weights(label: NDArray[np.int64], n_classes: int, *, balance: bool) -> Tensor:
    """Return the weight of an alert of each class, float32[C].

    With `balance`, all classes have the same total weight.
    """
    count = np.bincount(label, minlength=n_classes)
    weights = len(label) / (n_classes * np.maximum(count, 1)) if balance else np.ones(n_classes)
    return torch.from_numpy(weights.astype(np.float32))


class Classifier(Learner):
    """A learner with a weighted cross-entropy loss, which is binary for two classes.

    Of two classes, only the loss of alerts of the second is weighted. `frozen`: modules whose weights stay fixed;
    `frozen_mode`: mode of these modules while the others are trained. In evaluation mode their batch statistics stay
    fixed as well.
    """

    def __init__(
        self,
        network: nn.Module,
        optimisation: Optimisation,
        weights: Tensor,
        frozen: Sequence[nn.Module] = (),
        frozen_mode: Literal["evaluation", "training"] = "evaluation",
    ) -> None:
        super().__init__(network, optimisation)
        self.frozen_mode = frozen_mode
        self.binary = len(weights) == 2
        self.loss: nn.Module = (
            nn.BCEWithLogitsLoss(pos_weight=weights[1] / weights[0]) if self.binary else nn.CrossEntropyLoss(weights)
        )
        self.frozen = tuple(frozen)
        for module in self.frozen:
            module.requires_grad_(False)

    def train(self, mode: bool = True) -> Classifier:
        """Set training mode, except for frozen modules that stay in evaluation mode."""
        super().train(mode)
        if self.frozen_mode == "evaluation":
            for module in self.frozen:
                module.eval()
        return self

    def loss_of(self, batch: tuple[Tensor, ...]) -> Tensor:
        """Return the mean loss of a batch (see `Shown`), a scalar."""
        images, metadata, label = batch
        logits, _ = self.network(images, metadata) if metadata.shape[1] else self.network(images)
        loss: Tensor = self.loss(logits[:, 0], label.to(logits.dtype)) if self.binary else self.loss(logits, label)
        return loss
