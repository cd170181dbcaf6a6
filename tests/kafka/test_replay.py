"""Replay: each alert of an archive becomes one message in the topic, and the outcomes are counted."""

from __future__ import annotations

import gzip
import io
import itertools
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import fastavro
import pytest
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from broker_filter.cli import main
from broker_filter.kafka.replay import Replayer, as_fast_as_possible, at_rate, at_speed
from broker_filter.kafka.topic_reader import read_dead_letters
from broker_filter.local_kafka import KafkaCluster
from broker_filter.packets.decode import Decoder
from broker_filter.packets.packet import FilePosition, Packet
from broker_filter.packets.rejects import RejectReason
from broker_filter.packets.schemas.registry import open_registry
from broker_filter.streaming.archives import MAX_PACKET_BYTES, read_packets

NIGHT = Path("ztf/archives/ztf_public_20180819_mod1000.tar.gz")
LEADER_TIMEOUT_S = 30.0


@pytest.fixture
def topic(kafka_bootstrap: str, unique_name: Callable[[str], str]) -> Iterator[str]:
    name = unique_name("replay")
    admin = AdminClient({"bootstrap.servers": kafka_bootstrap})
    admin.create_topics([NewTopic(name, 2, 1)])[name].result()
    yield name
    admin.delete_topics([name])[name].result()


def end_of(consumer: Consumer, partition: TopicPartition) -> int:
    """Return the end offset of a partition, as soon as it has a leader: a new topic has none for a moment."""
    deadline = time.monotonic() + LEADER_TIMEOUT_S
    while True:
        try:
            return consumer.get_watermark_offsets(partition)[1]
        except KafkaException as error:
            if error.args[0].code() != KafkaError.NOT_LEADER_FOR_PARTITION or time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def messages_in(bootstrap_servers: str, topic: str) -> list[Message]:
    """Return all messages that are in the topic now."""
    consumer = Consumer({"bootstrap.servers": bootstrap_servers, "group.id": "reader", "enable.auto.commit": False})
    partitions = [TopicPartition(topic, p, 0) for p in consumer.list_topics(topic).topics[topic].partitions]
    n_messages = sum(end_of(consumer, partition) for partition in partitions)
    consumer.assign(partitions)
    found: list[Message] = []
    while len(found) < n_messages:
        if message := consumer.poll(1):
            assert message.error() is None
            found.append(message)
    consumer.close()
    return found


def replayer(bootstrap_servers: str, topic: str, stop: threading.Event | None = None) -> Replayer:
    decoder = Decoder(open_registry(None), columns=())
    properties = {"bootstrap.servers": bootstrap_servers, "reconnect.backoff.max.ms": 500}
    return Replayer(properties, topic, decoder, stop or threading.Event())


def alert(container: bytes) -> dict[str, object]:
    (only,) = fastavro.reader(io.BytesIO(container))
    return only


def test_every_packet_of_a_night_arrives_once_keyed_by_object(
    shared_data: Path, kafka_bootstrap: str, topic: str
) -> None:
    packets = list(read_packets([shared_data / NIGHT]))
    before = time.time_ns() // 1_000_000
    replay = replayer(kafka_bootstrap, topic)
    replay.replay(packets, as_fast_as_possible())
    assert (replay.deliveries.sent, replay.deliveries.failed, replay.deliveries.unsendable) == (30, 0, 0)
    arrived = messages_in(kafka_bootstrap, topic)
    assert sorted(message.value() for message in arrived) == sorted(packet.data for packet in packets)
    for message in arrived:
        assert message.key().decode() == alert(message.value())["objectId"]
        assert message.headers() is None
        assert before <= message.timestamp()[1] <= time.time_ns() // 1_000_000


