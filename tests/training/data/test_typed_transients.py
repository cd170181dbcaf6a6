"""Typed light curves become the histories that the alerts of their objects brought."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from broker_filter.packets.batch import BANDS, Measurement
from broker_filter.packets.decode import Decoder
from broker_filter.packets.packet import Packet
from training.data.typed_transients import HISTORY_DAYS, Transients, read_transients
from training.errors import DatasetError

CLASSES = {"Ia": ("SN Ia", "SN Ia-91T"), "II": ("SN II",)}
MINUTE = 1 / 1440


def tables(
    folder: Path, types: dict[str, str], points: Sequence[tuple[str, float, str, float | None, float]]
) -> tuple[Path, Path]:
    """Write tables of light curves and of objects; a point is object, mjd, band, magnitude and its error."""
    curves, objects = folder / "curves.parquet", folder / "objects.parquet"
    pq.write_table(pa.table({"ZTFID": list(types), "type": list(types.values())}), objects)
    columns = zip(*points, strict=True)
    pq.write_table(
        pa.table(dict(zip(("ZTFID", "mjd", "band", "mag", "magerr"), map(list, columns), strict=True))), curves
    )
    return curves, objects


def test_each_detection_is_an_alert_with_the_detections_of_its_window(tmp_path: Path) -> None:
    points = [("b", 100.0 + day, "g", 19.0, 0.1) for day in (0, 40, 35, 10)] + [("a", 5.0, "R", 18.0, 0.1)]
    made = read_transients(*tables(tmp_path, {"a": "SN II", "b": "SN Ia-91T"}, points), CLASSES)
    assert made.object_id.tolist() == ["a", "b"]
    assert made.label.tolist() == [1, 0]
    assert made.owner.tolist() == [0, 1, 1, 1, 1]
    assert made.detections.tolist() == [
        1,
        1,
        2,
        2,
        3,
    ]  # the first detection is older than HISTORY_DAYS for the last two
    curves, mjd = made.alerts(np.array([4, 2]))
    assert mjd.tolist() == [140, 110]
    assert curves.offsets.tolist() == [0, 3, 5]
    assert curves.mjd.tolist() == [110, 135, 140, 100, 110]


def test_magnitudes_become_fluxes_in_nanojansky(tmp_path: Path) -> None:
    made = read_transients(*tables(tmp_path, {"a": "SN II"}, [("a", 1.0, "R", 31.4 - 5, 0.108574)]), CLASSES)
    assert made.points.band.tolist() == [BANDS.index("r")]
    np.testing.assert_allclose(made.points.flux, 100, rtol=1e-6)
    np.testing.assert_allclose(made.points.flux_err, 10, rtol=1e-4)


def test_other_types_and_unusable_points_are_left_out(tmp_path: Path) -> None:
    points = [
        ("a", 1.0, "g", 18.0, 0.1),
        ("a", 2.0, "g", None, 0.1),
        ("a", 3.0, "clear", 18.0, 0.1),
        ("other", 1.0, "g", 18.0, 0.1),
        ("unknown", 1.0, "g", 18.0, 0.1),
    ]
    made = read_transients(*tables(tmp_path, {"a": "SN Ia", "other": "TDE"}, points), CLASSES)
    assert made.points.mjd.tolist() == [1]


def test_tables_that_cannot_be_used_are_errors_in_one_sentence(tmp_path: Path) -> None:
    curves, objects = tables(tmp_path, {"a": "TDE"}, [("a", 1.0, "g", 18.0, 0.1)])
    with pytest.raises(DatasetError, match="no detection of an object that has one of the types SN Ia"):
        read_transients(curves, objects, CLASSES)
    with pytest.raises(DatasetError, match=r"curves\.parquet: cannot be read .* columns ZTFID, type"):
        read_transients(objects, curves, CLASSES)


@pytest.fixture(scope="module")
def bright(shared_data: Path) -> Transients:
    """Every typed transient of the shared table."""
    folder = shared_data / "lightcurves"
    objects = folder / "ztf_bts_objects.parquet"
    types = sorted(set(pq.read_table(objects)["type"].to_pylist()))
    return read_transients(folder / "ztf_bts_lightcurves.parquet", objects, {"any": types})


@pytest.mark.shared
def test_histories_are_those_that_the_packets_of_the_same_objects_bring(
    bright: Transients, ztf_packets: list[tuple[int, bytes]]
) -> None:
    alerts, _ = Decoder(cutout_size=1).decode([Packet(body) for _, body in ztf_packets])
    compared = 0
    for i in np.flatnonzero(np.isin(alerts.object_id, bright.object_id)).tolist():
        packet = alerts.light_curves[i : i + 1]
        detected = packet.kind == Measurement.DETECTION
        own = np.flatnonzero(bright.object_id[bright.owner] == alerts.object_id[i])
        row = own[np.abs(bright.points.mjd[own] - alerts.mjd[i]).argmin()]
        history, mjd = bright.alerts(np.array([row]))
        assert abs(mjd[0] - alerts.mjd[i]) < MINUTE
        assert alerts.mjd[i] - packet.mjd[detected].min() <= HISTORY_DAYS + MINUTE
        np.testing.assert_allclose(history.mjd, packet.mjd[detected], atol=MINUTE)
        np.testing.assert_allclose(history.flux, packet.flux[detected], rtol=1e-4)
        np.testing.assert_array_equal(history.band, packet.band[detected])
        compared += 1
    assert compared == 5
