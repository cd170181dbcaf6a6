"""The service while something that it needs is unavailable: brokers, network, credentials, schema registries."""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from broker_filter.kafka.transactions import GRACE_S
from broker_filter.local_kafka import USER, KafkaCluster, free_ports
from broker_filter.packets.schemas.registry import open_registry

from ..toxiproxy import toxiproxy
from .conftest import MakePipeline, Packets, headers, inputs

SOON_AGAIN = {"reconnect.backoff.max.ms": 500, "session.timeout.ms": 6000}
"""By default, clients connect up to 10 s after the brokers have started, and the group waits 10 s for a lost member."""


@pytest.mark.kafka
def test_service_waits_for_brokers_at_start_and_survives_their_restart(
    make_pipeline: MakePipeline, packets: Packets, mortal_cluster: KafkaCluster
) -> None:
    cluster = mortal_cluster
    pipeline = make_pipeline(packets[:20], source=cluster.client_properties())
    pipeline.config["input"]["kafka"] = SOON_AGAIN
    cluster.kill(1, signal.SIGTERM)

    service = pipeline.start()
    service.wait_for_log("trying again in")
    status, waits_for = service.get("/readyz")
    assert (status, service.get("/livez")[0]) == (503, 200)
    assert f"input brokers {cluster.bootstrap_servers}: not reached yet" in waits_for
    assert "cannot be reached" in service.log

    cluster.start(1)
    assert len(pipeline.read("scored", expected=20)) == 20
    service.wait_ready()

    pipeline.send(packets[20:40])
    cluster.kill(1, signal.SIGKILL)
    cluster.start(1)
    pipeline.send(packets[40:60])
    records = pipeline.read("scored", expected=60)
    assert len(inputs(records)) == len(records) == 60, service.log
    assert "Traceback" not in service.log
    assert len(service.log.splitlines()) < 100  # an outage must not fill the disk with log lines
    assert service.end() == 0


@pytest.mark.kafka
def test_unavailable_output_is_reported_while_a_backlog_waits(
    make_pipeline: MakePipeline, packets: Packets, mortal_cluster: KafkaCluster
) -> None:
    pipeline = make_pipeline(packets[:20], target=mortal_cluster.client_properties())
    service = pipeline.start(batch={"max_size": 16}, runtime={"decode_threads": 1})
    service.wait_consumed(20)

    mortal_cluster.kill(1, signal.SIGTERM)
    pipeline.send(packets[20:400])
    service.wait_until(lambda: "output: " in service.get("/readyz")[1])
    assert service.metric("consumed_alerts_total") == 20


@pytest.mark.kafka
@pytest.mark.shared
def test_slow_network_and_interruption_of_five_seconds_neither_lose_nor_repeat_alerts(
    make_pipeline: MakePipeline, packets: Packets, proxied_cluster: KafkaCluster
) -> None:
    packets = packets[:300]
    with toxiproxy(proxied_cluster) as fault:
        pipeline = make_pipeline(packets[:200], source=proxied_cluster.client_properties())
        pipeline.config["input"]["kafka"] = SOON_AGAIN
        fault("/toxics", {"type": "latency", "attributes": {"latency": 100, "jitter": 50}})
        service = pipeline.start(transaction={"max_alerts": 64}, batch={"max_size": 16})
        service.wait_until(lambda: service.metric("consumed_alerts_total") > 0)
        fault("", {"enabled": False})
        time.sleep(5)
        fault("", {"enabled": True})
        pipeline.send(packets[200:])

        records = pipeline.read("scored", "dead-letter", expected=len(packets))
        assert len(inputs(records)) == len(records) == len(packets), service.log
        assert service.end() == 0


SLOW_KB_PER_S = 200
"""Rate of the slowest link to the output for which docs/how-to/deploy.md states a throughput."""


@pytest.mark.kafka
@pytest.mark.shared
def test_backlog_that_needs_longer_than_one_transaction_may_last_passes_a_slow_link(
    make_pipeline: MakePipeline, packets: Packets, proxied_cluster: KafkaCluster
) -> None:
    packets = packets[:55]
    assert sum(map(len, packets)) > 1000 * SLOW_KB_PER_S * (GRACE_S + 1)  # a single transaction would time out
    with toxiproxy(proxied_cluster) as fault:
        pipeline = make_pipeline(packets, source=proxied_cluster.client_properties(), partitions=1, payload="full")
        slow = {"type": "bandwidth", "stream": "upstream", "attributes": {"rate": SLOW_KB_PER_S}}
        fault("/toxics", slow)
        service = pipeline.start()

        service.wait_consumed(len(packets))
        assert service.metric('transactions_total{outcome="aborted"}') == 0, service.log
        assert service.end() == 0
        records = pipeline.read("scored", expected=len(packets))
        assert len(inputs(records)) == len(records) == len(packets)


