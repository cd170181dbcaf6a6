"""The demonstration's reference set: the embeddings of the alerts of another simulated night."""

from __future__ import annotations

from pathlib import Path

from broker_filter.config import Runtime
from broker_filter.packets.packet import FilePosition, Packet
from broker_filter.scoring.scorer import open_scorer
from broker_filter.simulate import simulate_night
from broker_filter.streaming.build_reference import build_reference
from broker_filter.streaming.duplicates import DuplicateWindow
from broker_filter.streaming.expressions import FIELDS, compile_filter
from broker_filter.streaming.filtering import score_stream

MODEL = "embedder"
WHERE = f"{MODEL}.real > 0.5"
"""Keeps bogus alerts out of the reference set: bogus alerts are outliers too, and must not count as ordinary."""
ALERTS = 400
"""Alerts of the other night: about 320 of them look real, and a fifth of these are held out to calibrate the score."""
BATCH = 64


def write_reference(file: Path, seed: int) -> None:
    """Simulate a night other than that of `seed`, and write a reference set of its alerts to `file`."""
    scorer = open_scorer([MODEL], Runtime())
    [model] = scorer.models
    where = compile_filter(WHERE, FIELDS, model.outputs)
    decoder = scorer.decoder()
    packets = (Packet(alert.packet, FilePosition(str(alert.alert_id))) for alert in simulate_night(ALERTS, seed + 1))
    scored = score_stream(packets, decoder, scorer, DuplicateWindow(0), batch_size=BATCH, threads=1)
    build_reference(scored, model, where, ALERTS).write(file)
