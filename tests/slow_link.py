"""Measures throughput and the longest pause between commits on a slow link to the output: `make slow-link`.

A backlog of full alerts passes through toxiproxy, which limits the rate of each connection of the service. At first the
link is unlimited, so that transactions have grown to their largest size when it becomes slow. Every alert must be
published exactly once.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import confluent_kafka
from confluent_kafka.admin import AdminClient, NewTopic

from broker_filter.local_kafka import KafkaCluster, free_ports
from tests.conftest import SHARED, apache_kafka
from tests.integration.conftest import RunningService, headers, send, service_config
from tests.toxiproxy import toxiproxy

FIRST_ALERTS, NEXT_ALERTS = 500, 1500
"""Alerts that are committed while the link is unlimited, and further alerts, in flight when it becomes slow."""
LOOK_S = 0.5
LONGEST_GAP_S = 60.0
"""Longest allowed pause between commits: one transaction may fail on the slow link, the next ones must pass."""


def main() -> int:
    """Run the measurement and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate", type=int, default=200, help="rate of each connection on the slow link, in kB/s")
    parser.add_argument("--partitions", type=int, default=4, help="number of partitions of the input topic")
    parser.add_argument("--elsewhere", action="store_true", help="put input and output on separate clusters")
    parser.add_argument("--seconds", type=float, default=120, help="duration of the slow link, in seconds")
    arguments = parser.parse_args()
    home, archive = apache_kafka(), SHARED / "data" / "ztf" / "ztf_alerts.tar"
    if home is None or not archive.exists() or not (SHARED / "toxiproxy").exists():
        print("needs Apache Kafka, toxiproxy and the shared ZTF alerts", file=sys.stderr)
        return 1
    with tarfile.open(archive) as tar:
        packets = [stream.read() for member in tar if member.isfile() and (stream := tar.extractfile(member))]
    n_slow = int(arguments.rate * 1000 * arguments.seconds / (sum(map(len, packets)) / len(packets))) + 1
    sent = [packets[i % len(packets)] for i in range(FIRST_ALERTS + NEXT_ALERTS + n_slow)]
    (port,) = free_ports(1)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        directory = Path(name)
        with (
            KafkaCluster(home, directory / "output", proxy_port=port) as output,
            toxiproxy(output) as fault,
        ):
            if not arguments.elsewhere:
                return measure(arguments, output, output.bootstrap_servers, sent, directory, fault)
            with KafkaCluster(home, directory / "input") as source:
                return measure(arguments, output, source.bootstrap_servers, sent, directory, fault)


def measure(
    arguments: argparse.Namespace,
    output: KafkaCluster,
    bootstrap: str,
    sent: list[bytes],
    directory: Path,
    fault: object,
) -> int:
    """Send the alerts, slow the link down, measure the commits, print the result and return the exit status."""
    admin = AdminClient({"bootstrap.servers": bootstrap})
    admin.create_topics([NewTopic("in", arguments.partitions, 1)])["in"].result()
    config = service_config(bootstrap, "in", "me", payload="full", bootstrap_servers=output.bootstrap_servers)
    service = RunningService(directory, config, None)
    try:
        service.wait_ready()
        send({"bootstrap.servers": bootstrap}, "in", sent)
        service.wait_until(lambda: service.metric("consumed_alerts_total") >= FIRST_ALERTS)
        attributes = {"rate": arguments.rate}
        assert callable(fault)
        fault("/toxics", {"type": "bandwidth", "stream": "upstream", "attributes": attributes})
        began = last = time.monotonic()
        before, gap = service.metric("consumed_alerts_total"), 0.0
        done = first = before
        while done < len(sent):
            time.sleep(LOOK_S)
            now, seen = time.monotonic(), service.metric("consumed_alerts_total")
            gap = max(gap, now - last)
            if seen > done:
                done, last = seen, now
            elif now - last > 2 * LONGEST_GAP_S:
                break
        aborted = service.metric('transactions_total{outcome="aborted"}')
        rate = (done - first) / (time.monotonic() - began)
        print(f"{arguments.rate} kB/s: {rate:.2f} alerts/s, longest gap {gap:.0f} s, {aborted:.0f} aborted", flush=True)
        status = service.end()
    finally:
        service.guard.release()
        if service.process.poll() is None:
            service.end(signal.SIGKILL)
    inputs = read_inputs(output, len(sent)) if done == len(sent) else []
    whole = len(inputs) == len(set(inputs)) == len(sent)
    print(f"{len(sent)} sent, {len(inputs)} found, {len(set(inputs))} different; exit status {status}")
    if not whole:
        print(service.log)
    return 0 if whole and status == 0 and gap < LONGEST_GAP_S else 1


def read_inputs(output: KafkaCluster, expected: int) -> list[str]:
    """Return the input position of every record that a read_committed reader finds."""
    properties = {"group.id": "reader", "auto.offset.reset": "earliest"}
    reader = confluent_kafka.Consumer({**properties, "bootstrap.servers": output.bootstrap_servers})
    reader.subscribe(["me.scored", "me.dead-letter"])
    inputs: list[str] = []
    while found := [message for message in reader.consume(500, 20.0) if message.error() is None]:
        inputs += [headers(message)["input"] for message in found]
        if len(inputs) >= expected:
            break
    reader.close()
    return inputs


if __name__ == "__main__":
    sys.exit(main())
