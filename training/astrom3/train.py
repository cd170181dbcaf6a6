"""`astrom3`: trains AstroM3 as published: its contrastive pre-training, and classifiers of one modality or of all.

Writes a checkpoint in the published layout (`checkpoint/`, which `pretrained` takes) and, of a classifier, what it is
worth on the test split (`figures.yaml`). May be killed at any time: the same command goes on from the last epoch.
Differs from the published code in that the weights kept are those of the lowest validation loss, by which it stops too,
not of the highest accuracy; and that validation and test see all keys (`informer.py`), so that they can be repeated.
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
    """What `astrom3` takes."""
    parser.add_argument("configuration", type=Path, metavar="ASTROM3.yaml", help="what `AstroM3Run` documents")


def run(arguments: argparse.Namespace) -> None:
    """Trains, or goes on training, and says what came of it."""
    config = read_configuration(AstroM3Run, arguments.configuration)
    figures = train(config)
    rank_zero_only(print)(
        f"{config.out / CHECKPOINT}: {', '.join(f'{name} {value}' for name, value in figures.items())}"
    )


def train(config: AstroM3Run) -> dict[str, Any]:
    """Trains a network, writes its checkpoint and its figures, and returns these.

    Raises TrainingError where the directory was begun with another configuration or `pretrained` does not fit,
    DatasetError where the stars cannot be read, BundleError where a checkpoint cannot.
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
    """The network of a mode; one of a single modality, with its part of the arguments."""
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
    """Gives a classifier the encoders of a pre-trained AstroM3; its last layer stays as it is.

    Raises TrainingError where that is another network, or its parameters have other shapes.
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
    """A classifier's logits [N, classes], of what it takes of the stars."""
    if isinstance(network, PhotometryClassifier):
        return network(stars.photometry, stars.mask, keys)  # type: ignore[no-any-return]
    if isinstance(network, SpectraClassifier):
        return network(stars.spectra)  # type: ignore[no-any-return]
    if isinstance(network, MetadataClassifier):
        return network(stars.metadata)  # type: ignore[no-any-return]
    return network(stars, keys)  # type: ignore[no-any-return]


class StarLearner(Learner):
    """AstroM3 learns which spectrum, light curve and metadata are of one star; a classifier, which class it is of."""

    network: Network
    optimisation: Recipe

    def training_step(self, batch: tuple[Tensor, ...], _: int) -> Tensor:
        """The loss of a batch; there is no image in it to be turned."""
        loss = self.loss_of(batch)
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(batch[0]))
        return loss

    def loss_of(self, batch: tuple[Tensor, ...]) -> Tensor:
        """See `Shown`."""
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
        """Shortens gradients that are too long."""
        if self.optimisation.max_gradient_norm:
            torch.nn.utils.clip_grad_norm_(self.parameters(), self.optimisation.max_gradient_norm)

    def configure_optimizers(self) -> Any:
        """Adam, with the weights' decay in the gradient, as published."""
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
        """The learning rate rises first; only after that does it heed the validation loss."""
        warming_up = self.current_epoch < self.optimisation.warm_up_epochs
        if isinstance(scheduler, ReduceLROnPlateau):
            if not warming_up:
                scheduler.step(metric)
        elif warming_up:
            scheduler.step()


@torch.inference_mode()
def predict(network: Network, batches: DataLoader[Shown]) -> NDArray[np.int64]:
    """The most probable class of every star, index into CLASSES."""
    logits = [classify(network, Stars(*inputs)) for *inputs, _ in batches]
    classes: NDArray[np.int64] = torch.cat(logits).argmax(1).numpy()
    return classes


def measure(label: NDArray[np.int64], predicted: NDArray[np.int64]) -> dict[str, float]:
    """Accuracy, as the paper reports it; balanced accuracy, the mean of the classes' recalls; and these."""
    right = label == predicted
    recall = {name: float(right[label == i].mean()) for i, name in enumerate(CLASSES) if (label == i).any()}
    figures = {
        "accuracy": float(right.mean()),
        "balanced_accuracy": float(np.mean(list(recall.values()))),
        **{f"recall_{name}": value for name, value in recall.items()},
    }
    return {name: round(value, 4) for name, value in figures.items()}


def shown(stars: StarSet, config: AstroM3Run, split: Split) -> DataLoader[Shown]:
    """Batches of stars as a training is shown them: the split to train on shuffled and cut at random."""
    plan = config.plan
    training = split == "train"
    items = ShownStars(stars, config.network.seq_len, plan.seed if training else None)
    return loader(items, plan, config.hardware, training=training, collate=_as_it_is)


def _as_it_is(batch: Any) -> Any:
    return batch
