"""The one path from packets to scores, for the service and for archives alike. Knows neither Kafka nor files."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from broker_filter.packets.batch import AlertBatch, Survey
from broker_filter.packets.decode import Decoder
from broker_filter.packets.packet import Packet
from broker_filter.packets.rejects import Reject, RejectReason
from broker_filter.scoring.scorer import Scorer
from broker_filter.scoring.scores import Scores
from broker_filter.streaming.anomalies import Anomalies, AnomalyJudge
from broker_filter.streaming.duplicates import DuplicateWindow


@dataclass(frozen=True, slots=True)
class ScoredBatch:
    """What became of a batch of packets: every alert in them is a scored row of `alerts` or one of `rejects`.

    Rows of `alerts` that no model takes are among the rejects (`no_model_for_survey`) and not in `scored`.
    """

    packets: Sequence[Packet]
    alerts: AlertBatch
    scores: Scores
    duplicate: NDArray[np.bool_]  # [N] the alert id was seen before within the window
    rejects: Sequence[Reject]
    anomalies: Anomalies | None = None  # where they are looked for

    @property
    def scored(self) -> NDArray[np.int64]:
        """Indices of the alerts that at least one model scored."""
        return np.flatnonzero(self.scores.taken)

    def less(self, refused: Mapping[int, Reject]) -> ScoredBatch:
        """The batch with some of its scored rows as rejects instead."""
        if not refused:
            return self
        taken = self.scores.taken.copy()
        taken[list(refused)] = False
        scores = replace(self.scores, taken=taken)
        return replace(self, scores=scores, rejects=[*self.rejects, *refused.values()])


def score_alerts(
    alerts: AlertBatch,
    rejects: Sequence[Reject],
    scorer: Scorer,
    window: DuplicateWindow,
    judge: AnomalyJudge | None = None,
) -> ScoredBatch:
    """Scores decoded alerts, marks the ones seen before, and judges which are anomalies where there is a `judge`.

    Must be called once for each batch, in the order in which packets arrived.
    """
    scores = scorer.score(alerts)
    unclaimed = [
        Reject(
            packet=alerts.packets[alerts.packet_index[i]],
            reason=RejectReason.NO_MODEL_FOR_SURVEY,
            detail=f"no configured model takes alerts of {Survey(int(alerts.survey[i]))}; `also` tells one to",
            record=int(alerts.record_index[i]),
            alert=alerts.identity(i),
            schema=alerts.records[i].schema.fingerprint,
        )
        for i in np.flatnonzero(~scores.taken).tolist()
    ]
    duplicate = window.mark(alerts, scores.taken)
    scored = ScoredBatch(alerts.packets, alerts, scores, duplicate, [*rejects, *unclaimed])
    return replace(scored, anomalies=judge.judge(scored)) if judge else scored


def score_packets(packets: Sequence[Packet], decoder: Decoder, scorer: Scorer, window: DuplicateWindow) -> ScoredBatch:
    """Decodes and scores one batch of packets."""
    alerts, rejects = decoder.decode(packets)
    return score_alerts(alerts, rejects, scorer, window)


def score_stream(
    packets: Iterable[Packet],
    decoder: Decoder,
    scorer: Scorer,
    window: DuplicateWindow,
    *,
    batch_size: int,
    threads: int,
    judge: AnomalyJudge | None = None,
) -> Iterator[ScoredBatch]:
    """Scores packets batch by batch in the order in which they come, while `threads` threads decode the next ones."""
    decoded: deque[tuple[list[Packet], Future[tuple[AlertBatch, list[Reject]]]]] = deque()
    waiting = iter(packets)
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        try:
            while True:
                while len(decoded) <= threads and (batch := list(islice(waiting, batch_size))):
                    decoded.append((batch, pool.submit(decoder.decode_some, batch)))
                if not decoded:
                    return
                batch, future = decoded.popleft()
                alerts, rejects = future.result()
                yield score_alerts(alerts, rejects, scorer, window, judge)
                while batch := batch[len(alerts.packets) :]:  # what would have taken too much memory at a time
                    alerts, rejects = decoder.decode_some(batch)
                    yield score_alerts(alerts, rejects, scorer, window, judge)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