MECHANISMS = {
    "sasl.enabled.mechanisms": "SCRAM-SHA-512,OAUTHBEARER",
    "listener.name.client.oauthbearer.sasl.jaas.config": (
        "org.apache.kafka.common.security.oauthbearer.OAuthBearerLoginModule required "
        'unsecuredLoginStringClaim_sub="broker";'
    ),
}


@pytest.fixture(scope="module")
def secure_cluster(start_cluster: Callable[..., KafkaCluster]) -> KafkaCluster:
    """One node of Apache Kafka that requires TLS and either SCRAM-SHA-512 or an OpenID Connect token."""
    return start_cluster(secure=True, overrides=MECHANISMS)


@pytest.mark.kafka
def test_service_connects_with_tls_and_scram_and_a_password_from_the_environment(
    make_pipeline: MakePipeline, packets: Packets, secure_cluster: KafkaCluster
) -> None:
    pipeline = make_pipeline(packets[:20], source=secure_cluster.client_properties())
    pipeline.config["input"] |= {
        "sasl": {"mechanism": "SCRAM-SHA-512", "username": USER, "password": {"env": "SURVEY_PASSWORD"}},
        "tls": {"ca": str(secure_cluster.ca)},
    }
    service = pipeline.start({**os.environ, "SURVEY_PASSWORD": secure_cluster.password})

    assert len(pipeline.read("scored", expected=20)) == 20
    assert service.end() == 0
    assert secure_cluster.password not in service.log


