"""`astrom3`: trains AstroM3 as published: contrastive pre-training, or classifiers of one or all modalities.

It writes a checkpoint in the published layout (`checkpoint/`, the input of `pretrained`) and, for a classifier, its
figures on the test split (`figures.yaml`). It may be killed at any time: the same command resumes after the last
complete epoch.

There are two differences from the published code: the best weights and early stopping are chosen by the validation
loss, not by the accuracy; and validation and test use all keys (`informer.py`), so that they are reproducible.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from lightning.pytorch.utilities import rank_zero_only
from numpy.typing import NDArray
from torch import Tensor
from torch.optim.lr_scheduler import LinearLR, LRScheduler, ReduceLROnPlateau
from torch.utils.data import DataLoader

from training.astrom3.model.checkpoint import Network, load_network, write_network
from training.astrom3.model.galspecnet import SpectraClassifier
from training.astrom3.model.informer import Informer, PhotometryClassifier
from training.astrom3.model.metadata import MetadataClassifier
from training.astrom3.model.network import (
    CLASSES,
    AstroM3,
    AstroM3Arguments,
    AstroM3Classifier,
    Stars,
    contrastive_losses,
)
from training.astrom3.recipe import AstroM3Run, Mode, Recipe
from training.astrom3.stars import Shown, ShownStars, Split, StarSet, read_stars
from training.atomic_write import write_whole
from training.errors import TrainingError
from training.learner import Learner, learn, loader
from training.recipe import begin, read_configuration

CHECKPOINT = "checkpoint"
FIGURES = "figures.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `astrom3`."""
    parser.add_argument(
        "configuration",
        type=Path,
        metavar="ASTROM3.yaml",
        help="YAML file with the keys of `training.astrom3.recipe.AstroM3Run`",
    )


def run(arguments: argparse.Namespace) -> None:
    """Train, or resume training, and print the figures."""
    config = read_configuration(AstroM3Run, arguments.configuration)
    figures = train(config)
    rank_zero_only(print)(
        f"{config.out / CHECKPOINT}: {', '.join(f'{name} {value}' for name, value in figures.items())}"
    )


def train(config: AstroM3Run) -> dict[str, Any]:
    """Train a network, write its checkpoint and its figures, and return the figures.

    Raises TrainingError if the directory was started with another configuration or `pretrained` does not fit,
    DatasetError if the stars cannot be read, and BundleError if a checkpoint cannot be read.
    """
    begin(config.out, config)
    if (config.out / FIGURES).exists():
        done: dict[str, Any] = yaml.safe_load((config.out / FIGURES).read_bytes())
        return done
    torch.manual_seed(config.seed)
    network = build(config.mode, config.network)
    if config.pretrained:
        begin_with(network, config.pretrained)
    plan = config.plan

    def batches(split: Split) -> DataLoader[Shown]:
        return shown(read_stars(config.stars, config.subset, config.seed, split), config, split)

    figures: dict[str, Any] = learn(
        StarLearner(network, plan), batches("train"), batches("validation"), config.out, config.hardware, config.logs
    )
    if config.mode != "clip":
        test = batches("test")
        figures |= measure(np.concatenate([label for *_, label in test]), predict(network, test))
    rank_zero_only(write_network)(config.out / CHECKPOINT, network)
    rank_zero_only(write_whole)(config.out / FIGURES, yaml.safe_dump(figures, sort_keys=False).encode())
    return figures


def build(mode: Mode, arguments: AstroM3Arguments) -> Network:
    """Return the network of a mode; a network of a single modality uses its part of the arguments."""
    classify = {"classification": True}
    match mode:
        case "clip":
            return AstroM3(arguments)
        case "all":
            return AstroM3Classifier(arguments)
        case "photo":
            return PhotometryClassifier(arguments.photometry.model_copy(update=classify))
        case "spectra":
            return SpectraClassifier(arguments.spectra.model_copy(update=classify))
        case "meta":
            return MetadataClassifier(arguments.metadata.model_copy(update=classify))


def begin_with(network: Network, pretrained: Path) -> None:
    """Load the encoders of a pre-trained AstroM3 into a classifier; its last layer is not changed.

    Raises TrainingError if the checkpoint holds another network, or its parameters have other shapes.
    """
    source = load_network(pretrained)
    if type(source) is not AstroM3:
        raise TrainingError(f"{pretrained}: holds a {type(source).__name__}, not a pre-trained AstroM3")
    part: torch.nn.Module = source
    if not isinstance(network, AstroM3):
        encoders = (source.photometry_encoder, source.spectra_encoder, source.metadata_encoder)
        part = next(encoder for encoder in encoders if isinstance(network, type(encoder)))
    try:
        absent = network.load_state_dict(part.state_dict(), strict=False)
    except RuntimeError as error:
        raise TrainingError(f"{pretrained}: does not fit this network: {error}") from error
    assert not absent.unexpected_keys
    assert {name.partition(".")[0] for name in absent.missing_keys} == {"fc"}


