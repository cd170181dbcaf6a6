"""What the tests' own brokers are started with is what Apache Kafka takes, whatever chance gives."""

from __future__ import annotations

import base64

from broker_filter.local_kafka import new_cluster_id


def test_no_cluster_id_is_an_option_to_the_script_that_takes_it() -> None:
    ids = {new_cluster_id() for _ in range(2000)}  # of random ones, one in 64 would be
    assert len(ids) == 2000
    assert not any(one.startswith("-") for one in ids)
    assert all(len(base64.urlsafe_b64decode(one + "==")) == 16 for one in ids)
