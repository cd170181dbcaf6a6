"""The training loop of all tasks: optimiser, learning-rate schedule, checkpoints, resuming, early stopping, logs.

Lightning runs the loop. A run that is killed and resumed gives the same result as an uninterrupted one. Nothing is ever
unpickled.
"""

from __future__ import annotations

import logging
import math
import pickle
import sys
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence, Sized
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR
from torch.utils.data import DataLoader, Dataset, Sampler

from broker_filter.scoring.bundle import Inputs
from broker_filter.scoring.runtimes import available_cores
from training.atomic_write import write_whole
from training.errors import TrainingError
from training.recipe import Hardware, Optimisation

SYMMETRIES = 8
"""Symmetries of the square: four rotations, each with and without a flip."""
EPOCHS_PER_SEED = 2**20
"""Distance between the random seeds of trainings with consecutive seeds. It is larger than any number of epochs, so
that their random draws never coincide."""
LAST, BEST = "last.ckpt", "best.ckpt"
LEARNED = "learned.yaml"
"""File with the result of a finished training."""
IMPROVED = "improved_val_loss"
"""Name in the logs of the validation loss of the best epoch so far. This loss decides which weights are kept and when
training stops."""
NETWORK = "network."
"""Prefix of the network's weights in a checkpoint."""

for library in ("lightning.pytorch", "lightning.fabric"):
    logging.getLogger(library).setLevel(logging.WARNING)  # at INFO they log every absent device

log = logging.getLogger(__name__)


class Learner(lightning.LightningModule):
    """A network and its loss. Batches are tuples whose first item is the images [N, C, S, S]."""

    lowest_loss: Tensor
    improved_loss: Tensor

    def __init__(self, network: nn.Module, optimisation: Optimisation) -> None:
        super().__init__()
        self.network = network
        self.optimisation = optimisation
        # Checkpoints hold the lowest loss, and the loss of the last epoch that improved it by `least_improvement`.
        self.register_buffer("lowest_loss", torch.tensor(torch.inf))
        self.register_buffer("improved_loss", torch.tensor(torch.inf))

    @abstractmethod
    def loss_of(self, batch: tuple[Tensor, ...]) -> Tensor:
        """Return the mean loss of a batch, a scalar."""

    def training_step(self, batch: tuple[Tensor, ...], _: int) -> Tensor:
        """Return the loss of a batch whose images are rotated and flipped at random."""
        images, *rest = batch
        images = orient(images) if self.optimisation.augment else images
        loss = self.loss_of((images.contiguous(memory_format=torch.channels_last), *rest))
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(images))
        return loss

    def validation_step(self, batch: tuple[Tensor, ...], _: int) -> None:
        """Log the loss of an unmodified batch."""
        loss = self.loss_of(batch)
        self.log("val_loss", loss, on_epoch=True, batch_size=len(batch[0]), sync_dist=True, prog_bar=True)

    def on_train_epoch_start(self) -> None:
        """Seed torch by the epoch, so that a resumed training repeats the augmentation and dropout of that epoch."""
        torch.manual_seed(self.optimisation.seed * EPOCHS_PER_SEED + self.current_epoch)

    def on_validation_epoch_end(self) -> None:
        """Log the validation loss, and the improved loss that decides what is kept and when to stop."""
        loss, epoch = float(self.trainer.callback_metrics["val_loss"]), self.current_epoch + 1
        if loss * (1 + self.optimisation.least_improvement) < float(self.lowest_loss):
            self.improved_loss.fill_(loss)
        self.lowest_loss.fill_(min(loss, float(self.lowest_loss)))
        self.log(IMPROVED, self.improved_loss if math.isfinite(loss) else loss)
        if self.trainer.is_global_zero:
            log.info("epoch %d of %d: validation loss %.4f", epoch, self.optimisation.epochs, loss)

    def configure_optimizers(self) -> Any:
        """Return AdamW with a learning rate that changes once per epoch, as published."""
        plan = self.optimisation
        optimizer = torch.optim.AdamW(
            [parameter for parameter in self.parameters() if parameter.requires_grad],
            lr=plan.learning_rate,
            betas=plan.betas,
            weight_decay=plan.weight_decay,
        )
        falling = plan.epochs - plan.warm_up_epochs
        schedule: LRScheduler = CosineAnnealingLR(optimizer, falling, eta_min=plan.learning_rate * plan.least)
        if plan.warm_up_epochs:
            rise = LinearLR(optimizer, start_factor=plan.least, total_iters=plan.warm_up_epochs)
            schedule = SequentialLR(optimizer, [rise, schedule], milestones=[plan.warm_up_epochs])
        return {"optimizer": optimizer, "lr_scheduler": schedule}


