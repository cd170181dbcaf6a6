"""The options of the brokers for tests are valid for Apache Kafka, whatever random values they contain."""

from __future__ import annotations

import base64

from broker_filter.local_kafka import new_cluster_id


def test_cluster_id_never_looks_like_an_option() -> None:
    ids = {new_cluster_id() for _ in range(2000)}  # one in 64 random ids begins with a hyphen
    assert len(ids) == 2000
    assert not any(one.startswith("-") for one in ids)
    assert all(len(base64.urlsafe_b64decode(one + "==")) == 16 for one in ids)
