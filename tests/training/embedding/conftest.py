"""Simulated LSST alerts in the place of real ones."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("galsim", reason="simulated alerts need the extra `demo`")

from broker_filter.packets.packet import Packet
from broker_filter.scoring.networks.snrnet import METADATA
from broker_filter.simulate import simulate_night
from training.embedding.lsst_alerts import OF_EVALUATION, Histories, LsstAlerts
from training.embedding.train_embedder import decode
from training.embedding.train_embedder_lsst import (
    INPUTS,
    Data,
    at_first_detection,
    new_network,
    open_compared,
    open_trunk,
    show,
    show_histories,
)

ALERTS, FIRST_VISIT = 60, 2026030900026


@pytest.fixture(scope="session")
def lsst_data() -> Data:
    """Simulated alerts in the place of real ones: pairs share a visit, and each has one earlier detection."""
    made = list(simulate_night(ALERTS, 3, "lsst"))
    compared = open_compared("embedder")
    columns = dict.fromkeys((*METADATA, *OF_EVALUATION, *(column.name for column in compared.inputs.metadata)))
    decoded = INPUTS.model_copy(update={"images": compared.inputs.images.model_copy(update={"normalisation": "snr"})})
    named = decode((Packet(one.packet) for one in made), decoded, tuple(columns))
    n = len(named.alert_id)
    named = replace(named, object_id=np.arange(n).astype(np.str_))
    visit = FIRST_VISIT + np.arange(n) // 2
    alerts = LsstAlerts(named, visit, np.full(n, 0.9), np.arange(n) // 2 % 3 - 1)
    shown = show(new_network(open_trunk("rubin"), 1), named.raw)
    assert named.raw.light_curves is not None
    assert named.raw.mjd is not None
    first = at_first_detection(named.raw).light_curves
    assert first is not None
    columns = [named.raw.columns.index(name) for name in METADATA]
    histories = Histories(named.raw.metadata[:, columns], named.raw.mjd, first, named.object_id, visit - 1000)
    without_images = show_histories(histories, shown.features.shape[2])
    kind = np.array(["asteroid", "agn"] * (n // 2), np.str_)
    return Data(alerts, shown, shown[np.arange(4)], histories, without_images, named, shown, kind, compared)
