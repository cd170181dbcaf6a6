"""Latency, bursts, instances and long replays, measured on short runs of the whole service."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from confluent_kafka import Consumer, TopicPartition

from broker_filter.bench.runs import latency, memory, throughput
from broker_filter.bench.runs.competitors import run_no_work_loop
from broker_filter.bench.runs.testbed import Broker, Testbed
from broker_filter.bench.sample import choose_packets, in_batches
from broker_filter.packets.batch import Survey
from broker_filter.packets.decode import Decoder
from broker_filter.packets.schemas.registry import open_registry


def test_latency_is_measured_for_every_alert_after_the_warm_up(
    broker: Broker, packets: list[bytes], directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency, "WARM_UP_S", 1)
    monkeypatch.setattr(latency, "STEADY_S", 1)
    found = latency.measure_latency(broker, packets, "default", "cpu", directory)
    assert 0 < found["latency p50, ms"].median <= found["latency p99, ms"].median


def test_burst_is_drained_without_a_rebalance(broker: Broker, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "BURST", 200)
    monkeypatch.setattr(latency, "BURST_DISTINCT", 20)
    monkeypatch.setattr(latency, "MOST_STEADY_S", 5)
    found = latency.measure_burst(broker, "default", "cpu", directory)
    assert found["burst drained, s"].median > 0
    assert found["burst, rebalances"].median == 0
    assert found["burst, peak MB"].median > 50


@pytest.mark.shared
def test_burst_of_real_packets_with_long_histories_is_drained(
    broker: Broker, directory: Path, shared_data: Path, lsst_schemas: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A busy machine does not keep up with 333 of these alerts per second, and they would fill the disk.
    monkeypatch.setattr(latency, "BURST_RATE", 20)
    monkeypatch.setattr(latency, "MOST_STEADY_S", 5)
    packets = choose_packets([shared_data / "lsst" / "more" / "wire"], 8, Survey.LSST, str(lsst_schemas))
    assert max(map(len, packets)) > 500_000
    found = latency.measure_burst(
        broker, "default", "cpu", directory, visit=64, packets=packets, schema_registry=str(lsst_schemas)
    )
    assert found["burst drained, s"].median > 0


def test_two_instances_share_two_partitions(
    broker: Broker, packets: list[bytes], directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(throughput, "PARTITIONS", (2,))
    monkeypatch.setattr(throughput, "INSTANCES", (2,))
    scaling = throughput.measure_scaling(broker, packets * 32, "default", "cpu", 1, directory)
    figures = scaling["2 partitions"]["2 instances"]
    assert figures.peak_megabytes is not None
    assert figures.alerts_per_second.median > 0


def test_copying_loop_publishes_every_alert(broker: Broker, packets: list[bytes], directory: Path) -> None:
    with Testbed(broker, directory) as testbed:
        testbed.send(packets * 40)  # more than two transactions
        assert run_no_work_loop(testbed).alerts_per_second > 0  # it counts the published records


class Group:
    """A competitor of which only the committed positions are visible."""

    def __init__(self, name: str) -> None:
        self.group = self.output = name
        self.processes = [os.getpid()]

    def check(self) -> None:
        pass


def test_run_committed_between_two_polls_is_measured_from_the_earlier_poll(
    broker: Broker, packets: list[bytes], directory: Path
) -> None:
    with Testbed(broker, directory) as testbed:
        testbed.send(packets)
        ends = [
            TopicPartition(p.topic, p.partition, len(packets) // len(testbed.partitions)) for p in testbed.partitions
        ]
        member = Consumer({"bootstrap.servers": broker.bootstrap_servers, "group.id": testbed.topic})
        member.commit(offsets=ends, asynchronous=False)
        member.close()
        assert testbed.watch(Group(testbed.topic), testbed.alerts).alerts_per_second > 0


def test_memory_is_measured_early_and_late(
    packets: list[bytes], directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "EARLY", 200)
    monkeypatch.setattr(memory, "LATE", 600)
    monkeypatch.setattr(memory, "WINDOW", 100)
    found = memory.measure_memory(packets, "default", "cpu", directory)
    assert set(found) == {"resident at alert 200, MB", "resident at alert 600, MB"}
    assert all(spread.median > 10 for spread in found.values())


def test_an_endless_night_never_repeats_an_alert(packets: list[bytes]) -> None:
    night = memory.distinct_alerts(packets)
    decoder = Decoder(open_registry(None))
    (first,), (second,) = (in_batches([next(night) for _ in packets], len(packets)) for _ in range(2))
    first_turn, second_turn = decoder.decode(first)[0], decoder.decode(second)[0]
    assert not set(first_turn.alert_id.tolist()) & set(second_turn.alert_id.tolist())
    assert first_turn.object_id == second_turn.object_id
    assert (first_turn.cutouts == second_turn.cutouts).all()
