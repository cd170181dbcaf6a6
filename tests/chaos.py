"""Kills the service at random moments and checks that its output is complete and without repetition: `make chaos`.

Alerts are sent in bursts. During each burst, an instance is ended with SIGKILL and started again; sometimes a second
instance joins or leaves. At the end, a read_committed reader must find every input exactly once, among the scored
alerts or the dead letters. The test runs with input and output on one cluster, and on two clusters.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import cycle
from pathlib import Path

import yaml
from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from broker_filter.kill_with_parent import KillWithParent
from broker_filter.local_kafka import KafkaCluster, free_ports, kafka_home

SHARED = Path(os.environ.get("BROKER_FILTER_SHARED", Path(__file__).resolve().parents[2] / "shared"))
PARTITIONS = 4
DAMAGED_EVERY = 40
"""One of this many packets is truncated, and must be found among the dead letters."""
BURST_S = (0.5, 15.0)
"""Range of the time from a burst to the next kill: the instances may not have started yet, or may have finished."""
AWAY_S = (0.0, 3.0)
"""Range of the time from a kill to the next start."""
ORDERLY_EXITS = {0, -signal.SIGTERM}
"""Valid exit statuses after SIGTERM, which may arrive before Python has installed its handler."""
QUIET_S = 90.0
"""Seconds without a new commit after which the run is considered complete or failed."""


def packets() -> Iterator[bytes]:
    """Yield alert packets without end: real ones if the survey data are available, otherwise simulated ones."""
    archive = SHARED / "data" / "ztf" / "ztf_alerts.tar"
    if archive.exists():
        with tarfile.open(archive) as tar:
            some = [tar.extractfile(m).read() for m in tar.getmembers()[:500] if m.isfile()]  # type: ignore[union-attr]
    else:
        from broker_filter.simulate import simulate_night

        some = [alert.packet for alert in simulate_night(200, seed=1, survey="ztf")]
    for i, packet in enumerate(cycle(some)):
        yield packet[: len(packet) // 2] if i % DAMAGED_EVERY == 0 else packet


class Chaos:
    """One run: its own topic, instances of the service, and a seeded generator of random events."""

    def __init__(self, directory: Path, source: str, output: str, seed: int) -> None:
        self.directory = directory
        self.source, self.output = source, output
        self.random = random.Random(seed)
        self.name = f"chaos-{os.getpid()}-{time.time_ns()}"
        self.instances: dict[int, subprocess.Popen[bytes]] = {}
        self.guards: dict[int, KillWithParent] = {}
        self.sent = 0
        self.packets = packets()
        admin = AdminClient({"bootstrap.servers": source})
        admin.create_topics([NewTopic(self.name, PARTITIONS, -1)])[self.name].result()
        self.producer = Producer({"bootstrap.servers": source, "linger.ms": 20})
        self.reader = OutputReader(output, [f"{self.name}.scored", f"{self.name}.dead-letter"])

    def start(self, slot: int) -> None:
        """Start an instance. Each slot has its own log."""
        config = {
            "input": {
                "bootstrap_servers": self.source,
                "group_id": self.name,
                "topics": [self.name],
                "start": "earliest",
                "kafka": {"session.timeout.ms": 6000, "heartbeat.interval.ms": 1000},
            },
            "output": {"prefix": self.name, "bootstrap_servers": self.output, "payload": "scores"},
            "batch": {"max_size": 32},
            "transaction": {"max_alerts": 256, "max_ms": 300},
            "http": {"port": free_ports(1)[0]},
        }
        path = self.directory / f"{self.name}-{slot}.yaml"
        path.write_text(yaml.safe_dump(config))
        with path.with_suffix(".log").open("ab") as log:
            self.instances[slot] = subprocess.Popen(
                [sys.executable, "-m", "broker_filter", "run", "--config", str(path)], stdout=log, stderr=log
            )
        self.guards[slot] = KillWithParent(self.instances[slot])

    def end(self, slot: int, how: signal.Signals) -> int:
        """End an instance and return its exit status."""
        process = self.instances.pop(slot)
        self.guards.pop(slot).release()
        process.send_signal(how)
        return process.wait(120)

    def burst(self, n: int) -> None:
        """Send n packets."""
        for _ in range(n):
            self.producer.produce(self.name, next(self.packets), partition=self.sent % PARTITIONS)
            self.producer.poll(0)
            self.sent += 1
        self.producer.flush()

    def run(self, alerts: int, kills: int) -> bool:
        """Send `alerts` packets and kill `kills` times; return whether every input was published exactly once."""
        began = time.monotonic()
        joined = left = 0
        self.start(0)
        for kill in range(kills):
            self.burst(alerts * (kill + 1) // (kills + 1) - self.sent)
            if kill % 3 == 1 and 1 not in self.instances:
                self.start(1)
                joined += 1
            elif kill % 3 == 0 and 1 in self.instances:
                status = self.end(1, signal.SIGTERM)
                left += 1
                if status not in ORDERLY_EXITS:
                    print(f"instance 1 ended with {status} on SIGTERM")
                    return False
            time.sleep(self.random.uniform(*BURST_S))
            victim = self.random.choice(sorted(self.instances))
            self.end(victim, signal.SIGKILL)
            time.sleep(self.random.uniform(*AWAY_S))
            self.start(victim)
            self.reader.read(0)
            print(f"kill {kill + 1}/{kills}: {self.sent} sent, {len(self.reader.seen)} out", flush=True)
        self.burst(alerts - self.sent)
        self.reader.read_until(self.sent)
        statuses = [self.end(slot, signal.SIGTERM) for slot in list(self.instances)]
        self.reader.read(3.0)  # every record that arrives now is a repetition
        return self.report(kills, joined, left, statuses, time.monotonic() - began)

    def report(self, kills: int, joined: int, left: int, statuses: list[int], seconds: float) -> bool:
        """Print the account of the run; return whether nothing is missing or repeated."""
        seen = self.reader.seen
        repeated = sum(n - 1 for n in seen.values())
        missing = self.sent - len(seen)
        print(
            f"{self.sent} sent, {self.reader.by_topic[f'{self.name}.scored']} scored, "
            f"{self.reader.by_topic[f'{self.name}.dead-letter']} dead letters, {missing} missing, {repeated} repeated; "
            f"{kills} kills, {joined} joined, {left} left, last exits {statuses}, {seconds:.0f} s",
            flush=True,
        )
        return not missing and not repeated and ORDERLY_EXITS.issuperset(statuses)

    def __enter__(self) -> Chaos:
        return self

    def __exit__(self, *_: object) -> None:
        for slot in list(self.instances):
            self.end(slot, signal.SIGKILL)


class OutputReader:
    """A read_committed reader that counts the output records of each input position."""

    def __init__(self, bootstrap: str, topics: list[str]) -> None:
        self.topics = topics
        self.seen: Counter[bytes] = Counter()
        self.by_topic: Counter[str] = Counter()
        self.consumer = Consumer(
            {
                "bootstrap.servers": bootstrap,
                "group.id": "chaos-reader",
                "enable.auto.commit": False,
                "isolation.level": "read_committed",
                "auto.offset.reset": "earliest",
            }
        )
        self.assigned = False

    def read(self, quiet_s: float) -> None:
        """Read until nothing arrives for `quiet_s` seconds."""
        if not self.assigned:
            known = self.consumer.list_topics(timeout=10).topics
            partitions = [TopicPartition(t, p, 0) for t in self.topics if t in known for p in known[t].partitions]
            self.assigned = {p.topic for p in partitions} == set(self.topics)
            if not self.assigned:
                return
            self.consumer.assign(partitions)
        while messages := self.consumer.consume(1000, max(quiet_s, 0.5)):
            for message in messages:
                if message.error() is None:
                    self.seen[dict(message.headers())["input"]] += 1
                    self.by_topic[message.topic()] += 1

    def read_until(self, n: int) -> None:
        """Read until n input positions were seen, or nothing new arrives for QUIET_S."""
        last, at = -1, time.monotonic()
        while len(self.seen) < n and time.monotonic() - at < QUIET_S:
            self.read(1.0)
            if len(self.seen) != last:
                last, at = len(self.seen), time.monotonic()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--alerts", type=int, default=20_000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--clusters", choices=("one", "two", "both"), default="both")
    parser.add_argument("--bootstrap-servers", help="a running cluster; by default, a cluster is started")
    parser.add_argument("--output-bootstrap-servers", help="a second running cluster, for the output")
    parser.add_argument("--logs", type=Path, help="directory in which the logs of the instances are kept")
    args = parser.parse_args()
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True)))
        logs = args.logs or scratch
        logs.mkdir(parents=True, exist_ok=True)

        def cluster(running: str | None, name: str) -> str:
            home = kafka_home() or SHARED / "kafka"
            if not running and not (home / "bin").is_dir():
                parser.error("no Apache Kafka: set KAFKA_HOME, or name running clusters")
            return running or stack.enter_context(KafkaCluster(home, scratch / name)).bootstrap_servers

        source = cluster(args.bootstrap_servers, "input")
        outputs = [source] if args.clusters != "two" else []
        if args.clusters != "one":
            outputs.append(cluster(args.output_bootstrap_servers, "output"))
        right = True
        for output in outputs:
            print("one cluster" if output == source else "two clusters", flush=True)
            with Chaos(logs, source, output, args.seed) as chaos:
                right = chaos.run(args.alerts, args.kills) and right
                if not right:
                    print(f"logs: {logs}")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
