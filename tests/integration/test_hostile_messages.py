"""Messages that somebody made to do harm, through the real service and a broker of their own."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import fastavro
import pytest

from tests.packets import hostile
from tests.packets.test_costs import BOOLEAN_ROW, CASES, POD_BYTES, alerts

from .conftest import MakeTopic, ReadCommitted, StartService, headers, service_config

Packets = list[tuple[int, bytes]]
BROKER_TAKES = 1_000_000
"""Bytes of a message, unless a broker is told otherwise."""


@pytest.mark.kafka
def test_a_message_of_many_bad_alerts_is_one_dead_letter_and_each_is_counted(
    kafka_bootstrap: str,
    ztf_packets: Packets,
    make_topic: MakeTopic,
    start_service: StartService,
    read_committed: ReadCommitted,
    unique_name: Callable[[str], str],
) -> None:
    reader = fastavro.reader(io.BytesIO(ztf_packets[-1][1]))
    (good,) = reader
    assert isinstance(good, dict)
    assert isinstance(reader.writer_schema, dict)
    bad = [good | {"candid": k, "cutoutTemplate": None} for k in range(1, 301)]
    many = io.BytesIO()
    fastavro.writer(many, reader.writer_schema, [good, *bad, good | {"candid": 1000}])
    messages = [many.getvalue(), ztf_packets[-2][1]]
    topic, prefix = make_topic(kafka_bootstrap, messages), unique_name("filter")
    service = start_service(service_config(kafka_bootstrap, topic, prefix))

    records = read_committed(kafka_bootstrap, [f"{prefix}.scored", f"{prefix}.dead-letter"], 4)

    (letter,) = [record for record in records if record.topic().endswith("dead-letter")]
    assert letter.value() == messages[0]
    assert headers(letter)["rejected"] == "missing_cutout=300"
    assert headers(letter)["record"] == "1"
    service.wait_until(lambda: service.metric("consumed_alerts_total") == 303)
    assert service.metric("scored_alerts_total") == 3
    assert service.metric('rejected_alerts_total{reason="missing_cutout"}') == 300
    assert service.metric("dead_letters_total") == 1
    assert service.metric("unaccounted_alerts") == 0
    assert service.end() == 0


@pytest.mark.kafka
def test_hostile_messages_neither_stop_the_service_nor_take_its_memory(
    kafka_bootstrap: str,
    ztf_packets: Packets,
    make_topic: MakeTopic,
    start_service: StartService,
    unique_name: Callable[[str], str],
) -> None:
    long = hostile.schema(BOOLEAN_ROW, [], doc="d" * 500_000)
    made = [*(make() for make in CASES.values()), hostile.container(long, [alerts(300)]), *hostile.packets(10)]
    messages = [message for message in made if len(message) < BROKER_TAKES]
    good = [packet for _, packet in ztf_packets[-4:]]
    topic, prefix = make_topic(kafka_bootstrap, [*messages, *good], partitions=1), unique_name("filter")
    service = start_service(service_config(kafka_bootstrap, topic, prefix, payload="full"))

    lag = f'consumer_lag_messages{{partition="0",topic="{topic}"}}'
    service.wait_until(
        lambda: (
            service.metric("scored_alerts_total") > 1000 + len(good)
            and service.metric("dead_letters_total") > len(messages) / 2
            and service.metric(lag) == 0  # known only some time after the first messages
        )
    )

    assert len(messages) > 15
    assert service.metric("dead_letters_total") <= len(messages)
    assert service.metric("unaccounted_alerts") == 0
    peak = next(
        line for line in Path(f"/proc/{service.process.pid}/status").read_text().splitlines() if "VmHWM" in line
    )
    assert int(peak.split()[1]) << 10 < POD_BYTES
    assert service.end() == 0
