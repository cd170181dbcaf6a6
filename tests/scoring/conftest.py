from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from broker_filter.packets.batch import AlertBatch, LightCurves, Survey
from broker_filter.packets.packet import FilePosition, Packet
from broker_filter.scoring.bundle import KnownAnswers, open_bundle


@pytest.fixture(scope="session")
def test_vector() -> KnownAnswers:
    """The test vector of the network for ZTF of `default`: four synthetic alerts, without survey data."""
    return open_bundle("default").part("ztf").test_vector()


@pytest.fixture(scope="session")
def make_batch() -> Callable[..., AlertBatch]:
    """Make an AlertBatch with given cutouts; `survey`: one for all alerts, or one for each."""

    def make(
        cutouts: NDArray[np.float32],
        cutout_box: NDArray[np.int16] | None = None,
        survey: Survey | list[Survey] = Survey.ZTF,
        columns: tuple[str, ...] = (),
        metadata: NDArray[np.float64] | None = None,
        mjd: NDArray[np.float64] | None = None,
        light_curves: LightCurves | None = None,
        variance: NDArray[np.float32] | None = None,
        psf: NDArray[np.float32] | None = None,
    ) -> AlertBatch:
        n, _, size, _ = cutouts.shape
        whole = np.tile(np.array([0, 0, size, size], np.int16), (n, 3, 1))
        floats = np.zeros(n)
        no_points = np.zeros(0)
        return AlertBatch(
            packets=[Packet(b"", FilePosition("made"))],
            packet_index=np.zeros(n, np.int32),
            record_index=np.arange(n, dtype=np.int32),
            records=[],
            survey=np.broadcast_to(np.array(survey, np.uint8), n).copy(),
            schema_version=["4.02"] * n,
            alert_id=np.arange(n),
            object_id=[f"ZTF{i}" for i in range(n)],
            mjd=floats if mjd is None else mjd,
            ra=floats,
            dec=floats,
            band=np.zeros(n, np.uint8),
            cutouts=cutouts,
            cutout_box=whole if cutout_box is None else cutout_box,
            columns=columns,
            metadata=np.zeros((n, 0)) if metadata is None else metadata,
            light_curves=light_curves
            or LightCurves(
                offsets=np.zeros(n + 1, np.int64),
                mjd=no_points,
                band=no_points.astype(np.uint8),
                flux=no_points.astype(np.float32),
                flux_err=no_points.astype(np.float32),
                kind=no_points.astype(np.uint8),
            ),
            variance=variance,
            psf=psf,
        )

    return make


@pytest.fixture
def own_bundle(tmp_path: Path) -> Path:
    """A copy of the network for ZTF of the shipped bundle `default`, for tests that damage it."""
    copy = tmp_path / "own"
    copy.mkdir()
    for path in open_bundle("default").part("ztf").directory.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy
