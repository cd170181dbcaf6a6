"""A proxy in front of a broker that delays, limits or interrupts its connections."""

from __future__ import annotations

import json
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from broker_filter.local_kafka import KafkaCluster, free_ports, wait_until_listening
from tests.conftest import SHARED, require


@contextmanager
def toxiproxy(cluster: KafkaCluster) -> Iterator[Callable[[str, dict[str, object]], None]]:
    """Run a proxy at the address that a cluster with a `proxy_port` advertises to its clients.

    Yields a function that sets a fault, given a path below /proxies/kafka and its JSON content.
    """
    (port,) = free_ports(1)
    program = require(SHARED / "toxiproxy" / "toxiproxy-server")
    process = subprocess.Popen([program, "-port", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def post(url: str, content: dict[str, object]) -> None:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/proxies{url}", json.dumps(content).encode()).close()

    try:
        wait_until_listening(port, process, Path("/dev/null"))
        addresses = {"listen": cluster.bootstrap_servers, "upstream": cluster.listener}
        post("", {"name": "kafka", "enabled": True, **addresses})
        yield lambda path, content: post(f"/kafka{path}", content)
    finally:
        process.terminate()
        process.wait()
