"""Input that is lost before it is read: topics that are deleted and created again, and messages that expire."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence

import pytest
from confluent_kafka import Message, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from broker_filter.kafka.checkpoint import Position, position_key, position_value
from broker_filter.kafka.topic_reader import read_topic
from tests.foreign_messages import send_with_header

from .conftest import MakePipeline, MakeTopic, Packets, alert, headers, send

pytestmark = pytest.mark.kafka


def recreate(bootstrap: str, topic: str, messages: Sequence[bytes]) -> None:
    """Delete a topic, create it again with one partition, and send messages to it."""
    admin = AdminClient({"bootstrap.servers": bootstrap})
    admin.delete_topics([topic])[topic].result()
    while topic in admin.list_topics(timeout=10).topics:
        time.sleep(0.1)
    admin.create_topics([NewTopic(topic, 1, -1)])[topic].result()
    send({"bootstrap.servers": bootstrap}, topic, messages)


def delete_before(bootstrap: str, topic: str, offset: int) -> None:
    """Delete the messages of partition 0 before an offset, as the topic's retention does."""
    admin = AdminClient({"bootstrap.servers": bootstrap})
    for deleted in admin.delete_records([TopicPartition(topic, 0, offset)]).values():
        deleted.result()


def offsets(records: Sequence[Message]) -> list[int]:
    """Return the input offsets of output records in ascending order."""
    return sorted(int(headers(record)["input"].rpartition("/")[2]) for record in records)


def test_recreated_topic_is_refused_at_every_start_until_the_operator_decides(
    make_pipeline: MakePipeline, kafka_bootstrap: str, second_kafka_bootstrap: str, packets: Packets
) -> None:
    packets = packets[:13]
    pipeline = make_pipeline(packets[:5], partitions=1, target=second_kafka_bootstrap)
    first = pipeline.start()
    first.wait_consumed(5)
    assert first.end() == 0
    recreate(kafka_bootstrap, pipeline.topic, packets[5:])

    for _ in range(2):
        refused = pipeline.start()
        assert refused.wait_ended() == 1
        assert f"topic {pipeline.topic} was deleted and created again" in refused.log
        assert "Set input.remade to read" in refused.log
    assert len(pipeline.read("scored", expected=5)) == 5

    pipeline.config["input"]["remade"] = "read"
    reading = pipeline.start()
    records = pipeline.read("scored", expected=13)
    assert offsets(records) == sorted([*range(5), *range(8)])
    assert reading.end() == 0


def test_topic_that_is_recreated_during_a_run_loses_no_alert(
    make_pipeline: MakePipeline, kafka_bootstrap: str, output_bootstrap: str, packets: Packets
) -> None:
    old, new = packets[:5], packets[5:13]
    pipeline = make_pipeline(old, partitions=1, target=output_bootstrap, payload="no_cutouts")
    service = pipeline.start()
    service.wait_consumed(len(old))

    recreate(kafka_bootstrap, pipeline.topic, new)

    # Within one cluster, Kafka deletes the positions of a deleted topic. If it does so before the service sees the new
    # topic, the service reads the new topic from its beginning.
    while service.process.poll() is None and service.metric("consumed_alerts_total") < 13:
        time.sleep(0.1)
    if output_bootstrap != kafka_bootstrap or service.process.poll() is not None:
        for running in (service, pipeline.start()):
            assert running.wait_ended() == 1
            assert f"topic {pipeline.topic} was deleted and created again" in running.log
        pipeline.config["input"]["remade"] = "read"
        service = pipeline.start()
    records = pipeline.read("scored", expected=13)
    sent = {alert(packet)["candid"] for packet in (*old, *new)}
    assert {alert(record.value())["candid"] for record in records} == sent
    assert service.end() == 0


