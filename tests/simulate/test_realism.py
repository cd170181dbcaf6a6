"""Networks that were trained on real images classify simulated images correctly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from broker_filter.config import Runtime
from broker_filter.importers.braai import import_braai
from broker_filter.packets.decode import Decoder
from broker_filter.packets.packet import FilePosition, Packet
from broker_filter.packets.schemas.registry import open_registry
from broker_filter.scoring.scorer import open_scorer
from broker_filter.simulate import SimulatedAlert


def called_real(bundle: str, night: list[SimulatedAlert]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return whether the model calls each real alert real, and whether it calls each bogus alert real."""
    packets = [Packet(alert.packet, FilePosition(f"{i}")) for i, alert in enumerate(night)]
    alerts, rejects = Decoder(open_registry(None), columns=()).decode(packets)
    assert not rejects
    (scores,) = open_scorer([bundle], Runtime()).score(alerts).columns().values()
    real = np.array([alert.is_real for alert in night])
    return scores[real] > 0.5, scores[~real] > 0.5


@pytest.mark.shared
def test_ztf_network_separates_real_from_bogus(
    ztf_night: list[SimulatedAlert], shared_models: Path, tmp_path: Path
) -> None:
    import_braai(shared_models / "braai" / "d6_m7.weights.h5", "row", "d6_m7", tmp_path / "d6_m7")
    real, bogus = called_real(str(tmp_path / "d6_m7"), ztf_night)
    assert real.mean() > 0.95
    assert bogus.mean() < 0.06


def test_default_network_separates_real_from_bogus(ztf_night: list[SimulatedAlert]) -> None:
    real, bogus = called_real("default", ztf_night)
    assert real.mean() > 0.9
    assert bogus.mean() < 0.1
