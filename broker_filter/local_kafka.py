"""Kafka brokers on this machine's loopback, for the demonstration, the benchmark and the tests.

Never for data that anybody wants to keep: a broker ends with the `with` block that started it, or with its process.
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

from broker_filter.kill_with_parent import KillWithParent

USER = "alice"
"""What clients of a secure cluster log in as; the password is made anew for each cluster."""
HIGHEST_PACKET_BYTES = 128 * 2**20
"""A cluster takes messages far above what the service accepts, so that an oversized one can be sent to it."""
PORTS = range(20000, 32000)
"""Below Linux's ephemeral range, so that no client's outgoing connection takes the port of a broker that is down."""
READY_TIMEOUT_S = 120.0


class BrokerError(RuntimeError):
    """A broker that does not start; the message holds the end of its log."""


def kafka_home() -> Path | None:
    """The Apache Kafka installation that `KAFKA_HOME` names, or None."""
    home = os.environ.get("KAFKA_HOME")
    return Path(home) if home else None


def free_ports(n: int) -> list[int]:
    """`n` ports of loopback that nobody listens on now."""
    ports: list[int] = []
    for port in random.sample(PORTS, len(PORTS)):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            ports.append(port)
        if len(ports) == n:
            return ports
    raise BrokerError(f"no {n} free ports between {PORTS.start} and {PORTS.stop}")


def new_cluster_id() -> str:
    """16 bytes as Kafka writes them; the first is 0, for an id with a dash in front is an option to Kafka's scripts."""
    return base64.urlsafe_b64encode(b"\0" + secrets.token_bytes(15)).decode().rstrip("=")


class KafkaCluster:
    """Apache Kafka in KRaft mode: one node or three, plaintext or TLS with SCRAM-SHA-512 (`secure`).

    `home` is a Kafka distribution, `directory` holds the logs. Single nodes can be killed and started again; they keep
    their ports and their data. `overrides` are broker properties.
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
        """`proxy_port`: where clients are told to find a cluster of one node, for a proxy to listen on."""
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
        """`host:port,...` of every node."""
        return ",".join(f"127.0.0.1:{port}" for port in self._advertised_ports.values())

    @property
    def process_ids(self) -> tuple[int, ...]:
        """Of the nodes that are running."""
        return tuple(process.pid for process in self._processes.values())

    @property
    def listener(self) -> str:
        """`host:port` where the first node listens, whatever clients are told."""
        return f"127.0.0.1:{self._client_ports[1]}"

    @property
    def ca(self) -> Path:
        """The certificate that clients of a secure cluster trust (PEM)."""
        return self.directory / "ca.pem"

    def client_properties(self) -> dict[str, str]:
        """librdkafka properties of a client."""
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
        """Starts a node that was killed and waits until it listens."""
        self._launch(node)
        self._wait_until_listening(node)

    def kill(self, node: int, signal_number: int = signal.SIGKILL) -> None:
        """Ends a node: at once, or in good order with SIGTERM."""
        process = self._processes.pop(node)
        self._guards.pop(node).release()
        process.send_signal(signal_number)
        process.wait(READY_TIMEOUT_S)

    def stop(self) -> None:
        """Ends every node."""
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
        # A distribution writes its logs beside itself unless told otherwise, and that may be read-only.
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
    """A single small broker without Java (noida-db, of the extra `demo`); yields its `host:port`.

    It knows groups, transactions and read_committed, but is no Apache Kafka: nothing is proven by it.
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
    """Waits until `process` accepts connections on `port`; raises BrokerError where it ends or takes too long."""
    deadline = time.monotonic() + READY_TIMEOUT_S
    while True:
        if process.poll() is not None or time.monotonic() > deadline:
            state = "does not listen" if process.returncode is None else f"ended with {process.returncode}"
            raise BrokerError(f"the broker for port {port} {state}: {log.read_text(errors='replace')[-2000:]}")
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
