"""Checkpoints of trainings that are counted in steps. `learner` leaves its checkpoints to Lightning.

A training that is killed and resumed from its checkpoint gives the same result as an uninterrupted one. Nothing is ever
unpickled.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from training.atomic_write import write_whole
from training.errors import TrainingError

log = logging.getLogger(__name__)


class Part(Protocol):
    """A part of a training that changes with every step: a network, an optimiser, a random number generator."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state: tensors and plain values."""

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any:
        """Restore a state that `state_dict` returned."""


def beside(bundle: Path) -> Path:
    """Return the default path of the checkpoint of a training that will write `bundle`."""
    return bundle.with_name(f"{bundle.name}.ckpt")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The state of a training in the file `path`; with `path` None nothing is saved.

    `training`: a text that describes the arguments of the training; the file of another training is refused. `every`:
    steps between saves.
    """

    path: Path | None
    training: str
    every: int
    parts: Mapping[str, Part]

    def resume(self) -> int:
        """Restore the saved state and return the number of steps made; 0 if there is none.

        Raises TrainingError if the file is incomplete, or of another training.
        """
        if self.path is None or not self.path.exists():
            return 0
        try:
            saved = torch.load(self.path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
            raise TrainingError(f"{self.path}: not a complete checkpoint: remove it to start again") from error
        if not isinstance(saved, dict) or saved.get("recipe") != self.training:
            raise TrainingError(
                f"{self.path}: belongs to a training with other arguments: remove it, or give the same arguments"
            )
        for name, part in self.parts.items():
            part.load_state_dict(saved[name])
        log.info("continuing from %s after step %d", self.path, saved["step"])
        return int(saved["step"])

    def passed(self, step: int, steps: int) -> None:
        """Record that `step` of `steps` steps are done: save after each `every` steps, and after the last."""
        if self.path is None or (step % self.every and step != steps):
            return
        content = {"recipe": self.training, "step": step, **{name: p.state_dict() for name, p in self.parts.items()}}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, lambda path: torch.save(content, path))
