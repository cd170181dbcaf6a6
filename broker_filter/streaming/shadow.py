"""Scores batches with shadow models: models on trial, beside the serving ones.

Nothing that serves depends on a shadow model. Its outputs go to `<prefix>.shadow` and into metrics only. If it fails,
the error is logged and counted, and the stream goes on without its outputs.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from broker_filter.scoring.scorer import Model
from broker_filter.scoring.scores import ModelScores
from broker_filter.streaming.scored import ScoredBatch

THRESHOLD = 0.5
"""Two models disagree on an alert if one gives a probability of at least this value and the other does not."""
SAY_AGAIN_S = 60.0
"""Time in seconds until the next error of the same shadow model is logged, because each batch may have one."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Difference:
    """How far one output of a shadow model differs from that of a serving model, over the alerts of a batch."""

    label: str
    compared: int
    """Alerts, without duplicates, for which both models give the output."""
    absolute: float
    """Sum of the absolute differences over these alerts."""
    disagreeing: int
    """How many of these alerts are on different sides of THRESHOLD."""


@dataclass(frozen=True, slots=True)
class ShadowOutcome:
    """What one shadow model made of a batch, in numbers of alerts."""

    model: str
    version: str
    scored: int = 0
    """Scored alerts, without duplicates, that the shadow model scored too."""
    failed: int = 0
    """All alerts of the batch if the shadow model raised an error; otherwise 0."""
    differences: tuple[Difference, ...] = ()


def counterpart(model: str, label: str, serving: Mapping[str, Sequence[str]]) -> str | None:
    """Return the name of the serving model with which a shadow model's output is compared.

    It is the serving model of the same name if that gives `label`, or else the first that does; None if none does.
    `serving`: the labels of each serving model, by name.
    """
    giving = [name for name, labels in serving.items() if label in labels]
    return model if model in giving else next(iter(giving), None)


class ShadowScorer:
    """The shadow models of a configuration. One thread calls `score`."""

    def __init__(self, models: Sequence[Model], clock: Callable[[], float] = time.monotonic) -> None:
        """`models`: the shadow models, loaded and checked. `clock`: returns monotonic seconds."""
        self.models = tuple(models)
        self._clock = clock
        self._said: dict[tuple[str, str], float] = {}

    def score(self, scored: ScoredBatch) -> tuple[ScoredBatch, list[ShadowOutcome]]:
        """Return the batch with the outputs of the shadow models, and the outcome of each model.

        The outputs of a model that failed are left out. No exception of a model is raised.
        """
        outputs, outcomes = [], []
        for model in self.models:
            try:
                scores = model.score(scored.alerts)
                outcomes.append(_outcome(scores, scored))
                outputs.append(scores)
            except Exception as error:  # whatever a model on trial does, the stream goes on
                outcomes.append(ShadowOutcome(model.name, model.version, failed=len(scored.alerts)))
                self._say(model, error)
        return replace(scored, shadows=tuple(outputs)), outcomes

    def _say(self, model: Model, error: Exception) -> None:
        key, now = (model.name, model.version), self._clock()
        if now - self._said.get(key, -math.inf) >= SAY_AGAIN_S:
            self._said[key] = now
            log.error(
                "shadow model %s %s failed on a batch, whose records are without its outputs: %s",
                *(model.name, model.version, error),
                exc_info=error,
            )


def _outcome(shadow: ModelScores, scored: ScoredBatch) -> ShadowOutcome:
    counted = scored.scores.taken & ~scored.duplicate
    serving = {scores.model: scores for scores in scored.scores.models}
    differences = []
    for c, label in enumerate(shadow.labels):
        name = counterpart(shadow.model, label, {name: scores.labels for name, scores in serving.items()})
        if name is not None:
            old = serving[name].probabilities[:, serving[name].labels.index(label)]
            differences.append(_difference(label, old[counted], shadow.probabilities[counted, c]))
    return ShadowOutcome(
        shadow.model, shadow.version, scored=int((counted & shadow.taken).sum()), differences=tuple(differences)
    )


def _difference(label: str, old: NDArray[np.float32], new: NDArray[np.float32]) -> Difference:
    """Compare the probabilities of the serving and the shadow model, float32[N]; rows with NaN are left out."""
    both = np.isfinite(old) & np.isfinite(new)
    old, new = old[both], new[both]
    absolute = float(np.abs(new - old).sum(dtype=np.float64))
    return Difference(label, len(old), absolute, int(((old >= THRESHOLD) != (new >= THRESHOLD)).sum()))