def test_each_alert_of_a_container_becomes_a_message(
    ztf_packets: list[tuple[int, bytes]], kafka_bootstrap: str, topic: str
) -> None:
    packets = [data for _, data in ztf_packets[:3]]
    first = fastavro.reader(io.BytesIO(packets[0]))
    alerts = [{**alert(packets[0]), "objectId": f"ZTF18aaaaaa{letter}"} for letter in "abc"]
    file = io.BytesIO()
    fastavro.writer(file, first.writer_schema, alerts)
    replay = replayer(kafka_bootstrap, topic)
    replay.replay([Packet(file.getvalue(), FilePosition("three.avro"))], as_fast_as_possible())
    assert replay.deliveries.sent == 3
    arrived = {message.key().decode(): alert(message.value()) for message in messages_in(kafka_bootstrap, topic)}
    assert arrived == {each["objectId"]: each for each in alerts}


def test_damaged_packets_are_sent_unchanged(
    ztf_packets: list[tuple[int, bytes]], kafka_bootstrap: str, topic: str
) -> None:
    whole = ztf_packets[0][1]
    values = [whole[:-100], b"no alert", b"\x00\x00\x00\x03\xe8 wire format", whole]
    replay = replayer(kafka_bootstrap, topic)
    replay.replay([Packet(value, FilePosition(f"{i}")) for i, value in enumerate(values)], as_fast_as_possible())
    assert sorted(message.value() for message in messages_in(kafka_bootstrap, topic)) == sorted(values)


def test_packet_that_was_not_read_completely_is_counted_and_not_sent(kafka_bootstrap: str, topic: str) -> None:
    replay = replayer(kafka_bootstrap, topic)
    values = [b"", bytes(MAX_PACKET_BYTES + 1), b"no alert"]
    replay.replay([Packet(value, FilePosition("night.tar.gz")) for value in values], as_fast_as_possible())
    assert (replay.deliveries.sent, replay.deliveries.unsendable) == (1, 2)
    assert [message.value() for message in messages_in(kafka_bootstrap, topic)] == [b"no alert"]


