"""The HTTP endpoints: liveness, readiness and metrics."""

from __future__ import annotations

import logging
import socket
import struct
import threading
import time
import urllib.error
import urllib.request

import pytest

from broker_filter.health import Health, serve
from broker_filter.metrics import Metrics
from tests.conftest import own_lines


def get(port: int, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_service_is_ready_when_no_reason_against_it_is_left() -> None:
    health = Health()
    health.set("group", "not joined yet")
    health.set("schema registry", "refused")
    with serve(health, Metrics(), "127.0.0.1", 0) as port:
        assert get(port, "/readyz") == (503, "group: not joined yet; schema registry: refused\n")
        assert get(port, "/livez") == (200, "ok\n")
        health.set("group", None)
        health.set("schema registry", None)
        assert get(port, "/readyz") == (200, "ok\n")


def test_stuck_stage_is_neither_alive_nor_ready() -> None:
    health = Health()
    health.unhealthy_reason = lambda: "stage score is stuck"
    with serve(health, Metrics(), "127.0.0.1", 0) as port:
        assert get(port, "/livez") == (503, "stage score is stuck\n")
        assert get(port, "/readyz") == (503, "stage score is stuck\n")


def test_metrics_are_served_in_the_text_format() -> None:
    with serve(Health(), Metrics(), "127.0.0.1", 0) as port:
        status, text = get(port, "/metrics")
        assert status == 200
        assert "# TYPE broker_filter_consumed_alerts_total counter" in text
        assert get(port, "/")[0] == 404


def test_client_that_disconnects_before_the_answer_is_not_logged(capfd: pytest.CaptureFixture[str]) -> None:
    health = Health()
    health.set("group", "x" * 10_000_000)  # larger than a socket's buffer
    with serve(health, Metrics(), "127.0.0.1", 0) as port:
        others = threading.active_count()
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closes with a reset
            client.sendall(b"GET /readyz HTTP/1.0\r\n\r\n")
            client.recv(1)
        while threading.active_count() > others:  # wait until the answering thread has ended
            time.sleep(0.01)
        assert get(port, "/livez") == (200, "ok\n")
    assert own_lines(capfd.readouterr().err) == []


@pytest.mark.parametrize("sent", [b"", b"GET /met", b"GET /metrics HTTP/1.1\r\nHost: x\r\n"])
def test_connection_reset_by_a_client_is_at_most_one_debug_line(
    sent: bytes,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # An earlier command in this process may have left a log handler whose stream is closed.
    monkeypatch.setattr(logging.getLogger(), "handlers", [caplog.handler])
    caplog.set_level(logging.DEBUG)
    with serve(Health(), Metrics(), "127.0.0.1", 0) as port:
        others = threading.active_count()
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(sent)
            while threading.active_count() == others:  # wait until a thread handles the request
                time.sleep(0.01)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closes with a reset
        while threading.active_count() > others:
            time.sleep(0.01)
        assert get(port, "/livez") == (200, "ok\n")
    assert own_lines(capfd.readouterr().err) == []
    assert len(caplog.records) <= 1
    assert all(record.levelno == logging.DEBUG and record.exc_info is None for record in caplog.records)


def test_address_in_use_is_named_in_the_error() -> None:
    with (
        serve(Health(), Metrics(), "127.0.0.1", 0) as port,
        pytest.raises(OSError, match=f"127.0.0.1:{port}: Address already in use; set another http.host or http.port"),
        serve(Health(), Metrics(), "127.0.0.1", port),
    ):
        pass
