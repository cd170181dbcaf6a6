"""Which days' topics are read, found by looks at a real broker."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime

import pytest
from confluent_kafka import KafkaError, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient

from broker_filter.config import Input
from broker_filter.kafka.checkpoint import Position
from broker_filter.kafka.client import Cluster, ThrottledErrorLog, client_properties
from broker_filter.kafka.days import Days

pytestmark = pytest.mark.kafka

MIDNIGHT = datetime(2026, 2, 26, tzinfo=UTC)


class ForgetfulCoordinator:
    """A checkpoint without positions, whose first calls of `glance` fail because there is no coordinator yet."""

    def __init__(self, *errors: int) -> None:
        self.errors = list(errors)

    def glance(self, partitions: Sequence[TopicPartition]) -> list[Position | None]:
        if self.errors:
            raise KafkaException(KafkaError(self.errors.pop(0)))
        return [None] * len(partitions)


def days_with(coordinator: ForgetfulCoordinator, bootstrap: str, template: str) -> Days:
    section = Input(bootstrap_servers=bootstrap, group_id="group", topics=[template], start="earliest")
    admin, error_log = AdminClient(client_properties(section)), ThrottledErrorLog("test brokers")
    return Days(section, admin, Cluster("cluster", {}), coordinator, error_log, lambda: MIDNIGHT)  # type: ignore[arg-type]


def test_first_search_waits_until_the_group_has_a_coordinator(
    kafka_bootstrap: str, unique_name: Callable[[str], str]
) -> None:
    night = unique_name("ztf")
    producer = Producer({"bootstrap.servers": kafka_bootstrap})
    producer.produce(f"{night}_20260220", b"20th")
    assert producer.flush(30) == 0
    coordinator = ForgetfulCoordinator(KafkaError.NOT_COORDINATOR, KafkaError.COORDINATOR_LOAD_IN_PROGRESS)
    days = days_with(coordinator, kafka_bootstrap, f"{night}_%Y%m%d")
    days.start()
    assert days.found.earlier == [f"{night}_20260220"]
    days.stop()


def test_first_search_that_the_access_rules_refuse_fails_at_once(kafka_bootstrap: str) -> None:
    days = days_with(ForgetfulCoordinator(KafkaError.GROUP_AUTHORIZATION_FAILED), kafka_bootstrap, "ztf_%Y%m%d")
    with pytest.raises(KafkaException):
        days.start()