def test_dead_letters_are_sent_again_unchanged(
    kafka_bootstrap: str, ztf_packets: list[tuple[int, bytes]], unique_name: Callable[[str], str]
) -> None:
    letters, again = f"{unique_name('filter')}.dead-letter", unique_name("again")
    admin = AdminClient({"bootstrap.servers": kafka_bootstrap})
    admin.create_topics([NewTopic(letters, 2, 1)])[letters].result()
    first = fastavro.reader(io.BytesIO(ztf_packets[0][1]))
    several = io.BytesIO()
    fastavro.writer(several, first.writer_schema, [alert(ztf_packets[0][1])] * 3)
    producer = Producer({"bootstrap.servers": kafka_bootstrap})
    for value, reason, source, more in (
        (b"\0\0\0\0\7 wire format", "unknown_schema_id", "a/t/0/1", {}),
        (several.getvalue(), "unknown_schema_id", "a/t/0/2", {}),
        (several.getvalue(), "unknown_schema_id", "a/t/0/2", {"record": "1"}),
        (b"half", "unknown_schema_id", "a/t/0/3", {"truncated": "8"}),
        (b"no alert", "not_avro", "a/t/0/4", {}),
        (b"schema", "missing_cutout", "a/t/0/5", {"rejected": "missing_cutout=1,schema_refused=2"}),
        (b"no reason", None, "a/t/0/6", {}),
    ):
        producer.produce(letters, value, headers={"input": source, **({"reason": reason} if reason else {}), **more})
    producer.flush()
    address = f"kafka://{kafka_bootstrap}/{letters}"
    command = [sys.executable, "-m", "broker_filter", "replay", address, "--bootstrap-servers", kafka_bootstrap]
    reasons = ["--reason", "unknown_schema_id", "--reason", "schema_refused"]
    ended = subprocess.run([*command, "--topic", again, *reasons], capture_output=True, text=True, check=True)
    assert "1 dead letters are left out because they were shortened to fit into the topic" in ended.stderr
    expected = [b"\0\0\0\0\7 wire format", several.getvalue(), b"schema"]
    assert sorted(message.value() for message in messages_in(kafka_bootstrap, again)) == sorted(expected)
    everything = read_dead_letters({"bootstrap.servers": kafka_bootstrap}, letters, set(RejectReason))
    assert sorted(packet.data for packet in everything) == sorted([*expected, b"no alert"])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            ["kafka://there:1/me.dead-letter", "--reason", "nonsense"],
            "--reason nonsense: unknown reason; choose from empty, ",
        ),
        (["kafka://there:1/me.scored"], "me.scored: not a topic of dead letters (PREFIX.dead-letter)"),
        (["kafka://nowhere"], "write kafka://HOST:PORT/TOPIC"),
    ],
)
def test_error_of_a_repeated_sending_is_one_clear_line(
    source: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay", *source, "--bootstrap-servers", "127.0.0.1:1", "--topic", "again"]) == 2
    assert message in capsys.readouterr().err


def test_new_dead_letters_are_not_sent_again_in_the_same_run(
    kafka_bootstrap: str, unique_name: Callable[[str], str]
) -> None:
    """A dead letter that is rejected again must not be sent again in an endless loop."""
    letters = f"{unique_name('filter')}.dead-letter"
    admin = AdminClient({"bootstrap.servers": kafka_bootstrap})
    admin.create_topics([NewTopic(letters, 1, 1)])[letters].result()
    producer = Producer({"bootstrap.servers": kafka_bootstrap})

    def reject(i: int) -> None:
        producer.produce(letters, b"%d" % i, headers={"input": f"a/t/0/{i}", "reason": "not_avro"})
        producer.flush()

    for i in range(5):
        reject(i)
    values = []
    for packet in read_dead_letters({"bootstrap.servers": kafka_bootstrap}, letters, {"not_avro"}):
        values.append(packet.data)
        reject(100 + len(values))
    assert values == [b"0", b"1", b"2", b"3", b"4"]


@pytest.mark.kafka
def test_refused_message_is_counted_and_the_other_messages_arrive(
    kafka_bootstrap: str, unique_name: Callable[[str], str], caplog: pytest.LogCaptureFixture
) -> None:
    topic = unique_name("narrow")
    admin = AdminClient({"bootstrap.servers": kafka_bootstrap})
    admin.create_topics([NewTopic(topic, 1, 1, config={"max.message.bytes": "2000"})])[topic].result()
    replay = replayer(kafka_bootstrap, topic)
    packets = [Packet(bytes([i]) * size, FilePosition(f"{i}.avro")) for i, size in enumerate((100, 5000, 100), start=1)]
    replay.replay(packets, as_fast_as_possible())
    assert (replay.deliveries.sent, replay.deliveries.failed) == (2, 1)
    assert "2.avro: refused" in caplog.text
    assert len(messages_in(kafka_bootstrap, topic)) == 2


@pytest.mark.kafka
def test_replay_continues_after_an_outage_of_the_brokers(
    mortal_cluster: KafkaCluster, unique_name: Callable[[str], str]
) -> None:
    bootstrap, topic = mortal_cluster.bootstrap_servers, unique_name("outage")
    admin = AdminClient({"bootstrap.servers": bootstrap})
    admin.create_topics([NewTopic(topic, 1, 1)])[topic].result()

    def packets() -> Iterator[Packet]:
        for i in range(200):
            if i == 50:
                mortal_cluster.kill(1)
                threading.Timer(1, mortal_cluster.start, [1]).start()
            yield Packet(f"alert {i}".encode(), FilePosition("night.tar", f"{i}.avro"))

    replay = replayer(bootstrap, topic)
    replay.replay(packets(), at_rate(100))
    assert (replay.deliveries.sent, replay.deliveries.failed) == (200, 0)
    arrived = [message.value().decode() for message in messages_in(bootstrap, topic)]
    assert arrived == [f"alert {i}" for i in range(200)]


def test_stopped_replay_has_delivered_the_messages_that_it_counts(
    ztf_packets: list[tuple[int, bytes]], kafka_bootstrap: str, topic: str
) -> None:
    stop = threading.Event()

    def packets() -> Iterator[Packet]:
        for i, (candid, data) in enumerate(itertools.cycle(ztf_packets[:100])):
            if i == 640:
                stop.set()
            yield Packet(data, FilePosition(f"{candid}.avro"))

    replay = replayer(kafka_bootstrap, topic, stop)
    replay.replay(packets(), as_fast_as_possible())
    assert replay.deliveries.sent > 0
    assert len(messages_in(kafka_bootstrap, topic)) == replay.deliveries.sent


def test_rate_spaces_messages_evenly() -> None:
    due = at_rate(200)
    assert [due(i, None) for i in (0, 1, 300)] == pytest.approx([0, 0.005, 1.5])


def test_speed_follows_the_exposures_and_keeps_the_order() -> None:
    due = at_speed(60)
    minute = 1 / 24 / 60
    times = [None, 58000.0, 58000.0 + 30 * minute, 58000.0 + 10 * minute, None, 58000.0 + 60 * minute]
    assert [due(i, mjd) for i, mjd in enumerate(times)] == pytest.approx([0, 0, 30, 30, 30, 60], abs=1e-4)


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "broker_filter", "replay", *map(str, arguments)]


