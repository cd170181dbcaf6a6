"""The demonstration's page of explained anomalies: their features, made from the records that the service published."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from broker_filter.anomalies.reference import read_reference
from broker_filter.anomalies.score import AnomalyScorer
from broker_filter.config import Runtime
from broker_filter.demo.ordinary import MODEL
from broker_filter.demo.service import LENS
from broker_filter.packets.packet import FilePosition, Packet
from broker_filter.pictures.explanation_page import write_page
from broker_filter.scoring.scorer import open_scorer
from broker_filter.streaming.explain import as_document, explain_rows, open_lenses
from broker_filter.streaming.filtering import score_stream

SHOWN = 20
"""Alerts on the page: those with the highest scores."""


def write_explanations(file: Path, anomalies: Sequence[bytes], reference: Path) -> None:
    """Write the page of the published `anomalies`: output records with `payload: full`, each a packet itself."""
    scorer, ordinary = open_scorer([MODEL], Runtime()), read_reference(reference)
    [lens] = open_lenses([LENS], scorer, ordinary.card)
    judges = {survey: AnomalyScorer(ordinary.card, part) for survey, part in ordinary.surveys.items()}
    packets = (Packet(packet, FilePosition(str(i))) for i, packet in enumerate(anomalies))
    entries, shown = [], {}
    for scored in score_stream(packets, scorer.decoder(), scorer, threads=1):
        for row, entry in explain_rows(scored, lens, judges):
            entries.append(entry)
            shown[entry["alert_id"]] = scored.alerts, row
    entries.sort(key=lambda entry: -entry["anomaly_score"])
    write_page(file, as_document(lens.lens.card, entries[:SHOWN]), shown)
