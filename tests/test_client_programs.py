"""The programs of docs/how-to/read-output.md read the service's output; each needs its client to be installed.

BROKER_FILTER_CLIENTS_PYTHON: a Python with clients that need other versions of packages than broker-filter does.
"""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import fastavro
import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient, NewTopic

from broker_filter.config import Runtime, Service
from broker_filter.packets.decode import Decoder
from broker_filter.packets.packet import FilePosition, Packet
from broker_filter.packets.schemas.registry import open_registry
from broker_filter.scoring.scorer import open_scorer
from broker_filter.streaming.duplicates import DuplicateWindow
from broker_filter.streaming.filtering import score_packets
from broker_filter.streaming.resolved import resolve
from broker_filter.streaming.routing import open_router
from broker_filter.streaming.scored import ScoredBatch

CHECKOUT = Path(__file__).parents[1]
CLIENTS_PYTHON = os.environ.get("BROKER_FILTER_CLIENTS_PYTHON", sys.executable)
SECTIONS = (CHECKOUT / "docs/how-to/read-output.md").read_text().split("\n## ")[1:]
PROGRAMS = {
    section.partition("\n")[0]: program.group(1)
    for section in SECTIONS
    if (program := re.search(r"```python\n(.*?)```", section, re.DOTALL))
}
NEEDS = {
    "fastavro and confluent-kafka": ("fastavro", "confluent_kafka"),
    "confluent-kafka, wire format": ("confluent_kafka.schema_registry.avro", "httpx", "authlib"),
    "Quix Streams": ("quixstreams", "fastavro"),
    "Quix Streams, wire format": ("quixstreams.models.serializers.avro",),
    "hop-client": ("hop",),
    "gcn-kafka": ("gcn_kafka", "fastavro"),
    "babamul": ("babamul",),
    "AMPEL": ("ampel.ztf.alert.ZiAlertSupplier", "fastavro"),
}


class Registry(BaseHTTPRequestHandler):
    """A schema registry in memory that accepts one schema for each subject, as if all others were incompatible."""

    schemas: ClassVar[list[str]] = []
    subjects: ClassVar[dict[str, str]] = {}

    def do_POST(self) -> None:
        schema = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["schema"]
        if self.subjects.setdefault(self.path, schema) != schema:
            self._answer(409, {"error_code": 409, "message": "incompatible"})
            return
        if schema not in self.schemas:
            self.schemas.append(schema)
        self._answer(200, {"id": self.schemas.index(schema) + 1})

    def do_GET(self) -> None:
        schema_id = int(self.path.partition("?")[0].rpartition("/")[2])
        self._answer(200, {"schema": self.schemas[schema_id - 1]})

    def _answer(self, status: int, document: object) -> None:
        body = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/vnd.schemaregistry.v1+json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@pytest.fixture(scope="module")
def registry() -> Iterator[str]:
    Registry.schemas.clear()
    Registry.subjects.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Registry) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def scored(ztf_packets: list[tuple[int, bytes]]) -> ScoredBatch:
    """Real alerts of several schemas with a top-level `candid`, which AMPEL requires."""
    scorer = open_scorer(["default"], Runtime())
    decoder = Decoder(open_registry(None), cutout_size=scorer.cutout_size, columns=scorer.columns)
    some = [next(iter(fastavro.reader(io.BytesIO(data)))) for _, data in ztf_packets[::40]]
    packets = [
        Packet(data, FilePosition(str(candid)))
        for alert, (candid, data) in zip(some, ztf_packets[::40], strict=True)
        if isinstance(alert, dict) and "candid" in alert
    ]
    assert len(packets) > 20
    return score_packets(packets, decoder, scorer, DuplicateWindow(1000))


def publish(scored: ScoredBatch, bootstrap: str, prefix: str, registry: str | None) -> None:
    output = {"prefix": prefix} | ({"schema_registry": registry} if registry else {})
    source = {"bootstrap_servers": bootstrap, "group_id": "x", "topics": ["x"]}
    service = Service.model_validate({"input": source, "output": output})
    topic = f"{prefix}.scored"
    admin = AdminClient({"bootstrap.servers": bootstrap})
    admin.create_topics([NewTopic(topic, 1, 1)])[topic].result()
    producer = Producer({"bootstrap.servers": bootstrap})
    for record in open_router(resolve(service)).route(scored).records:
        if record.topic == topic:
            producer.produce(record.topic, record.value, record.key, headers=record.headers)
    assert producer.flush(30) == 0


def test_every_program_of_the_guide_is_tested() -> None:
    assert set(PROGRAMS) == set(NEEDS)


@pytest.mark.parametrize("client", NEEDS)
def test_client_program_reads_every_alert(
    client: str,
    scored: ScoredBatch,
    kafka_bootstrap: str,
    registry: str,
    unique_name: Callable[[str], str],
    tmp_path: Path,
) -> None:
    imports = f"import {', '.join(NEEDS[client])}"
    if subprocess.run([CLIENTS_PYTHON, "-c", imports], capture_output=True, check=False).returncode:
        pytest.skip(f"{CLIENTS_PYTHON} lacks one of {', '.join(NEEDS[client])}")
    prefix = unique_name("me")
    publish(scored, kafka_bootstrap, prefix, registry if "wire format" in client else None)
    program = PROGRAMS[client].replace("ours:9092", kafka_bootstrap).replace("me.scored", f"{prefix}.scored")
    program = program.replace("http://registry:8081", registry).replace('"look"', f'"{prefix}-look"')
    ended = subprocess.run(
        [CLIENTS_PYTHON, "-c", program], capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path
    )
    read = sorted(line.split()[0] for line in ended.stdout.splitlines())
    assert read == sorted(scored.alerts.object_id[i] for i in scored.scored.tolist()), ended.stderr