class OrderOfEpoch(Sampler[int]):
    """A sampler of all `n` items in an order that depends on the seed and the epoch only; Lightning sets the epoch.

    torch's own shuffling uses the same generator as augmentation and dropout, and Lightning starts to read a resumed
    epoch at another moment than an ordinary one: all random draws of that epoch would differ.
    """

    def __init__(self, n: int, seed: int) -> None:
        self.n = n
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return self.n

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; Lightning calls this before every epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        draws = torch.Generator().manual_seed(self.seed * EPOCHS_PER_SEED + self.epoch)
        yield from torch.randperm(self.n, generator=draws).tolist()


def loader(
    items: Dataset[Any],
    optimisation: Optimisation,
    hardware: Hardware,
    *,
    training: bool,
    collate: Callable[[Any], Any] | None = None,
) -> DataLoader[Any]:
    """Return batches of the items: for training shuffled and all of full size, otherwise in order."""
    assert isinstance(items, Sized)
    n = len(items)
    return DataLoader(
        items,
        batch_size=optimisation.batch,
        sampler=OrderOfEpoch(n, optimisation.seed) if training else None,
        drop_last=training and n >= optimisation.batch,  # batch normalisation fails on a last batch of one alert
        num_workers=hardware.workers,
        collate_fn=collate,
        generator=torch.Generator(),  # a separate generator: see `OrderOfEpoch`
    )


def orient(images: Tensor) -> Tensor:
    """Apply a random symmetry of the square to each of the images [N, C, S, S]."""
    symmetry = torch.randint(SYMMETRIES, (len(images),), device=images.device)
    oriented = torch.empty_like(images)
    for k in range(SYMMETRIES):
        chosen = symmetry == k
        turned = torch.rot90(images[chosen], k % 4, (-2, -1))
        oriented[chosen] = turned.flip(-1) if k >= 4 else turned
    return oriented


def check_takes(network: nn.Module, inputs: Inputs) -> None:
    """Raise TrainingError if the network does not accept `inputs`."""
    blank = [torch.zeros(2, *shape) for shape in inputs.shapes().values()]
    try:
        with torch.inference_mode():
            network.eval()(*blank)  # in training mode batch normalisation would learn their statistics
    except Exception as error:  # networks raise exceptions of any type
        shapes = " and ".join(f"{name} {shape}" for name, shape in inputs.shapes().items())
        reason = str(error).partition("\n")[0]
        raise TrainingError(f"the network cannot take {shapes}: {reason}") from error
    network.train()


