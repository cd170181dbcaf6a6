"""Earlier detections of LSST objects: each has the light curve that was known at its time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from broker_filter.packets.batch import BANDS, UNKNOWN_BAND, Measurement
from broker_filter.scoring.networks.snrnet import METADATA
from training.embedding.lsst_alerts import CLASSES, DETECTIONS_PER_OBJECT, load_histories, load_lsst_alerts
from training.embedding.train_embedder_lsst import INPUTS
from training.errors import DatasetError

FIRST_OBJECT = 170032920391843900
"""A diaObjectId; float64 cannot tell it from its successor."""
VISIT = 2026030900026


def measurement(object_id: int, mjd: float, flux: float, band: str | None = "r") -> dict[str, Any]:
    return {"diaObjectId": object_id, "visit": VISIT, "midpointMjdTai": mjd, "band": band} | {
        "psfFlux": flux,
        "psfFluxErr": 10.0,
    }


def detection(source_id: int, object_id: int, mjd: float, flux: float, band: str | None = "r") -> dict[str, Any]:
    return {"diaSourceId": source_id, **measurement(object_id, mjd, flux, band), "snr": flux / 10, "isDipole": False}


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    parquet.write_table(pa.Table.from_pylist(rows), file)
    return file


def test_each_detection_has_the_points_that_were_known_at_its_time(tmp_path: Path) -> None:
    sources = [detection(1, FIRST_OBJECT, 61000.0, 100.0), detection(2, FIRST_OBJECT, 61002.0, 300.0, band="g")]
    sources += [detection(3, FIRST_OBJECT + 1, 61001.0, 500.0, band=None)]
    forced = [measurement(FIRST_OBJECT, mjd, flux) for mjd, flux in ((61001.0, 5.0), (61002.0, 310.0), (61003.0, 7.0))]
    tables = [write(tmp_path / "sources.parquet", sources), write(tmp_path / "forced.parquet", forced * 2)]

    found = load_histories(tables, seed=1)

    assert found.object_id.tolist() == [str(FIRST_OBJECT)] * 2 + [str(FIRST_OBJECT + 1)]
    assert found.mjd.tolist() == [61000.0, 61002.0, 61001.0]
    assert (found.visit == VISIT).all()
    curves = found.light_curves
    assert np.diff(curves.offsets).tolist() == [1, 3, 1]
    assert curves.mjd.tolist() == [61000.0, 61000.0, 61001.0, 61002.0, 61001.0]
    assert curves.flux.tolist() == [100.0, 100.0, 5.0, 300.0, 500.0]
    kinds = [Measurement.DETECTION, Measurement.DETECTION, Measurement.FORCED, *[Measurement.DETECTION] * 2]
    assert curves.kind.tolist() == kinds
    assert curves.band.tolist() == [*[BANDS.index("r")] * 3, BANDS.index("g"), UNKNOWN_BAND]
    assert found.metadata[:, METADATA.index("snr")].tolist() == [10.0, 30.0, 50.0]
    assert np.isnan(found.metadata[:, METADATA.index("ixx")]).all()


def test_alerts_list_their_earlier_detections_and_each_counts_once(tmp_path: Path) -> None:
    earlier = [detection(n, FIRST_OBJECT, 61000.0 + n, 100.0) for n in range(3)]
    alerts = [
        {"diaSource": {"diaSourceId": 9}, "prvDiaSources": earlier, "prvDiaForcedSources": None},
        {"diaSource": {"diaSourceId": 10}, "prvDiaSources": earlier[:2], "prvDiaForcedSources": None},
    ]
    nothing = {"diaSource": {"diaSourceId": 11}, "prvDiaSources": None, "prvDiaForcedSources": None}
    tables = [write(tmp_path / "alerts.parquet", alerts), write(tmp_path / "nothing.parquet", [nothing])]
    found = load_histories(tables, seed=1)
    assert found.mjd.tolist() == [61000.0, 61001.0, 61002.0]


def test_few_detections_are_drawn_from_an_object_and_the_seed_decides_which(tmp_path: Path) -> None:
    many = [detection(n, FIRST_OBJECT, 61000.0 + n, 100.0) for n in range(5 * DETECTIONS_PER_OBJECT)]
    file = write(tmp_path / "sources.parquet", [*many, detection(999, 0, 61000.0, 1.0)])  # the last has no object
    found, again, other = (load_histories([file], seed) for seed in (1, 1, 2))
    assert len(found) == DETECTIONS_PER_OBJECT
    assert found.mjd.tolist() == again.mjd.tolist() != other.mjd.tolist()


def test_tables_without_detections_are_refused(tmp_path: Path) -> None:
    forced = write(tmp_path / "forced.parquet", [measurement(FIRST_OBJECT, 61000.0, 1.0)])
    other = write(tmp_path / "other.parquet", [{"x": 1}])
    with pytest.raises(DatasetError, match=r"other\.parquet: no table has diaSources"):
        load_histories([forced, other], seed=1)
    without_object = write(tmp_path / "lost.parquet", [detection(1, 0, 61000.0, 1.0)])
    with pytest.raises(DatasetError, match="no diaSource has an object, a time and a flux"):
        load_histories([without_object], seed=1)


@pytest.mark.shared
def test_alerts_of_lsstcam_and_their_classes_are_found_in_packets(shared_data: Path) -> None:
    lsst = shared_data / "lsst"
    alerts = load_lsst_alerts([lsst / "ocf" / "lsst_v9_0"], None, lsst / "more" / "labels.parquet", INPUTS)
    assert (len(alerts), alerts.of_lsstcam.sum()) == (27, 11)
    sso = alerts.named.raw.metadata[:, alerts.named.raw.columns.index("sso")] > 0
    np.testing.assert_array_equal(alerts.label == CLASSES.index("asteroid"), sso)
    assert len(alerts[alerts.of_lsstcam]) == 11


@pytest.mark.shared
def test_alerts_of_other_telescopes_are_refused(shared_data: Path) -> None:
    labels = shared_data / "lsst" / "more" / "labels.parquet"
    with pytest.raises(DatasetError, match="no alert of LSSTCam could be decoded"):
        load_lsst_alerts([shared_data / "ztf" / "archives"], None, labels, INPUTS)
