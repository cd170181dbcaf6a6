"""BTSbot's 25 metadata columns equal a plain recomputation from the values that fastavro reads."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import fastavro
import numpy as np

from broker_filter.packets.decode import Decoder
from broker_filter.packets.packet import FilePosition, Packet
from broker_filter.packets.schemas.registry import open_registry

MADE_OF_HISTORY = ("nnotdet", "age", "days_since_peak", "days_to_peak", "peakmag_so_far", "maxmag_so_far", "new_drb")


def expected(record: dict[str, Any]) -> dict[str, float]:
    """Return the columns as BTSbot's `prep_alerts` defines them, over the detections in the packet up to the alert."""
    alert = record["candidate"]
    # One redistributed packet has strings in the columns of its history, which cannot be read.
    history = record["prv_candidates"] if isinstance(record["prv_candidates"], list) else []
    detections = [alert, *(row for row in history if row["magpsf"] is not None and row["jd"] <= alert["jd"])]
    detections.sort(key=lambda row: row["jd"])
    first = min(alert["jdstarthist"], detections[0]["jd"])
    peak = min(detections, key=lambda row: row["magpsf"])  # the first of several equal detections
    drb = alert.get("drb")
    return {
        "nnotdet": alert["ncovhist"] - alert["ndethist"],
        "age": alert["jd"] - first,
        "days_since_peak": alert["jd"] - peak["jd"],
        "days_to_peak": peak["jd"] - first,
        "peakmag_so_far": peak["magpsf"],
        "maxmag_so_far": max(row["magpsf"] for row in detections),
        "new_drb": np.nan if drb is None else drb,
    }


def test_history_columns_use_the_detections_up_to_the_alert(
    ztf_packets: list[tuple[int, bytes]], lsst_packets: list[tuple[str, bytes]], lsst_schemas: Path
) -> None:
    decoder = Decoder(open_registry(str(lsst_schemas)), columns=MADE_OF_HISTORY)
    sample = [data for _, data in ztf_packets[::4]]
    other = [lsst_packets[0][1]]  # so that the batch also has a row of another survey
    alerts, _ = decoder.decode([Packet(data, FilePosition("test")) for data in (*sample[:100], *other, *sample[100:])])
    ztf = alerts.metadata[alerts.survey == 0]
    assert (alerts.survey == 1).any()
    records = [next(fastavro.reader(io.BytesIO(data))) for data in sample]
    np.testing.assert_array_equal(ztf, [[expected(record)[name] for name in MADE_OF_HISTORY] for record in records])
    age, to_peak, since_peak = (
        ztf[:, MADE_OF_HISTORY.index(name)] for name in ("age", "days_to_peak", "days_since_peak")
    )
    assert (since_peak > 0).mean() > 0.1
    np.testing.assert_allclose(age, to_peak + since_peak, atol=1e-8)
