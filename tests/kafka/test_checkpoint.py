"""Where positions are kept on the output's cluster."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from confluent_kafka.admin import NewTopic

from broker_filter.kafka.checkpoint import PositionsTopic
from broker_filter.kafka.client import ThrottledErrorLog, admin_client, ensure_topics


@pytest.mark.kafka
def test_topic_of_positions_that_was_made_just_now_is_read(
    kafka_bootstrap: str, unique_name: Callable[[str], str]
) -> None:
    properties, error_log = {"bootstrap.servers": kafka_bootstrap}, ThrottledErrorLog("test brokers")
    admin = admin_client(properties, error_log)
    for _ in range(20):  # it has not always a leader so late, and librdkafka may believe for ever that it has none
        topics = [unique_name("new") for _ in range(5)]
        ensure_topics(admin, [NewTopic(topic, 1, 1) for topic in topics])
        assert PositionsTopic(topics[-1], properties, admin, error_log).read() == {}