def learn(
    learner: Learner,
    train: DataLoader[Any],
    validation: DataLoader[Any],
    directory: Path,
    hardware: Hardware,
    logs: Sequence[Literal["csv", "tensorboard"]],
) -> dict[str, float | int | str]:
    """Train, or resume if `directory` has checkpoints; the network ends with the best weights, on the CPU.

    Returns the epoch of these weights and its validation loss (the lowest, subject to `least_improvement`). Raises
    TrainingError if a checkpoint is incomplete, the hardware is not available or training diverged, and
    KeyboardInterrupt if the user interrupted it.
    """
    learned = directory / LEARNED
    if learned.exists():
        figures: dict[str, float | int | str] = yaml.safe_load(learned.read_bytes())
    else:
        figures = _train(learner, train, validation, directory, hardware, logs)
        rank_zero_only(write_whole)(learned, yaml.safe_dump(figures).encode())
    checkpoint = read_checkpoint(directory / BEST)
    weights = {name: tensor for name, tensor in checkpoint["state_dict"].items() if name.startswith(NETWORK)}
    learner.network.cpu().to(memory_format=torch.contiguous_format)  # the layout in files
    learner.network.load_state_dict({name.removeprefix(NETWORK): tensor for name, tensor in weights.items()})
    learner.network.eval()
    return figures


def _train(
    learner: Learner,
    train: DataLoader[Any],
    validation: DataLoader[Any],
    directory: Path,
    hardware: Hardware,
    logs: Sequence[Literal["csv", "tensorboard"]],
) -> dict[str, float | int | str]:
    if hardware.threads:
        torch.set_num_threads(hardware.threads)
    on_cpu = hardware.accelerator == "cpu" or (hardware.accelerator == "auto" and not torch.accelerator.is_available())
    if on_cpu and isinstance(hardware.devices, int) and hardware.devices > available_cores():
        raise TrainingError(
            f"hardware: {hardware.devices} devices on a CPU mean {hardware.devices} processes, but there are only "
            f"{available_cores()} cores: give fewer devices"
        )
    best = ModelCheckpoint(directory, Path(BEST).stem, monitor=IMPROVED, enable_version_counter=False)
    # Not `save_last`, which writes only after an improvement.
    latest = ModelCheckpoint(directory, Path(LAST).stem, enable_version_counter=False)
    loggers: list[Logger] = []
    if "csv" in logs:
        loggers.append(CSVLogger(directory, name="log"))
    if "tensorboard" in logs:
        loggers.append(TensorBoardLogger(directory, name="tensorboard"))
    try:
        trainer = lightning.Trainer(
            accelerator=hardware.accelerator,
            devices=hardware.devices,
            precision=hardware.precision,
            max_epochs=learner.optimisation.epochs,
            callbacks=[best, latest, EarlyStopping(IMPROVED, patience=learner.optimisation.patience)],
            logger=loggers,
            default_root_dir=directory,
            num_sanity_val_steps=0,
            enable_model_summary=False,
            enable_progress_bar=sys.stderr.isatty(),
        )
    except MisconfigurationException as error:  # devices that do not exist
        reason = str(error).partition("\n")[0]
        raise TrainingError(
            f"hardware: {reason}: set accelerator and devices to values that this machine has, or to auto"
        ) from error
    learner.network.to(memory_format=torch.channels_last)  # up to twice as fast with many channels
    last = directory / LAST
    if last.exists():
        read_checkpoint(last)  # gives a clear error, unlike Lightning
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")  # advice about workers and logging intervals
        trainer.fit(learner, train, validation, ckpt_path=last if last.exists() else None, weights_only=True)
    if trainer.interrupted:
        raise KeyboardInterrupt
    assert best.best_model_score is not None  # there was at least one epoch
    if not best.best_model_score.isfinite():
        raise TrainingError(
            f"{directory}: training diverged: the validation loss was NaN or infinite in every epoch; try a lower "
            "learning_rate, in another directory"
        )
    epoch = int(read_checkpoint(directory / BEST)["epoch"]) + 1
    return {"epoch": epoch, "validation_loss": round(float(best.best_model_score), 5)}


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return a checkpoint: tensors and plain values. Raises TrainingError if it is incomplete or of another kind."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0]
        raise TrainingError(f"{path}: not a complete checkpoint ({reason}): remove it to start again") from error
    if not isinstance(checkpoint, dict) or not {"state_dict", "epoch"} <= checkpoint.keys():
        raise TrainingError(f"{path}: not a checkpoint of this training: remove it to start again")
    return checkpoint
