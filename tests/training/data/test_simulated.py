"""Simulated alerts for trainings, and their true kinds."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("galsim", reason="simulated alerts need the extra `demo`")

from broker_filter.config import SurveyName
from broker_filter.simulate import simulate_night
from training.data.simulated import RATES, SimulatedNight, simulate_cutouts


@pytest.mark.parametrize("survey", ["ztf", "lsst"])
def test_a_night_gives_packets_and_the_kinds_of_their_alerts(survey: SurveyName) -> None:
    expected = list(simulate_night(4, 3, survey, RATES))
    night = SimulatedNight(4, 3, survey, RATES)
    assert [packet.data for packet in night] == [alert.packet for alert in expected]
    backwards = np.array([alert.alert_id for alert in reversed(expected)])
    assert night.kinds(backwards).tolist() == [alert.kind for alert in reversed(expected)]
    cutouts, boxes, kinds = simulate_cutouts(4, 3, survey, size=63)
    assert cutouts.shape == (4, 3, 63, 63)
    assert boxes.shape == (4, 3, 4)
    assert sorted(kinds.tolist()) == sorted(alert.kind for alert in expected)