@contextmanager
def http_server(handler: Callable[..., BaseHTTPRequestHandler], port: int = 0) -> Iterator[str]:
    """Serve HTTP on loopback until the block ends; yield the URL."""
    server = ThreadingHTTPServer(("127.0.0.1", port), handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def token_endpoint(secret: str) -> Iterator[str]:
    """Run an OpenID Connect provider that gives unsigned tokens to clients that know the secret; yield its URL."""

    def part(content: dict[str, object]) -> str:
        return base64.urlsafe_b64encode(json.dumps(content).encode()).decode().rstrip("=")

    class Tokens(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            expected = base64.b64encode(f"{USER}:{secret}".encode()).decode()
            known = self.headers["Authorization"] == f"Basic {expected}"
            now = int(time.time())
            token = f"{part({'alg': 'none'})}.{part({'sub': USER, 'iat': now, 'exp': now + 3600})}."
            self.send_response(200 if known else 401)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            if known:
                self.wfile.write(json.dumps({"access_token": token, "expires_in": 3600}).encode())

        def log_message(self, *_: object) -> None:
            pass

    with http_server(Tokens) as url:
        yield f"{url}/token"


@pytest.mark.kafka
def test_service_connects_with_openid_connect_and_a_secret_from_the_environment(
    make_pipeline: MakePipeline, packets: Packets, secure_cluster: KafkaCluster
) -> None:
    secret = "a-secret-of-alice"
    with token_endpoint(secret) as url:
        properties = {
            "security.protocol": "sasl_ssl",
            "ssl.ca.location": str(secure_cluster.ca),
            "sasl.mechanism": "OAUTHBEARER",
            "sasl.oauthbearer.method": "oidc",
            "sasl.oauthbearer.client.id": USER,
            "sasl.oauthbearer.token.endpoint.url": url,
        }
        known = {**secure_cluster.client_properties(), **properties, "sasl.oauthbearer.client.secret": secret}
        pipeline = make_pipeline(packets[:10], source=known)
        named = {**properties, "sasl.oauthbearer.client.secret": {"env": "CLIENT_SECRET"}}
        pipeline.config["input"]["kafka"], pipeline.config["output"]["kafka"] = named, named

        service = pipeline.start({**os.environ, "CLIENT_SECRET": secret})
        service.wait_consumed(10)
        assert service.end() == 0
        assert secret not in service.log


@pytest.mark.kafka
def test_wrong_password_is_reported_and_never_shown(
    make_pipeline: MakePipeline, secure_cluster: KafkaCluster, tmp_path: Path
) -> None:
    wrong = tmp_path / "password"
    wrong.write_text("quite-another-secret\n")
    pipeline = make_pipeline(topic="any", source=secure_cluster.client_properties())
    pipeline.config["input"] |= {
        "sasl": {"username": USER, "password": {"file": str(wrong)}},
        "tls": {"ca": str(secure_cluster.ca)},
    }
    service = pipeline.start()

    service.wait_for_log("authentication failed, check `sasl`")
    assert service.end() == 0
    assert "trying again in" in service.log
    assert "quite-another-secret" not in service.log
    assert "Traceback" not in service.log


class SchemaFiles(SimpleHTTPRequestHandler):
    """Serves the files `schemas/ids/<id>` of a directory; for other ids, it answers as a schema registry does."""

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        body = json.dumps({"error_code": 40403, "message": "Schema not found"}).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def schema_registry(directory: Path, port: int) -> AbstractContextManager[str]:
    """Run a schema registry that serves the files `schemas/ids/<id>` of a directory."""
    return http_server(partial(SchemaFiles, directory=str(directory)), port)


def test_no_alert_is_rejected_while_the_schema_registry_is_unavailable(
    make_pipeline: MakePipeline, lsst_packets: list[tuple[str, bytes]], lsst_schemas: Path, tmp_path: Path
) -> None:
    ids = tmp_path / "registry" / "schemas" / "ids"
    ids.mkdir(parents=True)
    for schema_id in (700, 701, 703, 704, 800, 1000):
        definition = open_registry(str(lsst_schemas)).get(schema_id).definition
        (ids / str(schema_id)).write_text(json.dumps({"schema": json.dumps(definition)}))
    (port,) = free_ports(1)
    pipeline = make_pipeline([packet for _, packet in lsst_packets])
    pipeline.config["input"]["schema_registry"] = f"http://127.0.0.1:{port}"
    pipeline.config["models"] = [{"bundle": "default", "also": ["lsst"]}]
    service = pipeline.start({**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")})

    service.wait_until(lambda: "schema registry" in service.get("/readyz")[1])
    assert service.metric("consumed_alerts_total") == 0
    with schema_registry(tmp_path / "registry", port):
        records = pipeline.read("scored", "dead-letter", expected=len(lsst_packets))
        service.wait_ready()

    reasons = [headers(record).get("reason", "scored") for record in records]
    assert len(records) == len(lsst_packets)
    assert reasons.count("scored") == 7
    assert reasons.count("unknown_schema_id") == 1
    assert reasons.count("missing_cutout") == 5
    assert service.end() == 0


def test_schema_registry_that_never_answers_delays_only_alerts_that_need_it(
    make_pipeline: MakePipeline,
    packets: Packets,
    lsst_packets: list[tuple[str, bytes]],
    lsst_schemas: Path,
    tmp_path: Path,
) -> None:
    """The registry accepts connections and does not answer for longer than the stall timeout of a stage."""
    (port,) = free_ports(1)
    pipeline = make_pipeline(packets[:10])
    pipeline.config["input"]["schema_registry"] = f"http://127.0.0.1:{port}"
    pipeline.config["models"] = [{"bundle": "default", "also": ["lsst"]}]
    pipeline.config["stall_timeout_s"] = 4
    pipeline.config["runtime"] = {"decode_threads": 4}
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    wire = [packet for _, packet in lsst_packets if packet[:5] == b"\0\0\0\x02\xc0"]
    with socket.create_server(("127.0.0.1", port)):
        service = pipeline.start(environment)
        assert len(pipeline.read("scored", expected=10)) == 10
        for packet in wire:
            pipeline.send([packet])
        service.wait_for_log("no complete answer within")
        service.wait_until(lambda: service.log.count("trying again") >= 2)
        assert service.get("/livez") == (200, "ok\n")
        assert "schema registry" in service.get("/readyz")[1]

    ids = tmp_path / "registry" / "schemas" / "ids"
    ids.mkdir(parents=True)
    definition = open_registry(str(lsst_schemas)).get(704).definition
    (ids / "704").write_text(json.dumps({"schema": json.dumps(definition)}))
    with schema_registry(tmp_path / "registry", port):
        records = pipeline.read("scored", "dead-letter", expected=10 + len(wire))
        service.wait_ready()
    assert {headers(record).get("reason", "scored") for record in records} <= {"scored", "missing_cutout"}
    assert service.end() == 0


@pytest.mark.parametrize("subject", ["topic", None])
def test_alert_with_a_schema_that_the_output_registry_refuses_is_a_dead_letter(
    make_pipeline: MakePipeline, ztf_packets: list[tuple[int, bytes]], subject: str | None
) -> None:
    """The registry accepts one schema for each subject, and real packets have several schemas."""
    packets, subjects = [packet for _, packet in ztf_packets[::40]], dict[str, str]()

    class OneSchemaEach(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            schema = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["schema"]
            status, body = 200, {"id": 1 + zlib.crc32(schema.encode()) % 1000}
            if subjects.setdefault(self.path, schema) != schema:
                status, body = 409, {"error_code": 409, "message": "incompatible"}
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    with http_server(OneSchemaEach) as url:
        naming = {"subject": subject} if subject else {}
        pipeline = make_pipeline(packets, payload="full", schema_registry=url, **naming)
        service = pipeline.start()
        records = pipeline.read("scored", "dead-letter", expected=len(packets))
        letters = [record for record in records if record.topic() == f"{pipeline.prefix}.dead-letter"]
        if subject:
            assert 0 < len(letters) < len(packets)
            assert {headers(letter)["reason"] for letter in letters} == {"schema_refused"}
            assert {letter.value() for letter in letters} < set(packets)
            refused = 'rejected_alerts_total{reason="schema_refused"}'
            service.wait_until(lambda: service.metric(refused) == len(letters))
            assert service.metric("unaccounted_alerts") == 0
        else:
            assert letters == []
        assert service.end() == 0
