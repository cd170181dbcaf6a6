"""The topic of positions on the output's cluster."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from confluent_kafka.admin import NewTopic

from broker_filter.kafka.checkpoint import PositionsTopic
from broker_filter.kafka.client import ThrottledErrorLog, admin_client, ensure_topics


@pytest.mark.kafka
def test_new_topic_of_positions_can_be_read(kafka_bootstrap: str, unique_name: Callable[[str], str]) -> None:
    properties, error_log = {"bootstrap.servers": kafka_bootstrap}, ThrottledErrorLog("test brokers")
    admin = admin_client(properties, error_log)
    for _ in range(20):  # only some new topics have no leader for a moment, which librdkafka may cache for ever
        topics = [unique_name("new") for _ in range(5)]
        ensure_topics(admin, [NewTopic(topic, 1, 1) for topic in topics])
        assert PositionsTopic(topics[-1], properties, admin, error_log).read() == {}
