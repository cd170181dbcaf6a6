"""Simulated alerts, labelled by truth, to pre-train an encoder on. No person and no network has labelled them."""

from __future__ import annotations

from typing import Literal

import numpy as np

from broker_filter.simulate import REAL
from training.data.simulated import KINDS, simulate_cutouts
from training.vision.galaxies import AnsweredImages, equal

QUESTIONS = ("alert_real", *(f"alert_{kind}" for kind in KINDS))
"""Whether the alert shows a change in the sky, and whether it is of a kind, each 0 or 1."""


def simulate_alerts(n: int, seed: int, survey: Literal["ztf", "lsst"], size: int = 63) -> AnsweredImages:
    """Simulate `n` alerts of a survey, with the cutouts that the decoder delivers for slots of `size` pixels."""
    cutouts, boxes, kinds = simulate_cutouts(n, seed, survey, size)
    answers = [np.isin(kinds, tuple(REAL)), *(kinds == kind for kind in KINDS)]
    return AnsweredImages(
        cutouts,
        boxes,
        np.stack(answers, axis=1).astype(np.float32),
        QUESTIONS,
        f"{len(cutouts)} simulated alerts of {survey.upper()}, labelled by truth",
        equal(len(cutouts)),
    )