def test_command_creates_the_topic_and_prints_the_outcomes(
    shared_data: Path, tmp_path: Path, kafka_bootstrap: str, unique_name: Callable[[str], str]
) -> None:
    topic = unique_name("new")
    properties = tmp_path / "kafka.properties"
    properties.write_text("# a comment\n\nclient.id = replayer\n")
    where = ["--bootstrap-servers", kafka_bootstrap, "--topic", topic, "--partitions", 3, "--kafka-file", properties]
    done = subprocess.run(command(shared_data / NIGHT, *where, "--rate", "100/s"), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, done.stderr)
    assert f"sent 30 alerts (2.1 MB) to {topic}" in done.stdout
    arrived = messages_in(kafka_bootstrap, topic)
    assert len(arrived) == 30
    assert len({message.partition() for message in arrived}) > 1


def test_interrupt_ends_an_endless_replay_and_prints_the_outcomes(
    ztf_packets: list[tuple[int, bytes]], tmp_path: Path, kafka_bootstrap: str, topic: str
) -> None:
    archive = tmp_path / "one.avro.gz"
    archive.write_bytes(gzip.compress(ztf_packets[0][1]))
    where = ["--bootstrap-servers", kafka_bootstrap, "--topic", topic]
    with subprocess.Popen(command(archive, *where, "--repeat"), stdout=subprocess.PIPE, text=True) as process:
        try:
            while not messages_in(kafka_bootstrap, topic):
                assert process.poll() is None
            process.send_signal(signal.SIGINT)
            stdout, _ = process.communicate()
        finally:
            process.kill()
    assert process.returncode == 130
    sent = int(re.search(r"sent (\d+) alerts", stdout)[1])
    assert sent == len(messages_in(kafka_bootstrap, topic))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-night.tar.gz"], "no-such-night.tar.gz: no such file"),
        ([".", "--rate", "0"], "0 is not a positive number"),
        ([".", "--rate", "many/s"], "many/s is not a positive number"),
        ([".", "--rate", "5", "--speed", "2"], "not allowed with"),
        ([".", "--kafka", "nonsense"], "must be KEY=VALUE"),
    ],
)
def test_wrong_usage_is_one_clear_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = main(["replay", *arguments, "--bootstrap-servers", "127.0.0.1:1", "--topic", "t"])
    except SystemExit as usage:
        status = usage.code
    assert status
    assert message in capsys.readouterr().err
