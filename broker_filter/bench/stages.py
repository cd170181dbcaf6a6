"""The stages one by one, on one thread: packet to pixels and columns, pixels to scores, scores to output record."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Protocol

from broker_filter.bench.measure import Contest, Run, compete, timed
from broker_filter.bench.naive import NaiveBroker
from broker_filter.config import Batch, Input, Model, Output, Runtime, Service
from broker_filter.packets.decode import Decoder
from broker_filter.packets.packet import FilePosition, Packet
from broker_filter.packets.registry import open_registry
from broker_filter.scoring.bundle import load_bundle
from broker_filter.scoring.scorer import open_scorer
from broker_filter.streaming.duplicates import DuplicateWindow
from broker_filter.streaming.filtering import score_alerts
from broker_filter.streaming.routing import open_router

ONE_THREAD = Runtime(decode_threads=1, inference_threads=1)
BATCH = Batch().max_size
STAGES = ["decode", "score", "encode"]


class Stages(Protocol):
    """A contestant: each method does one stage's work for all packets, on inputs that are ready."""

    def decode(self) -> None:
        """Packets to cutouts and columns."""

    def score(self) -> None:
        """Cutouts to scores."""

    def encode(self) -> None:
        """Alerts and scores to output records."""


class NaiveStages:
    """The naive loop, taken apart."""

    def __init__(self, packets: Sequence[bytes], model: str) -> None:
        self._packets = packets
        self._broker = NaiveBroker(load_bundle(model))
        self._alerts = [self._broker.decode(packet) for packet in packets]
        self._cutouts = [self._broker.cutouts(alert) for _, alert in self._alerts]
        self._scores = [self._broker.score(cutouts) for cutouts in self._cutouts]

    def decode(self) -> None:
        """fastavro.reader, gzip, astropy."""
        for packet in self._packets:
            _, alert = self._broker.decode(packet)
            self._broker.cutouts(alert)

    def score(self) -> None:
        """numpy, torch at batch one."""
        for cutouts in self._cutouts:
            self._broker.score(cutouts)

    def encode(self) -> None:
        """fastavro.writer."""
        for (schema, alert), scores in zip(self._alerts, self._scores, strict=True):
            self._broker.encode(schema, alert, scores)


class ServiceStages:
    """The service's stages, in batches of the default size."""

    def __init__(self, packets: Sequence[bytes], model: str) -> None:
        self._batches = [
            [
                Packet(data, FilePosition("bench", record=start + i))
                for i, data in enumerate(packets[start : start + BATCH])
            ]
            for start in range(0, len(packets), BATCH)
        ]
        self._scorer = open_scorer([model], ONE_THREAD)
        self._decoder = Decoder(open_registry(None), cutout_size=self._scorer.cutout_size, columns=self._scorer.columns)
        source = Input(bootstrap_servers="none:9092", group_id="bench", topics=["bench"])
        self._router = open_router(
            Service(input=source, output=Output(prefix="bench"), models=[Model(bundle=model)]), self._scorer
        )
        window = DuplicateWindow(len(packets))
        self._decoded = [self._decoder.decode(batch) for batch in self._batches]
        self._scored = [score_alerts(alerts, rejects, self._scorer, window) for alerts, rejects in self._decoded]

    def decode(self) -> None:
        """Decoder: cutouts, columns and light curves."""
        for batch in self._batches:
            self._decoder.decode(batch)

    def score(self) -> None:
        """Scorer."""
        for alerts, _ in self._decoded:
            self._scorer.score(alerts)

    def encode(self) -> None:
        """Router, with full payload."""
        for scored in self._scored:
            self._router.route(scored)


def measure_stages(packets: Sequence[bytes], model: str, repetitions: int) -> dict[str, Contest]:
    """Each stage, and all of them one after another."""
    naive, service = NaiveStages(packets, model), ServiceStages(packets, model)

    def run(stages: Stages, names: Sequence[str]) -> Run:
        return timed(lambda: [getattr(stages, name)() for name in names], len(packets))

    rows = {name: [name] for name in STAGES} | {"all stages": STAGES}
    return {
        row: compete(partial(run, naive, names), partial(run, service, names), repetitions)
        for row, names in rows.items()
    }
