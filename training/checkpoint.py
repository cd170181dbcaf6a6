"""How far a training that is counted in steps has come, in a file: what `learner` leaves to Lightning, for other loops.

A training that was killed and goes on from its file ends as one that was not. Nothing is ever unpickled.
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
    """Something of a training that changes with every step: a network, an optimiser, the state of random numbers."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any:
        """Takes what `state_dict` gave."""


def beside(bundle: Path) -> Path:
    """Where a training keeps its checkpoint that is to become `bundle`, unless it is told otherwise."""
    return bundle.with_name(f"{bundle.name}.ckpt")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A training's state in the file `path`; nothing is kept where it is None.

    `training`: what it is trained with, in words; a file of another training is refused. `every`: steps between files.
    """

    path: Path | None
    training: str
    every: int
    parts: Mapping[str, Part]

    def resume(self) -> int:
        """Restores what was saved; returns after how many steps that was. Raises TrainingError where the file is not
        whole, or of another training."""
        if self.path is None or not self.path.exists():
            return 0
        try:
            saved = torch.load(self.path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
            raise TrainingError(f"{self.path}: not a whole checkpoint: remove it to begin again") from error
        if not isinstance(saved, dict) or saved.get("recipe") != self.training:
            raise TrainingError(
                f"{self.path}: is of another training: remove it, or give the arguments that it was begun with"
            )
        for name, part in self.parts.items():
            part.load_state_dict(saved[name])
        log.info("continuing from %s after step %d", self.path, saved["step"])
        return int(saved["step"])

    def passed(self, step: int, steps: int) -> None:
        """To be called when `step` of `steps` steps were made. Saves now and then, and after the last."""
        if self.path is None or (step % self.every and step != steps):
            return
        content = {"recipe": self.training, "step": step, **{name: p.state_dict() for name, p in self.parts.items()}}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, lambda path: torch.save(content, path))
