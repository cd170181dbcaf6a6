"""The demonstration's reference set: the embeddings of the alerts of another simulated night of each survey."""

from __future__ import annotations

from pathlib import Path

from broker_filter.config import Runtime
from broker_filter.demo.results import Survey
from broker_filter.packets.packet import FilePosition, Packet
from broker_filter.scoring.scorer import open_scorer
from broker_filter.simulate import SCHEMAS, simulate_night
from broker_filter.streaming.build_reference import build_reference
from broker_filter.streaming.duplicates import DuplicateWindow
from broker_filter.streaming.expressions import FIELDS, compile_filter
from broker_filter.streaming.filtering import score_stream

MODEL = "embedder"
WHERE = f"{MODEL}.real > 0.5 or survey == 'lsst' and not isDipole"
"""Keeps bogus alerts out of the reference set: bogus alerts are outliers too, and must not count as ordinary. The
model's `real` is for ZTF alone, and simulated packets of LSST have no `reliability`."""
ALERTS: dict[Survey, int] = {"ztf": 400, "lsst": 120}
"""Alerts of the other night of each survey: about 320 of ZTF look real. A fifth of those that pass are held out to
calibrate the score."""
BATCH = 64


def write_reference(file: Path, seed: int) -> None:
    """Simulate nights other than those of `seed`, and write a reference set of their alerts to `file`."""
    scorer = open_scorer([MODEL], Runtime())
    [model] = scorer.models
    where = compile_filter(WHERE, FIELDS, model.outputs)
    decoder = scorer.decoder(SCHEMAS, columns=where.columns)
    packets = (
        Packet(alert.packet, FilePosition(str(alert.alert_id)))
        for survey, n in ALERTS.items()
        for alert in simulate_night(n, seed + 1, survey)
    )
    scored = score_stream(packets, decoder, scorer, DuplicateWindow(0), batch_size=BATCH, threads=1)
    build_reference(scored, model, where, max(ALERTS.values())).write(file)
