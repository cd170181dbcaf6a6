"""A reference set of random embeddings of two modalities, for two surveys."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from broker_filter.anomalies.neighbours import normalise
from broker_filter.anomalies.reference import (
    Reference,
    ReferenceAlerts,
    SurveyCounts,
    SurveyReference,
    make_reference,
)
from broker_filter.packets.batch import Survey
from broker_filter.scoring.bundle import Bundle, Card, open_bundle

MODALITIES = ("image", "light_curve")


def bundle_with(card: Card) -> Bundle:
    """Return a bundle of one network with this card."""
    part = open_bundle("default").part("ztf")
    return Bundle(part.directory, card, (replace(part, card=card),))


def bundle_with_modalities(modalities: tuple[str, ...]) -> Bundle:
    """Return a bundle whose embedding consists of these modalities."""
    shipped = open_bundle("default").part("ztf").card
    outputs = shipped.outputs.model_copy(update={"embedding": 8, "modalities": modalities})
    return bundle_with(shipped.model_copy(update={"outputs": outputs}))


@pytest.fixture
def bundle() -> Bundle:
    return bundle_with_modalities(MODALITIES)


@pytest.fixture
def part() -> SurveyReference:
    rng = np.random.default_rng(1)
    modalities = normalise(rng.standard_normal((50, 2, 4)))
    modalities[3, 1] = 0  # has no light curve
    alerts = ReferenceAlerts(
        normalise(modalities.reshape(50, 8)),
        np.arange(50) - 7,
        np.array([f"ZTF26aaé{i}" for i in range(50)]),
        np.full(50, Survey.ZTF, np.uint8),
    )
    usual = np.array([[2.8, 0.3], [1.7, 0.4], [1.7, 0.4]], np.float32)
    apart = np.array([[0.5, 0.1], [0.4, 0.2]], np.float32)
    scores, label = np.linspace(0.1, 0.5, 30, dtype=np.float32), np.arange(50) % 3 - 1
    return SurveyReference(alerts, scores, usual, apart, label)


@pytest.fixture
def reference(bundle: Bundle, part: SurveyReference) -> Reference:
    """A reference of two different surveys."""
    few = np.arange(40)
    lsst = replace(
        part,
        alerts=replace(part.alerts[few], survey=np.full(40, Survey.LSST, np.uint8)),
        label=part.label[few],
        usual=part.usual * 2,
    )
    counts = SurveyCounts(read=200, passed=80, kept=50, held_out=30)
    return make_reference(
        bundle,
        "default.real > 0.5",
        {Survey.ZTF: part, Survey.LSST: lsst},
        {Survey.ZTF: counts, Survey.LSST: counts},
        "mahalanobis",
        ("VS", "SN"),
    )
