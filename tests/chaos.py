"""Kills the service at random moments and checks that its output is complete and without repetition: `make chaos`.

Alerts are sent in bursts. During each burst, an instance is ended with SIGKILL and started again; sometimes a second
instance joins or leaves. All the time, the configuration is changed and reloaded, sometimes with errors in the file. At
the end, a read_committed reader must find every input exactly once, among the scored alerts or the dead letters, and
each record must hold what the one configuration that it names makes: its models, its filters, their outcomes, and a
record in the topic of each filter that the alert passed, and in that of shadow models if there is one. Within a
partition, configurations follow each other in order, unless the partition goes to another instance. The test runs with
input and output on one cluster, and on two clusters.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any

import fastavro
import yaml
from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from broker_filter.config import SCORED, SHADOW
from broker_filter.config_file import load_service
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
RELOAD_S = (0.3, 4.0)
"""Range of the time between two reloads: the next one may be requested before the last one has finished."""
BESIDE_RELOAD = 100
"""Alerts that are sent immediately before a reload."""
READ_S = 1.0
"""Time in which an instance reads a file with errors, before the file without them comes back."""
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


def hears_hangup(process: subprocess.Popen[bytes]) -> bool:
    """Return whether a process has installed its handler of SIGHUP, which would otherwise end it."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return False
    caught = next((line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")), "0")
    return bool(int(caught, 16) >> (signal.SIGHUP - 1) & 1)


def serves(port: int) -> bool:
    """Return whether an instance has read its file and serves its metrics."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


class Configurations:
    """The configurations of a run, numbered from 0: each has another revision, and any two in a row differ much."""

    def __init__(self, directory: Path, base: dict[str, Any]) -> None:
        self._file = directory / f"{base['output']['prefix']}-revision.yaml"
        self._base = base
        self.by_revision: dict[str, int] = {}

    def make(self, n: int) -> dict[str, Any]:
        """Return configuration n, and remember its revision."""
        made = self._base | {"models": self.models(n), "filters": self.filters(n)}
        made["models"] = [*self.models(n), *({"bundle": name, "shadow": True} for name in self.shadows(n))]
        self._file.write_text(yaml.safe_dump(made))
        self.by_revision[load_service(self._file).revision] = n
        return made

    def models(self, n: int) -> list[str]:
        """Return the names of the serving models."""
        return ["default", "curves"] if n % 2 else ["default"]

    def shadows(self, n: int) -> list[str]:
        """Return the names of the shadow models."""
        return ["classes"] if n % 4 == 3 else []

    def filters(self, n: int) -> list[dict[str, str]]:
        """Return the filters, as the service file has them."""
        extra = [{"name": f"extra-{n % 3}", "where": "default.real < 0.5"}] if n % 3 else []
        return [{"name": "real", "where": f"default.real > {self.threshold(n)}"}, *extra]

    def threshold(self, n: int) -> float:
        """Return the threshold of the filter `real`."""
        return 0.3 + n / 1000

    def wrong(self, record: dict[str, Any], topic: str) -> str:
        """Return what in a record does not fit the configuration that the record names; empty if all fits.

        `topic`: name of the record's topic without the prefix. Only the topic `shadow` has outputs of shadow models.
        """
        said = record["broker_filter"]
        if (n := self.by_revision.get(said["configuration"])) is None:
            return f"unknown configuration {said['configuration']!r}"
        models = [(model["model"], model["shadow"]) for model in said["models"]]
        shadows = self.shadows(n) if topic == SHADOW else []
        if models != [*((name, False) for name in self.models(n)), *((name, True) for name in shadows)]:
            return f"models {models} by configuration {n}"
        real = said["models"][0]["outputs"]["real"]
        due = [("real", real > self.threshold(n)), *((one["name"], real < 0.5) for one in self.filters(n)[1:])]
        found = [(one["name"], one["passed"]) for one in said["filters"]]
        return "" if found == due else f"filters {found} instead of {due} by configuration {n}"


class Chaos:
    """One run: its own topic, instances of the service, and a seeded generator of random events."""

    def __init__(self, directory: Path, source: str, output: str, seed: int) -> None:
        self.directory = directory
        self.source, self.output = source, output
        self.random = random.Random(seed)
        self.name = f"chaos-{os.getpid()}-{time.time_ns()}"
        self.instances: dict[int, subprocess.Popen[bytes]] = {}
        self.guards: dict[int, KillWithParent] = {}
        self.alerts = self.sent = 0
        self.packets = packets()
        admin = AdminClient({"bootstrap.servers": source})
        admin.create_topics([NewTopic(self.name, PARTITIONS, -1)])[self.name].result()
        self.producer = Producer({"bootstrap.servers": source, "linger.ms": 20})
        base = {
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
        }
        self.configurations = Configurations(directory, base)
        self.present = self.configurations.make(0)
        self.reloads = self.broken = 0
        self.ports: dict[int, int] = {}
        self.reader = OutputReader(output, self.name, self.configurations)

    def write(self, slot: int, text: str | None = None) -> Path:
        """Replace the service file of an instance by the present configuration, or by another text."""
        path = self.directory / f"{self.name}-{slot}.yaml"
        new = path.with_suffix(".new")
        new.write_text(text or yaml.safe_dump(self.present | {"http": {"port": self.ports[slot]}}))
        new.rename(path)
        return path

    def reload(self) -> None:
        """Let all instances reload the next configuration; sometimes a file with errors, sometimes with two signals."""
        if self.random.random() < 0.2:
            started = [slot for slot in self.instances if serves(self.ports[slot])]
            for slot in started:
                self.write(slot, "models: [absent]\n")
            self.hang_up(started)
            time.sleep(READ_S)
            for slot in started:
                self.write(slot)
            self.broken += bool(started)
            return
        self.reloads += 1
        self.present = self.configurations.make(self.reloads)
        for slot in self.instances:
            self.write(slot)
        for _ in range(self.random.choice([1, 1, 2])):
            self.hang_up([slot for slot, process in self.instances.items() if hears_hangup(process)])

    def hang_up(self, slots: list[int]) -> None:
        """Send SIGHUP to instances."""
        for slot in slots:
            self.instances[slot].send_signal(signal.SIGHUP)

    def wait(self, seconds: float, reloads: int) -> None:
        """Wait, and reload up to `reloads` times meanwhile, each time with alerts in flight."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(left, self.random.uniform(*RELOAD_S)))
            if reloads:
                self.burst(BESIDE_RELOAD)
                self.reload()
                reloads -= 1

    def start(self, slot: int) -> None:
        """Start an instance. Each slot has its own log."""
        self.ports[slot] = free_ports(1)[0]
        path = self.write(slot)
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
        """Send n packets, or fewer if all have been sent."""
        for _ in range(min(n, self.alerts - self.sent)):
            self.producer.produce(self.name, next(self.packets), partition=self.sent % PARTITIONS)
            self.producer.poll(0)
            self.sent += 1
        self.producer.flush()

    def run(self, alerts: int, kills: int, reloads: int, instances: int) -> bool:
        """Send `alerts` packets and kill `kills` times; return whether the output is right.

        `reloads`: the most reloads before each kill. `instances`: 1, or 2 so that a second one joins at times.
        """
        began = time.monotonic()
        joined = left = 0
        self.alerts = alerts
        self.start(0)
        for kill in range(kills):
            self.burst(alerts * (kill + 1) // (kills + 1) - self.sent)
            if instances > 1 and kill % 3 == 1 and 1 not in self.instances:
                self.start(1)
                joined += 1
            elif kill % 3 == 0 and 1 in self.instances:
                status = self.end(1, signal.SIGTERM)
                left += 1
                if status not in ORDERLY_EXITS:
                    print(f"instance 1 ended with {status} on SIGTERM")
                    return False
            self.wait(self.random.uniform(*BURST_S), reloads)
            victim = self.random.choice(sorted(self.instances))
            self.end(victim, signal.SIGKILL)
            time.sleep(self.random.uniform(*AWAY_S))
            self.start(victim)
            self.reader.read(0)
            done = f"{self.sent} sent, {len(self.reader.seen)} out, {self.reloads} reloads"
            print(f"kill {kill + 1}/{kills}: {done}", flush=True)
        self.wait(BURST_S[1] if reloads else 0, reloads)
        self.burst(alerts - self.sent)
        self.reader.read_until(self.sent)
        statuses = [self.end(slot, signal.SIGTERM) for slot in list(self.instances)]
        self.reader.read(3.0)  # every record that arrives now is a repetition
        return self.report(kills, joined, left, statuses, time.monotonic() - began)

    def report(self, kills: int, joined: int, left: int, statuses: list[int], seconds: float) -> bool:
        """Print the account of the run; return whether nothing is missing, repeated or mixed up."""
        seen = self.reader.seen
        repeated = sum(n - 1 for n in seen.values())
        missing = self.sent - len(seen)
        print(
            f"{self.sent} sent, {self.reader.by_topic[f'{self.name}.scored']} scored, "
            f"{self.reader.by_topic[f'{self.name}.dead-letter']} dead letters, {missing} missing, {repeated} repeated, "
            f"{self.reader.by_topic[f'{self.name}.{SHADOW}']} of shadow models; "
            f"{kills} kills, {joined} joined, {left} left, last exits {statuses}, {seconds:.0f} s",
            flush=True,
        )
        # A partition that goes to another instance may go back to an earlier configuration once.
        backward, allowed = self.reader.backward(), PARTITIONS * (kills + joined + left) if joined else 0
        unfiltered = self.reader.unfiltered()
        print(
            f"{self.reloads} reloads and {self.broken} of broken files, records of {len(self.reader.by_configuration)} "
            f"configurations, {len(self.reader.wrong)} records that do not fit theirs, {unfiltered} missing or wrong "
            f"in the topics of filters and shadows, {backward} steps back to an earlier configuration "
            f"({allowed} possible)",
            *self.reader.wrong[:3],
            sep="\n  ",
            flush=True,
        )
        fits = not self.reader.wrong and not unfiltered and backward <= allowed
        return not missing and not repeated and fits and ORDERLY_EXITS.issuperset(statuses)

    def __enter__(self) -> Chaos:
        return self

    def __exit__(self, *_: object) -> None:
        for slot in list(self.instances):
            self.end(slot, signal.SIGKILL)


class OutputReader:
    """A read_committed reader that counts the output records of each input position, and compares them."""

    def __init__(self, bootstrap: str, name: str, configurations: Configurations) -> None:
        self.name = name
        self.configurations = configurations
        self.seen: Counter[bytes] = Counter()
        """Records among the scored alerts and dead letters, by input position."""
        self.by_topic: Counter[str] = Counter()
        self.by_configuration: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.passed: Counter[tuple[str, bytes, str]] = Counter()
        """Filter, input position and configuration of each outcome in a scored record that is true. A shadow model
        counts as a filter that passes every alert."""
        self.filtered: Counter[tuple[str, bytes, str]] = Counter()
        """The same of the records in the topics of filters and of shadow models."""
        self.order: dict[str, dict[int, int]] = defaultdict(dict)
        """Number of the configuration, by input partition and offset."""
        self.consumer = Consumer(
            {
                "bootstrap.servers": bootstrap,
                "group.id": "chaos-reader",
                "enable.auto.commit": False,
                "isolation.level": "read_committed",
                "auto.offset.reset": "earliest",
            }
        )
        self.assigned: set[str] = set()

    def read(self, quiet_s: float) -> None:
        """Read until nothing arrives for `quiet_s` seconds. Topics that have been created meanwhile are read too."""
        known = self.consumer.list_topics(timeout=10).topics
        own = (SCORED, "dead-letter", "real", "extra-1", "extra-2", SHADOW)
        found = {topic for name in own if (topic := f"{self.name}.{name}") in known} - self.assigned
        if found:
            self.consumer.incremental_assign([TopicPartition(t, p, 0) for t in found for p in known[t].partitions])
            self.assigned |= found
        if not self.assigned:
            return
        while messages := self.consumer.consume(1000, max(quiet_s, 0.5)):
            for message in messages:
                if message.error() is None:
                    self.take(message)

    def take(self, message: Any) -> None:
        """Count and check one record."""
        name, place = message.topic().removeprefix(f"{self.name}."), dict(message.headers())["input"]
        self.by_topic[message.topic()] += 1
        if name in (SCORED, "dead-letter"):
            self.seen[place] += 1
        if name == "dead-letter":
            return
        (record,) = fastavro.reader(io.BytesIO(message.value()))
        assert isinstance(record, dict)
        revision = record["broker_filter"]["configuration"]
        if wrong := self.configurations.wrong(record, name):
            self.wrong.append(f"{message.topic()} {place.decode()}: {wrong}")
        if name != SCORED:
            self.filtered[name, place, revision] += 1
            return
        self.by_configuration[revision] += 1
        self.passed.update(
            (one["name"], place, revision) for one in record["broker_filter"]["filters"] if one["passed"]
        )
        number = self.configurations.by_revision.get(revision, -1)
        if number >= 0 and self.configurations.shadows(number):
            self.passed[SHADOW, place, revision] += 1
        partition, _, offset = place.decode().rpartition("/")
        self.order[partition][int(offset)] = number

    def unfiltered(self) -> int:
        """Return how many records of the topics of filters and of shadow models are missing, repeated or of another
        configuration."""
        return (self.passed - self.filtered).total() + (self.filtered - self.passed).total()

    def backward(self) -> int:
        """Return how often an alert has an earlier configuration than the alert before it in its partition."""
        orders = [[number for _, number in sorted(order.items())] for order in self.order.values()]
        return sum(after < before for order in orders for before, after in pairwise(order))

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
    parser.add_argument("--reloads", type=int, default=5, help="most reloads before each kill")
    parser.add_argument("--instances", type=int, choices=(1, 2), default=2, help="1: no second instance joins")
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
                right = chaos.run(args.alerts, args.kills, args.reloads, args.instances) and right
                if not right:
                    print(f"logs: {logs}")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
