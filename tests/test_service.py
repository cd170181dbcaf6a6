"""The threads of the service and their errors, without a broker. tests/integration/test_service.py has the rest."""

from __future__ import annotations

import logging
import threading
from typing import NoReturn

import pytest

from broker_filter.config import Service
from broker_filter.kafka.client import KafkaSetupError
from broker_filter.kafka.sink import UnaccountedError
from broker_filter.service import FilterService
from broker_filter.streaming.resolved import resolve


def raiser(error: BaseException) -> NoReturn:
    raise error


def test_a_fault_logs_its_traceback_even_after_another_thread_has_failed(caplog: pytest.LogCaptureFixture) -> None:
    config = Service.model_validate(
        {
            "input": {"bootstrap_servers": "127.0.0.1:9", "group_id": "me", "topics": ["alerts"], "start": "earliest"},
            "output": {"prefix": "me"},
        }
    )
    resolved = resolve(config)
    with caplog.at_level(logging.INFO):
        service = FilterService(resolved, threading.Event())
        assert f"configuration {resolved.revision}" in caplog.messages
        stated = f'broker_filter_configuration_info{{revision="{resolved.revision}"}} 1.0'
        assert stated in service._metrics.exposition().decode()
        first = KafkaSetupError("no broker answers")
        service._thread("read", lambda: raiser(first)).run()
        service._thread("score", lambda: raiser(KafkaSetupError("no broker answers"))).run()
        assert "failed" not in caplog.text
        service._thread("commit", lambda: raiser(UnaccountedError("ztf/0/2: 0 records"))).run()
    assert service._failure is first
    assert "thread commit failed as well: ztf/0/2: 0 records" in caplog.text
    assert "Traceback (most recent call last)" in caplog.text
