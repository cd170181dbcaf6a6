"""Hostile messages, sent through a real broker to the running service."""

from __future__ import annotations

import io
from pathlib import Path

import fastavro
import pytest

from tests.packets import hostile
from tests.packets.test_costs import BOOLEAN_ROW, CASES, POD_BYTES, alerts

from .conftest import MakePipeline, Packets, headers

BROKER_TAKES = 1_000_000
"""Largest message in bytes that a broker with default settings accepts."""


@pytest.mark.kafka
def test_message_with_many_bad_alerts_is_one_dead_letter_and_each_alert_is_counted(
    make_pipeline: MakePipeline, packets: Packets
) -> None:
    reader = fastavro.reader(io.BytesIO(packets[-1]))
    (good,) = reader
    assert isinstance(good, dict)
    assert isinstance(reader.writer_schema, dict)
    bad = [good | {"candid": k, "cutoutTemplate": None} for k in range(1, 301)]
    many = io.BytesIO()
    fastavro.writer(many, reader.writer_schema, [good, *bad, good | {"candid": 1000}])
    messages = [many.getvalue(), packets[-2]]
    pipeline = make_pipeline(messages)
    service = pipeline.start()

    records = pipeline.read("scored", "dead-letter", expected=4)

    (letter,) = [record for record in records if record.topic().endswith("dead-letter")]
    assert letter.value() == messages[0]
    assert headers(letter)["rejected"] == "missing_cutout=300"
    assert headers(letter)["record"] == "1"
    service.wait_consumed(303)
    assert service.metric("scored_alerts_total") == 3
    assert service.metric('rejected_alerts_total{reason="missing_cutout"}') == 300
    assert service.metric("dead_letters_total") == 1
    assert service.metric("unaccounted_alerts") == 0
    assert service.end() == 0


@pytest.mark.kafka
def test_hostile_messages_neither_stop_the_service_nor_exhaust_its_memory(
    make_pipeline: MakePipeline, packets: Packets
) -> None:
    long = hostile.schema(BOOLEAN_ROW, [], doc="d" * 500_000)
    made = [*(make() for make in CASES.values()), hostile.container(long, [alerts(300)]), *hostile.packets(10)]
    messages = [message for message in made if len(message) < BROKER_TAKES]
    good = packets[-4:]
    pipeline = make_pipeline([*messages, *good], partitions=1, payload="full")
    service = pipeline.start()

    lag = f'consumer_lag_messages{{partition="0",topic="{pipeline.topic}"}}'
    service.wait_until(
        lambda: (
            service.metric("scored_alerts_total") > 400 + len(good)  # the others exceed the memory of their message
            and service.metric("dead_letters_total") > len(messages) / 2
            and service.metric(lag) == 0  # exported only some time after the first messages
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
