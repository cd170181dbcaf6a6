"""Schemas by id: from a registry over HTTP, from a directory, and from the disk while the registry is down."""

from __future__ import annotations

import json
import logging
import re
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fastavro
import pytest

from broker_filter.packets import registry
from broker_filter.packets.registry import (
    DirectoryRegistry,
    HttpRegistry,
    RegistryUnavailable,
    UnknownSchemaId,
    open_registry,
)
from broker_filter.packets.schema import SchemaError

SCHEMA = json.dumps({"type": "record", "name": "lsst.v7_4.alert", "fields": [{"name": "diaSourceId", "type": "long"}]})
VERSIONS = (700, 701, 702, 703, 704, 800, 900, 1000, 1100)


class Registry:
    """A Confluent registry that holds schema 704, on a real socket; `status` makes it fail."""

    def __init__(self) -> None:
        self.status: int | None = None
        self.answer = json.dumps({"schema": SCHEMA}).encode()
        self.requests: list[str] = []
        self.authorization: str | None = None
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.requests.append(self.path)
                outer.authorization = self.headers["Authorization"]
                known = self.path == "/schemas/ids/704"
                status = outer.status or (200 if known else 404)
                body = outer.answer if status == 200 else b'{"error_code": 40403, "message": "Schema not found"}'
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server() -> Iterator[Registry]:
    server = Registry()
    yield server
    server.stop()


def client(server: Registry, cache: Path, pauses: list[float] | None = None) -> HttpRegistry:
    return HttpRegistry(server.url, cache, sleep=(pauses if pauses is not None else []).append)


def test_a_schema_is_fetched_once(server: Registry, tmp_path: Path) -> None:
    schemas = client(server, tmp_path)
    first = schemas.get(704)
    assert first.definition == json.loads(SCHEMA)
    assert first.registry_id == 704
    assert schemas.get(704) is first
    assert server.requests == ["/schemas/ids/704"]


