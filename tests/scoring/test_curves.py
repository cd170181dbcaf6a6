"""The shipped bundle `curves`: probabilities from three detections on, and null below."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from broker_filter.config import Runtime
from broker_filter.packets.batch import AlertBatch, LightCurves, Measurement, Survey
from broker_filter.scoring.bundle import open_bundle
from broker_filter.scoring.scorer import open_model

NOW = 60000.0


@pytest.fixture
def mixed(make_batch: Callable[..., AlertBatch]) -> AlertBatch:
    """Seven alerts with 1 to 5 detections, the fifth of LSST and the last with a detection after the alert.

    Two upper limits and a forced measurement precede the detections of each alert.
    """
    detections = np.array([1, 2, 3, 4, 5, 3, 3])
    kinds = [
        [Measurement.UPPER_LIMIT, Measurement.UPPER_LIMIT, Measurement.FORCED, *[Measurement.DETECTION] * n]
        for n in detections.tolist()
    ]
    mjd = [NOW - 2 * np.arange(len(kind))[::-1] for kind in kinds]
    mjd[-1][-1] = NOW + 1
    m = sum(map(len, kinds))
    return make_batch(
        np.zeros((len(kinds), 3, 1, 1), np.float32),
        survey=[Survey.LSST if n == 5 else Survey.ZTF for n in detections],
        mjd=np.full(len(kinds), NOW),
        light_curves=LightCurves(
            offsets=np.cumsum([0, *map(len, kinds)]),
            mjd=np.concatenate(mjd),
            band=np.tile(np.array([1, 2], np.uint8), m)[:m],
            flux=np.linspace(1e5, 3e5, m, dtype=np.float32),
            flux_err=np.full(m, 1e4, np.float32),
            kind=np.concatenate(kinds).astype(np.uint8),
        ),
    )


@pytest.mark.parametrize("engine", ["onnxruntime", "torch"])
def test_alerts_with_fewer_detections_than_the_card_says_have_null_probabilities(
    engine: str, mixed: AlertBatch
) -> None:
    if engine == "torch":
        pytest.importorskip("torch")
    model = open_model("curves", Runtime(engine=engine, device="cpu"))  # type: ignore[arg-type]
    scores = model.score(mixed)
    assert scores.taken.tolist() == [True, True, True, True, False, True, True]
    given = np.isfinite(scores.probabilities)
    assert given.all(axis=1).tolist() == [False, False, True, True, False, True, False]
    assert given.any(axis=1).tolist() == given.all(axis=1).tolist()
    np.testing.assert_allclose(scores.probabilities[given.all(axis=1)].sum(axis=1), 1, rtol=1e-5)


def test_the_card_states_what_the_bundle_is_worth() -> None:
    card = open_bundle("curves").parts[0].card
    figures = card.training.evaluation
    assert card.inputs.light_curve is not None
    assert card.inputs.light_curve.least_detections == 3
    for n in (3, 5, 10, 20):
        low = float(str(figures[f"at_{n}_macro_roc_auc_95"]).split(" to ")[0])
        assert low > 0.5
        assert float(figures[f"at_{n}_log_loss"]) < float(figures[f"at_{n}_log_loss_of_frequencies"])
