"""The demonstration's client of the output topics: errors of the broker are messages for the user."""

from __future__ import annotations

import pytest

from broker_filter.demo import results
from broker_filter.demo.error import DemoError
from broker_filter.demo.results import read_results
from broker_filter.local_kafka import free_ports


def test_a_broker_that_does_not_answer_is_an_error_that_names_topic_and_broker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "SILENCE_S", 0.5)
    address = f"127.0.0.1:{free_ports(1)[0]}"
    with pytest.raises(DemoError, match=f"^demo.scored: the broker at {address} cannot be read: .+; run the demo"):
        read_results(address, "demo", [])