def test_many_threads_make_one_request(server: Registry, tmp_path: Path) -> None:
    schemas = client(server, tmp_path)
    threads = [threading.Thread(target=schemas.get, args=(704,)) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.requests == ["/schemas/ids/704"]


def test_the_disk_survives_an_outage(server: Registry, tmp_path: Path) -> None:
    client(server, tmp_path).get(704)
    server.stop()
    assert client(server, tmp_path).get(704).definition == json.loads(SCHEMA)
    with pytest.raises(RegistryUnavailable, match=re.escape(server.url)):
        client(server, tmp_path).get(705)


def test_another_registry_shares_no_cache(server: Registry, tmp_path: Path) -> None:
    client(server, tmp_path).get(704)
    other = HttpRegistry("http://127.0.0.1:9", tmp_path, sleep=lambda _: None)
    with pytest.raises(RegistryUnavailable):
        other.get(704)


def test_a_damaged_cache_file_is_fetched_again(
    server: Registry, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    client(server, tmp_path).get(704)
    (file,) = tmp_path.rglob("704.avsc")
    file.write_text(SCHEMA[:20])
    assert client(server, tmp_path).get(704).definition == json.loads(SCHEMA)
    assert file.read_text() == SCHEMA
    assert "not usable" in caplog.text


def test_an_unwritable_cache_is_a_warning(server: Registry, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "cache").write_text("a file where the directory should be")
    assert client(server, tmp_path / "cache").get(704).registry_id == 704
    assert "cannot be kept" in caplog.text


def test_an_unknown_id_is_not_asked_for_again_at_once(server: Registry, tmp_path: Path) -> None:
    now = 0.0
    schemas = HttpRegistry(server.url, tmp_path, clock=lambda: now)
    for _ in range(3):
        with pytest.raises(UnknownSchemaId, match="12345"):
            schemas.get(12345)
    assert len(server.requests) == 1
    now = registry.FORGET_UNKNOWN_S + 1
    with pytest.raises(UnknownSchemaId):
        schemas.get(12345)
    assert len(server.requests) == 2


def test_a_failing_registry_is_asked_again_with_growing_pauses(server: Registry, tmp_path: Path) -> None:
    server.status = 503
    pauses: list[float] = []
    with pytest.raises(RegistryUnavailable, match="503"):
        client(server, tmp_path, pauses).get(704)
    assert len(server.requests) == registry.ATTEMPTS
    assert pauses == [0.5, 1.0, 2.0]


@pytest.mark.parametrize("answer", [b"<html>log in</html>", b"{}", b"[]", b'{"schema": 7}'])
def test_an_answer_that_is_no_schema_is_an_outage(server: Registry, tmp_path: Path, answer: bytes) -> None:
    server.answer = answer
    with pytest.raises(RegistryUnavailable):
        client(server, tmp_path).get(704)


def test_an_invalid_schema_is_an_error_and_not_kept(server: Registry, tmp_path: Path) -> None:
    server.answer = json.dumps({"schema": '"long"'}).encode()
    with pytest.raises(SchemaError):
        client(server, tmp_path).get(704)
    assert not list(tmp_path.rglob("*.avsc"))


def test_an_endless_answer_is_cut_off(server: Registry, tmp_path: Path) -> None:
    server.answer = bytes(10 << 20)
    with pytest.raises(SchemaError, match="larger"):
        client(server, tmp_path).get(704)


def test_credentials_are_sent_and_never_shown(
    server: Registry, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    schemas = HttpRegistry(f"http://me:s3cr%40t@127.0.0.1:{server.port}", tmp_path, sleep=lambda _: None)
    schemas.get(704)
    assert server.authorization == "Basic bWU6czNjckB0"
    server.status = 500
    with pytest.raises(RegistryUnavailable) as failed:
        schemas.get(705)
    shown = caplog.text + str(failed.value) + "".join(str(path) for path in tmp_path.rglob("*"))
    assert "s3cr" not in shown


def test_a_directory_stands_in_for_a_registry(lsst_schemas: Path) -> None:
    schemas = open_registry(str(lsst_schemas))
    for schema_id in VERSIONS:
        schema = schemas.get(schema_id)
        assert schema.canonical["name"] == f"lsst.v{schema_id // 100}_{schema_id % 100}.alert"
        assert schemas.get(schema_id) is schema
    with pytest.raises(UnknownSchemaId, match="12345"):
        schemas.get(12345)


def test_a_directory_resolves_names_as_fastavro_does(lsst_schemas: Path) -> None:
    schemas = DirectoryRegistry(lsst_schemas)
    for schema_id in VERSIONS:
        version = f"v{schema_id // 100}_{schema_id % 100}"
        path = lsst_schemas / str(schema_id // 100) / str(schema_id % 100) / f"lsst.{version}.alert.avsc"
        expected = fastavro.schema.to_parsing_canonical_form(fastavro.schema.load_schema(path))
        assert json.dumps(schemas.get(schema_id).canonical, separators=(",", ":")) == expected


def test_one_file_may_hold_a_whole_schema(lsst_schemas: Path, tmp_path: Path) -> None:
    nested = DirectoryRegistry(lsst_schemas).get(704)
    (tmp_path / "704.avsc").write_text(json.dumps(nested.definition))
    assert DirectoryRegistry(tmp_path).get(704).fingerprint == nested.fingerprint


def test_a_file_without_its_siblings_names_the_missing_type(lsst_schemas: Path, tmp_path: Path) -> None:
    shutil.copy(lsst_schemas / "7" / "4" / "lsst.v7_4.alert.avsc", tmp_path)
    with pytest.raises(SchemaError, match="diaSource"):
        DirectoryRegistry(tmp_path).get(704)


def test_no_registry_knows_nothing() -> None:
    with pytest.raises(UnknownSchemaId, match="no schema registry is configured"):
        open_registry(None).get(704)


def test_a_location_that_is_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotADirectoryError, match="neither a URL"):
        open_registry(str(tmp_path / "absent"))


def test_the_cache_stands_where_the_desktop_standard_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert registry.default_cache_dir() == tmp_path / "broker-filter" / "schemas"
