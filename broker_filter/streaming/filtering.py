"""The path from packets to scored batches, the same for the service and for archives.

It uses neither Kafka nor files.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from broker_filter.packets.alert_rows import Batched, in_batches
from broker_filter.packets.batch import AlertBatch, Survey
from broker_filter.packets.decode import Decoder
from broker_filter.packets.packet import Packet
from broker_filter.packets.rejects import Reject, RejectReason
from broker_filter.scoring.runtimes import available_cores
from broker_filter.scoring.scorer import Scorer
from broker_filter.streaming.duplicates import DuplicateWindow
from broker_filter.streaming.filters import Filters
from broker_filter.streaming.judge import AnomalyJudge
from broker_filter.streaming.scored import ScoredBatch

BATCH_SIZE = 128
"""Packets decoded together: the fixed cost of a batch is then small, and a small archive still occupies all threads."""
DUPLICATE_WINDOW = 2_000_000
"""Alert ids that are remembered while archives are scored: more than one night has."""


def score_alerts(
    alerts: AlertBatch,
    rejects: Sequence[Reject],
    scorer: Scorer,
    window: DuplicateWindow,
    judge: AnomalyJudge | None = None,
    filters: Filters | None = None,
) -> ScoredBatch:
    """Score decoded alerts, mark duplicates, and flag anomalies and try filters if `judge` and `filters` are given.

    Call this once for each batch, in the order in which the packets arrived. `rejects`: the rejects of decoding; the
    returned batch also holds a reject for each alert that no model takes.
    """
    scores = scorer.score(alerts)
    taken = ", ".join(f"{model.name} takes {' and '.join(map(str, model.surveys))}" for model in scorer.models)
    unclaimed = [
        Reject(
            packet=alerts.packets[alerts.packet_index[i]],
            packet_index=int(alerts.packet_index[i]),
            reason=RejectReason.NO_MODEL_FOR_SURVEY,
            detail=f"no configured model takes alerts of {Survey(int(alerts.survey[i]))} ({taken}): add a bundle "
            "for this survey, or ask for it with `also`",
            record=int(alerts.record_index[i]),
            alert=alerts.identity(i),
            schema=alerts.records[i].schema.fingerprint,
        )
        for i in np.flatnonzero(~scores.taken).tolist()
    ]
    duplicate = window.mark(alerts, scores.taken)
    scored = ScoredBatch(alerts.packets, alerts, scores, duplicate, [*rejects, *unclaimed])
    if judge:
        scored = replace(scored, anomalies=judge.judge(scored))
    return filters.apply(scored) if filters else scored


def score_packets(packets: Sequence[Packet], decoder: Decoder, scorer: Scorer, window: DuplicateWindow) -> ScoredBatch:
    """Decode and score one batch of packets. Raises RegistryUnavailable if a schema cannot be read."""
    alerts, rejects = decoder.decode(packets)
    return score_alerts(alerts, rejects, scorer, window)


def score_stream(
    packets: Iterable[Packet] | Batched,
    decoder: Decoder,
    scorer: Scorer,
    window: DuplicateWindow | None = None,
    *,
    batch_size: int = BATCH_SIZE,
    threads: int | None = None,
    judge: AnomalyJudge | None = None,
) -> Iterator[ScoredBatch]:
    """Score packets batch by batch, in their order, while other threads decode the next batches.

    `window`: the alert ids seen before; by default a new window of DUPLICATE_WINDOW ids. `threads`: decoding threads;
    by default one for each available core. Raises RegistryUnavailable if a schema cannot be read, and the errors of the
    iterator `packets`.
    """
    window = window or DuplicateWindow(DUPLICATE_WINDOW)
    threads = threads or available_cores()
    decoded: deque[tuple[Sequence[Packet], Future[tuple[AlertBatch, list[Reject]]]]] = deque()
    batches = in_batches(packets, batch_size)
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        try:
            while True:
                while len(decoded) <= threads and (batch := next(batches, [])):
                    decoded.append((batch, pool.submit(decoder.decode_some, batch)))
                if not decoded:
                    return
                batch, future = decoded.popleft()
                alerts, rejects = future.result()
                yield score_alerts(alerts, rejects, scorer, window, judge)
                while batch := batch[len(alerts.packets) :]:  # packets that were not decoded yet, to bound the memory
                    alerts, rejects = decoder.decode_some(batch)
                    yield score_alerts(alerts, rejects, scorer, window, judge)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