def test_position_of_an_earlier_version_without_topic_id_is_used(
    make_pipeline: MakePipeline,
    kafka_bootstrap: str,
    second_kafka_bootstrap: str,
    packets: Packets,
    make_topic: MakeTopic,
) -> None:
    pipeline = make_pipeline(packets[:8], partitions=1, target=second_kafka_bootstrap)
    positions = f"{pipeline.prefix}.positions"
    make_topic(second_kafka_bootstrap, name=positions, partitions=1, configuration={"cleanup.policy": "compact"})
    cluster = AdminClient({"bootstrap.servers": kafka_bootstrap}).list_topics(timeout=10).cluster_id
    value = position_value(Position(3, None))
    assert value == b'{"next_offset": 3}'
    send(pipeline.target, positions, [value], key=position_key(cluster, pipeline.prefix, pipeline.topic, 0))

    service = pipeline.start()

    assert offsets(pipeline.read("scored", expected=5)) == list(range(3, 8))
    assert service.end() == 0


def test_messages_that_expire_before_a_running_instance_reads_them_are_logged_and_counted(
    make_pipeline: MakePipeline, kafka_bootstrap: str, output_bootstrap: str, packets: Packets
) -> None:
    packets = packets[:10]
    pipeline = make_pipeline(packets, partitions=1, target=output_bootstrap)
    topic, service = pipeline.topic, pipeline.start()
    service.wait_consumed(10)
    lost = f'lost_messages_total{{reason="expired",topic="{topic}"}}'
    assert f"broker_filter_{lost} 0.0" in service.get("/metrics")[1]

    service.process.send_signal(signal.SIGSTOP)
    pipeline.send(packets[:1])
    time.sleep(1.5)  # this message answers the fetch request that waits at the broker
    pipeline.send(packets[1:])
    delete_before(kafka_bootstrap, pipeline.topic, 17)
    service.process.send_signal(signal.SIGCONT)

    records = pipeline.read("scored", expected=14)
    assert offsets(records)[-3:] == [17, 18, 19]
    read = set(offsets(records))
    first = min(set(range(20)) - read)
    assert read == {*range(first), 17, 18, 19}
    assert f"{topic}/0: offsets {first} to 16 expired before they were read" in service.log
    assert service.metric(lost) == 17 - first
    service.wait_until(lambda: service.metric(f'consumer_lag_messages{{partition="0",topic="{topic}"}}') == 0)
    assert service.end() == 0


def test_messages_that_expire_between_two_runs_are_counted_once(
    make_pipeline: MakePipeline, kafka_bootstrap: str, second_kafka_bootstrap: str, packets: Packets
) -> None:
    packets = packets[:10]
    pipeline = make_pipeline(packets[:3], partitions=1, target=second_kafka_bootstrap)
    topic = pipeline.topic
    lost = f'lost_messages_total{{reason="expired",topic="{topic}"}}'
    first = pipeline.start()
    first.wait_consumed(3)
    assert first.end() == 0
    pipeline.send(packets[3:])
    delete_before(kafka_bootstrap, pipeline.topic, 10)

    for n in (7, 0):
        service = pipeline.start()
        service.wait_ready()
        service.wait_for_log(f"reading {topic}/0 from offset 10")
        assert service.metric(lost) == n
        assert (f"{topic}/0: offsets 3 to 9 expired before they were read" in service.log) == bool(n)
        assert service.end() == 0


def test_header_with_a_key_that_is_not_text_is_ignored(
    make_pipeline: MakePipeline, kafka_bootstrap: str, packets: Packets
) -> None:
    pipeline = make_pipeline(partitions=1)
    send_with_header(kafka_bootstrap, pipeline.topic, packets[0], b"\xff\xfe")
    pipeline.send([packets[1]])

    service = pipeline.start()

    assert len(list(read_topic(pipeline.source, pipeline.topic))) == 2
    assert len(pipeline.read("scored", expected=2)) == 2
    assert service.metric("producer_latency_seconds_count") == 2
    assert service.end() == 0