def classify(network: Network, stars: Stars, keys: Tensor | None = None) -> Tensor:
    """Return a classifier's logits [N, classes] for the modalities that it takes."""
    if isinstance(network, PhotometryClassifier):
        return network(stars.photometry, stars.mask, keys)  # type: ignore[no-any-return]
    if isinstance(network, SpectraClassifier):
        return network(stars.spectra)  # type: ignore[no-any-return]
    if isinstance(network, MetadataClassifier):
        return network(stars.metadata)  # type: ignore[no-any-return]
    return network(stars, keys)  # type: ignore[no-any-return]


class StarLearner(Learner):
    """AstroM3 learns to match light curve, spectrum and metadata of the same star; a classifier learns the class."""

    network: Network
    optimisation: Recipe

    def training_step(self, batch: tuple[Tensor, ...], _: int) -> Tensor:
        """Return the loss of a batch; light curves, spectra and metadata are not augmented."""
        loss = self.loss_of(batch)
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(batch[0]))
        return loss

    def loss_of(self, batch: tuple[Tensor, ...]) -> Tensor:
        """Return the mean loss of a batch (see `Shown`)."""
        *inputs, label = batch
        stars = Stars(*inputs)
        keys = self._draw_keys()
        if isinstance(self.network, AstroM3) and not isinstance(self.network, AstroM3Classifier):
            return contrastive_losses(self.network.pair_logits(self.network.embed(stars, keys))).sum()
        return torch.nn.functional.cross_entropy(classify(self.network, stars, keys), label)

    def _draw_keys(self) -> Tensor | None:
        encoder = self.network.photometry_encoder if isinstance(self.network, AstroM3) else self.network
        if self.training and self.optimisation.sampled_keys and isinstance(encoder, Informer):
            return encoder.draw_keys().to(self.device)
        return None

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:  # noqa: ARG002
        """Clip gradients."""
        if self.optimisation.max_gradient_norm:
            torch.nn.utils.clip_grad_norm_(self.parameters(), self.optimisation.max_gradient_norm)

    def configure_optimizers(self) -> Any:
        """Return Adam with L2 regularisation in the gradient, as published."""
        plan = self.optimisation
        optimizer = torch.optim.Adam(
            self.parameters(), lr=plan.learning_rate, betas=plan.betas, weight_decay=plan.weight_decay
        )
        schedules: list[Any] = [
            {
                "scheduler": ReduceLROnPlateau(optimizer, factor=plan.plateau_factor, patience=plan.plateau_patience),
                "monitor": "val_loss",
            }
        ]
        if plan.warm_up_epochs:
            schedules.append(LinearLR(optimizer, start_factor=plan.least, total_iters=plan.warm_up_epochs))
        return [optimizer], schedules

    def lr_scheduler_step(self, scheduler: LRScheduler | ReduceLROnPlateau, metric: Any) -> None:
        """Apply the warm-up first, and the reduction by validation loss after it."""
        warming_up = self.current_epoch < self.optimisation.warm_up_epochs
        if isinstance(scheduler, ReduceLROnPlateau):
            if not warming_up:
                scheduler.step(metric)
        elif warming_up:
            scheduler.step()


@torch.inference_mode()
def predict(network: Network, batches: DataLoader[Shown]) -> NDArray[np.int64]:
    """Return the most probable class of every star, int64[N], an index into CLASSES."""
    logits = [classify(network, Stars(*inputs)) for *inputs, _ in batches]
    classes: NDArray[np.int64] = torch.cat(logits).argmax(1).numpy()
    return classes


def measure(label: NDArray[np.int64], predicted: NDArray[np.int64]) -> dict[str, float]:
    """Return accuracy (as in the paper), balanced accuracy (mean recall of the classes), and the recall of each class.

    `label` and `predicted`: int64[N], indices into CLASSES.
    """
    right = label == predicted
    recall = {name: float(right[label == i].mean()) for i, name in enumerate(CLASSES) if (label == i).any()}
    figures = {
        "accuracy": float(right.mean()),
        "balanced_accuracy": float(np.mean(list(recall.values()))),
        **{f"recall_{name}": value for name, value in recall.items()},
    }
    return {name: round(value, 4) for name, value in figures.items()}


def shown(stars: StarSet, config: AstroM3Run, split: Split) -> DataLoader[Shown]:
    """Return batches of stars; the training split is shuffled and cut at random places."""
    plan = config.plan
    training = split == "train"
    items = ShownStars(stars, config.network.seq_len, plan.seed if training else None)
    return loader(items, plan, config.hardware, training=training, collate=_as_it_is)


def _as_it_is(batch: Any) -> Any:
    return batch
