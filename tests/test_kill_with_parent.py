"""A guarded child process ends when its parent process ends, even if the parent is killed."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from broker_filter.kill_with_parent import KillWithParent

from .conftest import apache_kafka

PATIENCE_S = 120
"""Seconds to wait for the end of a process on a busy machine."""
HOLDER = """
import sys, time
from pathlib import Path
from broker_filter.local_kafka import KafkaCluster, embedded_broker
directory = Path(sys.argv[1])
if sys.argv[2:]:
    broker = KafkaCluster(Path(sys.argv[2]), directory)
else:
    broker = embedded_broker(directory)
with broker as running:
    print(running if isinstance(running, str) else running.bootstrap_servers, flush=True)
    time.sleep(1000)
"""
"""A program that starts a broker, prints its address, and does not end by itself."""


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize("kind", ["embedded", pytest.param("Apache Kafka", marks=pytest.mark.kafka)])
def test_broker_ends_when_the_process_that_started_it_is_killed(kind: str, tmp_path: Path) -> None:
    home = apache_kafka() if kind == "Apache Kafka" else None
    if kind == "Apache Kafka" and home is None:
        pytest.skip("needs an Apache Kafka to start: KAFKA_HOME (or ../shared/kafka) and Java")
    if kind == "embedded":
        pytest.importorskip("noida_db", reason="the embedded broker needs the extra `demo`")
    command = [sys.executable, "-c", HOLDER, str(tmp_path), *([str(home)] if home else [])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        port = int(holder.stdout.readline().rpartition(":")[2])
        assert listens(port)
        holder.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + PATIENCE_S
    while listens(port):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_released_guard_kills_no_process() -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as child:
        KillWithParent(child).release()
        assert child.stdin is not None
        child.stdin.close()
        assert child.wait(PATIENCE_S) == 0
