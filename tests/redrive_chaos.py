"""Kills `broker-filter redrive` at random moments: each dead letter must have one outcome (`make redrive-chaos`).

The dead-letter topic of a service that never ran is filled with whole and with damaged packets. Runs of `redrive` are
ended with SIGKILL, until a last run ends by itself; sometimes two run at once. Then a read_committed reader must find
each whole packet once among the scored alerts, and for each damaged one a single new dead letter for each number of
`tries` from 1 on.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from contextlib import ExitStack
from pathlib import Path

import yaml
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient, NewTopic

from broker_filter.kafka.topic_reader import read_with_headers
from broker_filter.local_kafka import KafkaCluster, kafka_home
from broker_filter.simulate import simulate_night

SHARED = Path(os.environ.get("BROKER_FILTER_SHARED", Path(__file__).resolve().parents[2] / "shared"))
PARTITIONS = 3
DAMAGED_EVERY = 10
"""One of this many packets is damaged, and is rejected again."""
DIFFERENT_PACKETS = 50
ALIVE_S = (1.5, 6.0)
"""Range of the time from the start of a run to its end by SIGKILL: it may not have read anything yet."""
TWO_AT_ONCE = 0.3
"""Share of the kills before which a second run starts and takes over."""
LAST_RUN_S = 600


def fill(bootstrap: str, topic: str, n: int) -> set[str]:
    """Write n dead letters as a service writes them; return the input positions of the whole packets."""
    admin = AdminClient({"bootstrap.servers": bootstrap})
    admin.create_topics([NewTopic(topic, PARTITIONS, -1)])[topic].result()
    packets = [alert.packet for alert in simulate_night(DIFFERENT_PACKETS, seed=1, survey="ztf")]
    producer = Producer({"bootstrap.servers": bootstrap})
    whole = set()
    for i in range(n):
        packet, position = packets[i % len(packets)], f"cluster/night/0/{i}"
        if i % DAMAGED_EVERY == 0:
            packet = packet[: len(packet) // 2]
        else:
            whole.add(position)
        headers = [("input", position.encode()), ("reason", b"no_model_for_survey"), ("scored", b"")]
        producer.produce(topic, packet, partition=i % PARTITIONS, headers=headers)
        producer.poll(0)
    producer.flush()
    return whole


def start(config: Path, log: Path) -> subprocess.Popen[bytes]:
    """Start a run of `redrive`."""
    with log.open("ab") as file:
        command = [sys.executable, "-m", "broker_filter", "redrive", "--config", str(config)]
        return subprocess.Popen(command, stdout=file, stderr=file)


def run(directory: Path, bootstrap: str, letters: int, kills: int, seed: int) -> bool:
    """Fill the topic, kill runs, and return whether each letter has one outcome."""
    began, chance = time.monotonic(), random.Random(seed)
    prefix = f"redrive-{os.getpid()}-{time.time_ns()}"
    whole = fill(bootstrap, f"{prefix}.dead-letter", letters)
    config, log = directory / f"{prefix}.yaml", directory / f"{prefix}.log"
    service = {
        "input": {"bootstrap_servers": bootstrap, "group_id": prefix, "topics": ["night"]},
        "output": {"prefix": prefix, "payload": "scores"},
        "batch": {"max_size": 8},  # each batch is a transaction
    }
    config.write_text(yaml.safe_dump(service))
    taken_over = killed = 0
    for _ in range(kills):
        running = [start(config, log)]
        if chance.random() < TWO_AT_ONCE:
            time.sleep(chance.uniform(*ALIVE_S))
            running.append(start(config, log))
            taken_over += 1
        time.sleep(chance.uniform(*ALIVE_S))
        for process in running:
            process.send_signal(signal.SIGKILL)
            killed += process.wait() == -signal.SIGKILL
    status = start(config, log).wait(LAST_RUN_S)

    properties = {"bootstrap.servers": bootstrap}
    scored = [headers["input"] for _, headers, _ in read_with_headers(properties, f"{prefix}.scored")]
    dead = [headers for _, headers, _ in read_with_headers(properties, f"{prefix}.dead-letter")]
    failed = [(headers["input"], headers["tries"]) for headers in dead if "tries" in headers]
    outcomes = Counter([(position or b"").decode() for position in scored])
    chains: dict[str, list[int]] = defaultdict(list)
    for position, tries in failed:
        chains[(position or b"").decode()].append(int(tries or 0))
    # A run that follows a killed one tries the new dead letters too: each message fails once for every number of tries.
    skipped = sum(sorted(tries) != list(range(1, len(tries) + 1)) for tries in chains.values())
    missing = len(whole - outcomes.keys()) + (letters - len(whole) - len(chains)) + skipped
    repeated = outcomes.total() - len(outcomes) + len(failed) - len(set(failed))
    seconds = time.monotonic() - began
    right_place = outcomes.keys() == whole and not whole & chains.keys()
    print(
        f"{letters} letters, {len(scored)} scored, {len(chains)} rejected again, {missing} missing, "
        f"{repeated} repeated; {killed} killed, {taken_over} taken over, last exit {status}, {seconds:.0f} s",
        flush=True,
    )
    right = not missing and not repeated and right_place and status == 0
    if not right:
        print(log.read_text())
    return right


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--letters", type=int, default=5000)
    parser.add_argument("--kills", type=int, default=12)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--bootstrap-servers", help="a running cluster; by default, a cluster is started")
    args = parser.parse_args()
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True)))
        bootstrap = args.bootstrap_servers
        if not bootstrap:
            home = kafka_home() or SHARED / "kafka"
            if not (home / "bin").is_dir():
                parser.error("no Apache Kafka: set KAFKA_HOME, or name a running cluster")
            bootstrap = stack.enter_context(KafkaCluster(home, scratch / "kafka")).bootstrap_servers
        return 0 if run(scratch, bootstrap, args.letters, args.kills, args.seed) else 1


if __name__ == "__main__":
    sys.exit(main())
