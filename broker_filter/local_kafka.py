"""Kafka brokers on the loopback interface, for the demonstration, the benchmark and the tests.

They must not hold data that you want to keep: a broker ends with the `with` block or with the process that started it.
"""

from __future__ import annotations

import base64
import os
import random
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.resources import files
from pathlib import Path
from types import TracebackType

from broker_filter.errors import BrokerFilterError
from broker_filter.kill_with_parent import KillWithParent

USER = "alice"
"""User name of the clients of a secure cluster. Each cluster has a new random password."""
HIGHEST_PACKET_BYTES = 128 * 2**20
"""Largest message of a cluster. It is far above the service's limit, so that tests can send too large messages."""
PORTS = range(20000, 32000)
"""These are below Linux's ephemeral ports: no outgoing connection can take the port of a broker that is down."""
READY_TIMEOUT_S = 120.0


class BrokerError(BrokerFilterError, RuntimeError):
    """A broker does not start. The message contains the end of the broker's log."""


def kafka_home() -> Path | None:
    """Return the Apache Kafka installation that `KAFKA_HOME` names, or None."""
    home = os.environ.get("KAFKA_HOME")
    return Path(home) if home else None


def free_ports(n: int) -> list[int]:
    """Return `n` free ports of the loopback interface. Raises BrokerError if there are fewer."""
    ports: list[int] = []
    for port in random.sample(PORTS, len(PORTS)):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            ports.append(port)
        if len(ports) == n:
            return ports
    raise BrokerError(f"no {n} free ports between {PORTS.start} and {PORTS.stop}")


def new_cluster_id() -> str:
    """Return a random cluster id: 16 bytes in URL-safe base64.

    The first byte is 0, because Kafka's scripts take an id that begins with a dash as an option.
    """
    return base64.urlsafe_b64encode(b"\0" + secrets.token_bytes(15)).decode().rstrip("=")


