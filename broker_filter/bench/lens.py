"""Measures what a lens costs: packets to anomaly scores, with no, a few, or all alerts explained. No Kafka."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import cycle, islice

import numpy as np

from broker_filter.anomalies.score import AnomalyScorer
from broker_filter.bench.measure import Contest, Run, Spread, compete, timed
from broker_filter.bench.options import Device
from broker_filter.bench.sample import in_batches
from broker_filter.config import Batch, Runtime
from broker_filter.packets.batch import Survey
from broker_filter.scoring.lens_files import open_files
from broker_filter.scoring.scorer import open_scorer
from broker_filter.streaming.build_reference import build_reference
from broker_filter.streaming.duplicates import DuplicateWindow
from broker_filter.streaming.explain import open_lenses
from broker_filter.streaming.filtering import score_packets
from broker_filter.streaming.judge import AnomalyJudge

LENS = "embedder"
RATE = 0.001
"""The rate of flagged alerts that the documentation recommends."""
ONE_OF = round(1 / RATE)
WITHOUT, FLAGGED, EVERY = "no lens", f"one alert of {ONE_OF:,} explained", "every alert explained"
EXPLAINED = f"lens {LENS}, CPU us for an explained alert"
"""What `every alert explained` takes beyond `no lens`."""


def measure_lens(
    packets: Sequence[bytes], alerts: int, device: Device, repetitions: int
) -> tuple[dict[str, Contest], dict[str, Spread]]:
    """Return the contest of `alerts` alerts, or ONE_OF if they are fewer, and the cost of an explanation.

    `packets`: of ZTF, one alert each; they are repeated. Decoding, inference and explanations run on one thread. A
    reference set is built from the same alerts. Raises ReferenceSetError if there are too few for it.
    """
    bundle = open_files(LENS).card.bundle.name
    scorer = open_scorer([bundle], Runtime(device=device, inference_threads=1))
    [model] = scorer.models
    decoder, window, size = scorer.decoder(), DuplicateWindow(0), Batch().max_size
    known = [score_packets(batch, decoder, scorer, window) for batch in in_batches(packets, size)]
    reference = build_reference(known, model, None, len(packets))
    [lens] = open_lenses([LENS], scorer, reference.card)
    judge = AnomalyJudge(reference, RATE, None)
    distances = AnomalyScorer(reference.card, reference.surveys[Survey.ZTF])
    night = in_batches(list(islice(cycle(packets), max(alerts, ONE_OF))), size)

    def process(one_of: int | None) -> None:
        read = 0
        for batch in night:
            scored = score_packets(batch, decoder, scorer, window)
            judge.judge(scored)
            if one_of is not None:
                rows = np.flatnonzero(np.arange(read + 1, read + len(scored.alerts) + 1) % one_of == 0)
                if len(rows):
                    lens.explain(scored, rows, Survey.ZTF, distances)
            read += len(scored.alerts)

    def run(one_of: int | None) -> Run:
        return timed(partial(process, one_of), sum(map(len, night)))

    competitors = {WITHOUT: None, FLAGGED: ONE_OF, EVERY: 1}
    contest = compete({name: partial(run, one_of) for name, one_of in competitors.items()}, repetitions)
    more = contest[EVERY].cpu_microseconds.median - contest[WITHOUT].cpu_microseconds.median
    return {f"packets -> anomaly scores: {bundle}, lens {LENS}": contest}, {EXPLAINED: Spread.of([more])}
