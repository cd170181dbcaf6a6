"""A network in training: the alerts that it is shown, what it is told of them, how its weights move.

Shows a network exactly what serving would: the data set's raw cutouts through `scoring.preprocess`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import lightning
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR
from torch.utils.data import DataLoader

from broker_filter.scoring.bundle import Inputs
from broker_filter.scoring.preprocess import prepare_images, prepare_metadata
from training.datasets import View, sources_by_class
from training.recipe import Hardware, Recipe

SYMMETRIES = 8
"""Of the square: four turns, each with and without a flip."""
EPOCHS_PER_SEED = 2**20
"""More than a seed ever trains, so that no epoch of one seed draws what another's does."""

log = logging.getLogger(__name__)

Shown = tuple[Tensor, Tensor, Tensor]
"""N alerts: images float32[N, C, S, S], metadata float32[N, F], classes int64[N]."""


class ShownAlerts(torch.utils.data.Dataset[Shown]):
    """A view's alerts as the network is shown them, a batch at a time."""

    def __init__(self, view: View, inputs: Inputs) -> None:
        self.view = view
        self.inputs = inputs

    def __len__(self) -> int:
        return len(self.view)

    def __getitems__(self, rows: Sequence[int]) -> Shown:
        """What torch's loader asks for: the batch of these rows."""
        alerts = self.view[np.array(rows)].read()
        images = prepare_images(alerts.cutouts, alerts.cutout_box, self.inputs.images)
        metadata = prepare_metadata(alerts.metadata, alerts.columns, self.inputs.metadata)
        return torch.from_numpy(images), torch.from_numpy(metadata), torch.from_numpy(alerts.label)


def loader(view: View, inputs: Inputs, recipe: Recipe, hardware: Hardware, *, training: bool) -> DataLoader[Shown]:
    """Batches of the view: shuffled and whole ones to train on, all of it in order otherwise."""
    return DataLoader(
        ShownAlerts(view, inputs),
        batch_size=recipe.batch,
        shuffle=training,
        drop_last=training and len(view) >= recipe.batch,  # a last batch of one alert has no variance to normalise by
        num_workers=hardware.workers,
        collate_fn=_as_it_is,
    )


def _as_it_is(batch: Any) -> Any:
    return batch


def chosen_to_train(view: View, n_classes: int, recipe: Recipe) -> View:
    """The alerts that the recipe trains on: of a fraction of each class's sources, N_max of each at most.

    A smaller fraction of the same seed is a part of a larger one.
    """
    sources = sources_by_class(view.object_id, view.label, n_classes, recipe.seed)
    kept = np.concatenate([names[: max(1, round(recipe.fraction * len(names)))] for names in sources])
    rows = np.flatnonzero(np.isin(view.object_id, kept))
    rows = np.random.default_rng(recipe.seed).permutation(rows)
    order = rows[np.argsort(view.object_id[rows], kind="stable")]
    _, first, count = np.unique(view.object_id[order], return_index=True, return_counts=True)
    rank = np.arange(len(order)) - np.repeat(first, count)
    return view[np.sort(order[rank < recipe.max_alerts_per_source])]


def class_weights(label: NDArray[np.int64], n_classes: int, *, balance: bool) -> Tensor:
    """What each class's alerts count, float32[C]: with `balance`, all of a class as much as all of another."""
    count = np.bincount(label, minlength=n_classes)
    weights = len(label) / (n_classes * np.maximum(count, 1)) if balance else np.ones(n_classes)
    return torch.from_numpy(weights.astype(np.float32))


class Classifier(lightning.LightningModule):
    """Two classes: binary cross-entropy of the second, its alerts weighted; more: cross-entropy of weighted classes.

    `frozen`: modules whose weights, and statistics, stay as they are.
    """

    def __init__(self, network: nn.Module, recipe: Recipe, weights: Tensor, frozen: Sequence[nn.Module] = ()) -> None:
        super().__init__()
        self.network = network
        self.recipe = recipe
        self.frozen = tuple(frozen)
        for module in self.frozen:
            module.requires_grad_(False)
        binary = len(weights) == 2
        self.loss: nn.Module = (
            nn.BCEWithLogitsLoss(pos_weight=weights[1] / weights[0]) if binary else nn.CrossEntropyLoss(weights)
        )
        self.binary = binary

    def train(self, mode: bool = True) -> Classifier:
        """Training mode, the frozen modules excepted."""
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self

    def training_step(self, batch: Shown, _: int) -> Tensor:
        """The loss of a batch, its images turned at random."""
        images, metadata, label = batch
        loss = self._loss(orient(images) if self.recipe.augment else images, metadata, label)
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(label))
        return loss

    def validation_step(self, batch: Shown, _: int) -> None:
        """Logs the loss of a batch as it is."""
        loss = self._loss(*batch)
        self.log("val_loss", loss, on_epoch=True, batch_size=len(batch[2]), sync_dist=True, prog_bar=True)

    def on_train_epoch_start(self) -> None:
        """Seeds by the epoch, so that training resumes with the order and the turns that it would have gone on with."""
        torch.manual_seed(self.recipe.seed * EPOCHS_PER_SEED + self.current_epoch)

    def on_validation_epoch_end(self) -> None:
        """Says how far training has come."""
        loss = float(self.trainer.callback_metrics["val_loss"])
        log.info("epoch %d of %d: validation loss %.4f", self.current_epoch + 1, self.recipe.epochs, loss)

    def configure_optimizers(self) -> Any:
        """AdamW; each epoch its own learning rate, a linear rise and then half a cosine, as published."""
        recipe = self.recipe
        optimizer = torch.optim.AdamW(
            [parameter for parameter in self.network.parameters() if parameter.requires_grad],
            lr=recipe.learning_rate,
            betas=recipe.betas,
            weight_decay=recipe.weight_decay,
        )
        warm_up, falling = recipe.warm_up_epochs, recipe.epochs - recipe.warm_up_epochs
        schedule: LRScheduler = CosineAnnealingLR(optimizer, falling, eta_min=recipe.learning_rate * recipe.least)
        if warm_up:
            rise = LinearLR(optimizer, start_factor=recipe.least, total_iters=warm_up)
            schedule = SequentialLR(optimizer, [rise, schedule], milestones=[warm_up])
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def _loss(self, images: Tensor, metadata: Tensor, label: Tensor) -> Tensor:
        logits, _ = self.network(images, metadata) if metadata.shape[1] else self.network(images)
        loss: Tensor = self.loss(logits[:, 0], label.to(logits.dtype)) if self.binary else self.loss(logits, label)
        return loss


def orient(images: Tensor) -> Tensor:
    """Each of the images [N, C, S, S] in one of the square's symmetries, drawn at random."""
    symmetry = torch.randint(SYMMETRIES, (len(images),), device=images.device)
    oriented = torch.empty_like(images)
    for k in range(SYMMETRIES):
        chosen = symmetry == k
        turned = torch.rot90(images[chosen], k % 4, (-2, -1))
        oriented[chosen] = turned.flip(-1) if k >= 4 else turned
    return oriented