class KafkaCluster:
    """Apache Kafka in KRaft mode: one node or three, plaintext or TLS with SCRAM-SHA-512 (`secure`).

    `home` is the directory of a Kafka distribution, and `directory` holds the data and logs. A node can be killed and
    started again; it keeps its ports and its data. `overrides` are broker properties.
    """

    def __init__(
        self,
        home: Path,
        directory: Path,
        *,
        nodes: int = 1,
        secure: bool = False,
        overrides: Mapping[str, str] | None = None,
        proxy_port: int | None = None,
    ) -> None:
        """`proxy_port`: the port that a cluster of one node advertises to clients, so that a proxy can listen there."""
        self.home = home.resolve()
        self.directory = directory.resolve()
        self.secure = secure
        self.password = secrets.token_hex(16)
        self.nodes = range(1, nodes + 1)
        self._overrides = dict(overrides or {})
        ports = iter(free_ports(3 * nodes))
        self._client_ports = {node: next(ports) for node in self.nodes}
        self._advertised_ports = {1: proxy_port} if proxy_port else self._client_ports
        self._internal_ports = {node: next(ports) for node in self.nodes}
        self._controller_ports = {node: next(ports) for node in self.nodes}
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._guards: dict[int, KillWithParent] = {}

    @property
    def bootstrap_servers(self) -> str:
        """Addresses of all nodes as clients know them: `host:port,...`."""
        return ",".join(f"127.0.0.1:{port}" for port in self._advertised_ports.values())

    @property
    def process_ids(self) -> tuple[int, ...]:
        """The process ids of the running nodes."""
        return tuple(process.pid for process in self._processes.values())

    @property
    def listener(self) -> str:
        """The address `host:port` on which the first node listens, which may differ from the advertised address."""
        return f"127.0.0.1:{self._client_ports[1]}"

    @property
    def ca(self) -> Path:
        """The PEM file of the certificate that clients of a secure cluster trust."""
        return self.directory / "ca.pem"

    def client_properties(self) -> dict[str, str]:
        """Return the librdkafka properties with which a client connects, including the password."""
        if not self.secure:
            return {"bootstrap.servers": self.bootstrap_servers}
        return {
            "bootstrap.servers": self.bootstrap_servers,
            "security.protocol": "SASL_SSL",
            "sasl.mechanism": "SCRAM-SHA-512",
            "sasl.username": USER,
            "sasl.password": self.password,
            "ssl.ca.location": str(self.ca),
        }

    def __enter__(self) -> KafkaCluster:
        try:
            self._format()
            for node in self.nodes:
                self._launch(node)
            for node in self.nodes:
                self._wait_until_listening(node)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, node: int) -> None:
        """Start a node that was killed and wait until it listens. Raises BrokerError if it does not start."""
        self._launch(node)
        self._wait_until_listening(node)

    def kill(self, node: int, signal_number: int = signal.SIGKILL) -> None:
        """Send a signal to a node and wait until it ends: at once with SIGKILL, in an orderly way with SIGTERM."""
        process = self._processes.pop(node)
        self._guards.pop(node).release()
        process.send_signal(signal_number)
        process.wait(READY_TIMEOUT_S)

    def stop(self) -> None:
        """End every node."""
        for node in list(self._processes):
            self.kill(node)

    def _format(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        if self.secure:
            self._make_certificate()
        cluster = new_cluster_id()
        for node in self.nodes:
            properties = self.directory / f"node-{node}.properties"
            properties.write_text("".join(f"{key}={value}\n" for key, value in self._properties(node).items()))
            command = [str(self.home / "bin" / "kafka-storage.sh"), "format", "-t", cluster, "-c", str(properties)]
            if self.secure:
                command += ["--add-scram", f"SCRAM-SHA-512=[name={USER},password={self.password}]"]
            self._run(command)

    def _properties(self, node: int) -> dict[str, object]:
        replicas = len(self.nodes)
        in_sync = max(1, replicas - 1)
        internal = f"INTERNAL://127.0.0.1:{self._internal_ports[node]}"
        properties: dict[str, object] = {
            "process.roles": "broker,controller",
            "node.id": node,
            "controller.quorum.voters": ",".join(f"{i}@127.0.0.1:{port}" for i, port in self._controller_ports.items()),
            "listeners": (
                f"CLIENT://127.0.0.1:{self._client_ports[node]},{internal},"
                f"CONTROLLER://127.0.0.1:{self._controller_ports[node]}"
            ),
            "advertised.listeners": f"CLIENT://127.0.0.1:{self._advertised_ports[node]},{internal}",
            "listener.security.protocol.map": (
                f"CLIENT:{'SASL_SSL' if self.secure else 'PLAINTEXT'},INTERNAL:PLAINTEXT,CONTROLLER:PLAINTEXT"
            ),
            "controller.listener.names": "CONTROLLER",
            "inter.broker.listener.name": "INTERNAL",
            "log.dirs": self.directory / f"node-{node}",
            "num.partitions": 4,
            "default.replication.factor": replicas,
            "min.insync.replicas": in_sync,
            "offsets.topic.replication.factor": replicas,
            "offsets.topic.num.partitions": 4,
            "transaction.state.log.replication.factor": replicas,
            "transaction.state.log.min.isr": in_sync,
            "transaction.state.log.num.partitions": 4,
            "share.coordinator.state.topic.replication.factor": replicas,
            "share.coordinator.state.topic.min.isr": in_sync,
            "group.initial.rebalance.delay.ms": 0,
            "message.max.bytes": HIGHEST_PACKET_BYTES,
            "replica.fetch.max.bytes": HIGHEST_PACKET_BYTES,
            "socket.request.max.bytes": 2 * HIGHEST_PACKET_BYTES,
            "broker.session.timeout.ms": 6000,
        }
        if self.secure:
            properties |= {
                "sasl.enabled.mechanisms": "SCRAM-SHA-512",
                "listener.name.client.scram-sha-512.sasl.jaas.config": (
                    "org.apache.kafka.common.security.scram.ScramLoginModule required;"
                ),
                "ssl.keystore.location": self.directory / "broker.p12",
                "ssl.keystore.type": "PKCS12",
                "ssl.keystore.password": self.password,
                "ssl.key.password": self.password,
            }
        return properties | self._overrides

    def _make_certificate(self) -> None:
        store = [
            "-keystore",
            str(self.directory / "broker.p12"),
            "-storepass",
            self.password,
            "-alias",
            "broker",
            "-noprompt",
        ]
        key = ["-storetype", "PKCS12", "-keyalg", "EC", "-groupname", "secp256r1", "-validity", "3650"]
        name = ["-dname", "CN=localhost", "-ext", "san=ip:127.0.0.1,dns:localhost", "-ext", "bc:c=ca:true"]
        self._run(["keytool", "-genkeypair", *store, *key, *name])
        self._run(["keytool", "-exportcert", *store, "-rfc", "-file", str(self.ca)])

    def _run(self, command: list[str]) -> None:
        done = subprocess.run(command, capture_output=True, text=True, env=self._environment())
        if done.returncode:
            raise BrokerError(f"{command[0]} failed: {(done.stdout + done.stderr)[-2000:]}")

    def _environment(self) -> dict[str, str]:
        # By default Kafka writes its logs into the directory of the distribution, which may be read-only.
        return {**os.environ, "LOG_DIR": str(self.directory / "logs")}

    def _launch(self, node: int) -> None:
        command = [str(self.home / "bin" / "kafka-server-start.sh"), str(self.directory / f"node-{node}.properties")]
        with self._log(node).open("ab") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=self._environment(), start_new_session=True
            )
        self._guards[node] = KillWithParent(process)
        self._processes[node] = process

    def _log(self, node: int) -> Path:
        return self.directory / f"node-{node}.log"

    def _wait_until_listening(self, node: int) -> None:
        wait_until_listening(self._client_ports[node], self._processes[node], self._log(node))


@contextmanager
def embedded_broker(directory: Path) -> Iterator[str]:
    """Run a small broker without Java (noida-db, from the extra `demo`), and yield its address `host:port`.

    It supports groups, transactions and read_committed, but it is not Apache Kafka: a test with it does not prove that
    the service works with Apache Kafka. Raises BrokerError if it is not installed or does not start.
    """
    try:
        program = Path(str(files("noida_db"))) / "noida-db"
    except ModuleNotFoundError:
        raise BrokerError("the embedded broker is not installed: pip install 'broker-filter[demo]'") from None
    directory.mkdir(parents=True, exist_ok=True)
    program.chmod(0o755)  # wheels are unpacked without the executable bit
    (port,) = free_ports(1)
    log_path = directory / "broker.log"
    options = ["--only", "kafka", "--kafka-port", str(port), "--data-dir", str(directory / "data")]
    with log_path.open("ab") as log:
        process = subprocess.Popen(
            [str(program), "start", *options], stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    guard = KillWithParent(process)
    try:
        wait_until_listening(port, process, log_path)
        yield f"127.0.0.1:{port}"
    finally:
        guard.release()
        process.kill()
        process.wait()


def wait_until_listening(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until `process` accepts connections on `port`. Raises BrokerError if it ends or takes too long."""
    deadline = time.monotonic() + READY_TIMEOUT_S
    while True:
        if process.poll() is not None or time.monotonic() > deadline:
            state = "does not listen" if process.returncode is None else f"ended with {process.returncode}"
            raise BrokerError(f"the broker for port {port} {state}: {log.read_text(errors='replace')[-2000:]}")
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
