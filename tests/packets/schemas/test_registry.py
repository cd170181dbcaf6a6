"""Schemas are found by id in a registry, in a directory, and in the disk cache while the registry is down."""

from __future__ import annotations

import json
import logging
import re
import shutil
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fastavro
import pytest

from broker_filter.packets.decode import Decoder
from broker_filter.packets.framing import wire
from broker_filter.packets.packet import FilePosition, Packet
from broker_filter.packets.rejects import RejectReason
from broker_filter.packets.schemas import registry
from broker_filter.packets.schemas.registry import (
    DirectoryRegistry,
    HttpRegistry,
    RegistryUnavailable,
    UnknownSchemaId,
    open_registry,
)
from broker_filter.packets.schemas.registry_client import RegistryClient
from broker_filter.packets.schemas.writer_schema import SchemaError, WriterSchema

SCHEMA = json.dumps({"type": "record", "name": "lsst.v7_4.alert", "fields": [{"name": "diaSourceId", "type": "long"}]})
VERSIONS = (700, 701, 702, 703, 704, 800, 900, 1000, 1100)


class Registry:
    """A Confluent registry with schema 704, on a real socket. `status`: an HTTP error; `redirect`: another address."""

    def __init__(self) -> None:
        self.status: int | None = None
        self.redirect: str | None = None
        self.error = b'{"error_code": 40403, "message": "Schema not found"}'
        self.answer = json.dumps({"schema": SCHEMA}).encode()
        self.requests: list[str] = []
        self.authorization: str | None = None
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.requests.append(self.path)
                outer.authorization = self.headers["Authorization"]
                if outer.redirect is not None and not self.path.startswith("/moved"):
                    self.send_response(307)
                    self.send_header("Location", outer.redirect + self.path)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                known = self.path.endswith("/schemas/ids/704")
                status = outer.status or (200 if known else 404)
                body = outer.answer if status == 200 else outer.error
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


def test_schemas_are_read_from_the_disk_cache_during_an_outage(server: Registry, tmp_path: Path) -> None:
    client(server, tmp_path).get(704)
    server.stop()
    assert client(server, tmp_path).get(704).definition == json.loads(SCHEMA)
    with pytest.raises(RegistryUnavailable, match=re.escape(server.url)):
        client(server, tmp_path).get(705)


def test_registries_do_not_share_a_cache(server: Registry, tmp_path: Path) -> None:
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
    assert "cannot be read from the cache" in caplog.text


OTHER_SCHEMA = SCHEMA.replace("long", "string")


def test_a_schema_in_doubt_is_requested_again_once(server: Registry, tmp_path: Path) -> None:
    client(server, tmp_path).get(704)
    server.answer = json.dumps({"schema": OTHER_SCHEMA}).encode()
    now = 0.0
    schemas = HttpRegistry(server.url, tmp_path, clock=lambda: now)
    kept = schemas.get(704)
    (file,) = tmp_path.rglob("704.avsc")
    assert (kept.definition, kept.cached, len(server.requests)) == (json.loads(SCHEMA), file, 1)
    renewed = schemas.get(704, kept)
    assert (renewed.definition, renewed.cached) == (json.loads(OTHER_SCHEMA), None)
    assert schemas.get(704) is schemas.get(704, kept) is renewed
    assert file.read_text() == OTHER_SCHEMA
    for _ in range(3):  # three corrupt packets in sequence
        assert schemas.get(704, renewed) is renewed
    assert len(server.requests) == 2
    now = registry.DOUBT_INTERVAL_S + 1
    assert schemas.get(704, renewed) is renewed
    assert len(server.requests) == 3


def test_a_schema_in_doubt_is_kept_while_the_registry_does_not_answer(server: Registry, tmp_path: Path) -> None:
    client(server, tmp_path).get(704)
    server.status = 503
    schemas = client(server, tmp_path)
    kept = schemas.get(704)
    assert schemas.get(704, kept) is kept
    server.status = 404
    schemas = client(server, tmp_path)
    kept = schemas.get(704)
    assert schemas.get(704, kept) is kept


def test_alerts_decode_after_a_wiped_registry_gave_their_id_to_another_schema(
    server: Registry, tmp_path: Path, lsst_schemas: Path, lsst_packets: list[tuple[str, bytes]]
) -> None:
    """The cached schema is outdated first, then the schema in memory."""
    sound, _ = Decoder(DirectoryRegistry(lsst_schemas)).decode(
        [Packet(data, FilePosition(name)) for name, data in lsst_packets]
    )
    first, second = sorted({record.schema for record in sound.records}, key=lambda schema: schema.fingerprint)[:2]
    alerts = {
        schema: [
            Packet(wire.frame(704, bytes(record.body)), FilePosition(str(k)))
            for k, record in enumerate(sound.records)
            if record.schema is schema
        ]
        for schema in (first, second)
    }

    def mean(schema: WriterSchema) -> None:
        server.answer = json.dumps({"schema": json.dumps(schema.definition)}).encode()

    mean(first)
    client(server, tmp_path).get(704)

    now = 0.0
    decoder = Decoder(HttpRegistry(server.url, tmp_path, clock=lambda: now))
    for schema in (second, first):
        mean(schema)
        batch, rejects = decoder.decode(alerts[schema])
        assert (len(batch), rejects) == (len(alerts[schema]), [])
        now += registry.DOUBT_INTERVAL_S + 1
    assert len(server.requests) == 3


def test_a_reject_names_the_cache_file_of_its_schema(server: Registry, tmp_path: Path, lsst_schemas: Path) -> None:
    server.answer = json.dumps({"schema": json.dumps(DirectoryRegistry(lsst_schemas).get(704).definition)}).encode()
    client(server, tmp_path).get(704)
    (file,) = tmp_path.rglob("704.avsc")
    packet = Packet(wire.frame(704, b"\xff" * 1000), FilePosition("damaged"))
    for status in (None, 503, 404):  # the registry gives the same schema, is down, or does not know the id
        server.status = status
        _, [reject] = Decoder(client(server, tmp_path)).decode([packet])
        assert reject.reason is RejectReason.CORRUPT
        assert reject.detail.endswith(f"schema 704 was read from the cache file {file} of an earlier run")
        file.write_text(json.loads(server.answer)["schema"])
    server.status = None
    file.unlink()
    _, [reject] = Decoder(client(server, tmp_path)).decode([packet])
    assert str(tmp_path) not in reject.detail


def test_the_disk_cache_can_be_dropped(server: Registry, tmp_path: Path) -> None:
    client(server, tmp_path).get(704)
    HttpRegistry("http://127.0.0.1:9", tmp_path)
    server.answer = json.dumps({"schema": OTHER_SCHEMA}).encode()
    assert open_registry(server.url, tmp_path).get(704).definition == json.loads(SCHEMA)
    assert open_registry(server.url, tmp_path, drop_cache=True).get(704).definition == json.loads(OTHER_SCHEMA)


def test_an_unwritable_cache_is_only_a_warning(
    server: Registry, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file where the directory should be")
    assert client(server, tmp_path / "cache").get(704).registry_id == 704
    assert "cannot be written to the cache" in caplog.text


def test_an_unknown_id_is_not_requested_again_at_once(server: Registry, tmp_path: Path) -> None:
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


def test_a_failing_registry_is_retried_with_growing_pauses(server: Registry, tmp_path: Path) -> None:
    server.status = 503
    pauses: list[float] = []
    with pytest.raises(RegistryUnavailable, match="503"):
        client(server, tmp_path, pauses).get(704)
    assert len(server.requests) == registry.ATTEMPTS
    assert pauses == [0.5, 1.0, 2.0]


@pytest.mark.parametrize("answer", [b"<html>log in</html>", b"{}", b"[]", b'{"schema": 7}'])
def test_an_answer_without_a_schema_counts_as_an_outage(server: Registry, tmp_path: Path, answer: bytes) -> None:
    server.answer = answer
    with pytest.raises(RegistryUnavailable):
        client(server, tmp_path).get(704)


def test_an_invalid_schema_is_an_error_and_not_cached(server: Registry, tmp_path: Path) -> None:
    server.answer = json.dumps({"schema": '"long"'}).encode()
    with pytest.raises(SchemaError):
        client(server, tmp_path).get(704)
    assert not list(tmp_path.rglob("*.avsc"))


def test_an_invalid_schema_is_not_requested_again_at_once(server: Registry, tmp_path: Path) -> None:
    server.answer = json.dumps({"schema": '"long"'}).encode()
    schemas = client(server, tmp_path)
    for _ in range(3):
        with pytest.raises(SchemaError):
            schemas.get(704)
    assert len(server.requests) == 1


def test_an_endless_answer_is_cut_off_and_counts_as_an_outage(server: Registry, tmp_path: Path) -> None:
    server.answer = bytes(10 << 20)
    with pytest.raises(RegistryUnavailable, match="more than"):
        client(server, tmp_path).get(704)


@pytest.mark.parametrize(
    "error", [b"<html>no such page</html>", b"", b"[]", b'{"message": "no route"}', b'{"error_code": 404}']
)
def test_only_a_registrys_own_error_code_means_an_unknown_id(server: Registry, tmp_path: Path, error: bytes) -> None:
    server.status, server.error = 404, error
    with pytest.raises(RegistryUnavailable, match="404"):
        client(server, tmp_path).get(704)
    server.status = None
    assert client(server, tmp_path).get(704).registry_id == 704


class Tarpit:
    """A server that answers so slowly that no single read times out, or does not answer at all."""

    def __init__(self, drips: bytes) -> None:
        self.connections = 0
        self._drips = drips
        self._end = threading.Event()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                self.connections += 1
                threading.Thread(target=self._drip, args=(connection,), daemon=True).start()

    def _drip(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):
            for byte in self._drips:
                connection.sendall(bytes([byte]))
                if self._end.wait(0.05):
                    return
            self._end.wait()

    def close(self) -> None:
        self._end.set()
        self._socket.close()


@pytest.mark.parametrize(
    "drips",
    [
        b"",
        b"HTTP/1.1 200 OK\r\n" + b"X-Slow: yes\r\n" * 1000,
        b"HTTP/1.0 200 OK\r\n\r\n" + b" " * 10_000,
        b"HTTP/1.1 200 OK\r\nContent-Length: 10000\r\n\r\n" + b" " * 10_000,
        b"HTTP/1.1 404 Not Found\r\nContent-Length: 10000\r\n\r\n" + b" " * 10_000,
    ],
    ids=["silent", "headers", "body", "counted body", "error"],
)
def test_a_look_up_has_a_total_deadline_that_all_threads_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drips: bytes
) -> None:
    monkeypatch.setattr(registry, "DEADLINE_S", 2.0)
    tarpit, beats, failures = Tarpit(drips), Counter[int](), list[str]()
    before = threading.active_count()
    schemas = HttpRegistry(tarpit.url, tmp_path, waiting=lambda: beats.update([threading.get_ident()]))

    def look_up() -> None:
        try:
            schemas.get(704)
        except RegistryUnavailable as error:
            failures.append(str(error))

    threads = [threading.Thread(target=look_up) for _ in range(4)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    elapsed = time.monotonic() - began
    try:
        assert len(failures) == 4
        assert elapsed < 4 * 2.0  # the threads do not wait for one deadline after another
        assert tarpit.connections == 1
        assert set(beats) == {thread.ident for thread in threads}
        while threading.active_count() > before + 1 + tarpit.connections:  # the requesting thread also ends
            time.sleep(0.05)
    finally:
        tarpit.close()


def test_a_registration_has_a_total_deadline_too() -> None:
    tarpit, beats = Tarpit(b"HTTP/1.1 200 OK\r\n" + b"X-Slow: yes\r\n" * 1000), list[float]()
    client = RegistryClient(tarpit.url, lambda: beats.append(time.monotonic()))
    try:
        with pytest.raises(RegistryUnavailable, match="no complete answer within 2 s"):
            client.ask("/subjects/me.scored-value/versions", {"schema": "x" * 5_000_000}, timeout_s=2)
        assert len(beats) >= 2
    finally:
        tarpit.close()


def test_credentials_are_sent_only_to_the_registry_s_own_address(server: Registry, tmp_path: Path) -> None:
    other = Registry()
    url = f"http://me:secret@127.0.0.1:{server.port}"
    try:
        for target in (other.url, f"http://localhost:{server.port}/moved"):
            server.redirect = target
            assert HttpRegistry(url, tmp_path / target[-5:], sleep=lambda _: None).get(704).registry_id == 704
            last = other if target == other.url else server
            assert last.requests[-1].endswith("/schemas/ids/704")
            assert last.authorization is None
        server.redirect = f"{server.url}/moved"
        assert HttpRegistry(url, tmp_path / "same", sleep=lambda _: None).get(704).registry_id == 704
        assert server.requests[-1] == "/moved/schemas/ids/704"
        assert server.authorization is not None
        server.redirect = "ftp://127.0.0.1"
        with pytest.raises(RegistryUnavailable, match="307"):
            HttpRegistry(url, tmp_path / "ftp", sleep=lambda _: None).get(704)
    finally:
        other.stop()


def test_a_registration_does_not_follow_redirects(server: Registry) -> None:
    other = Registry()
    try:
        server.redirect = other.url
        assert RegistryClient(server.url).ask("/subjects/x/versions", {"schema": "{}"}).status >= 400
        assert other.requests == []
    finally:
        other.stop()


def test_credentials_are_sent_and_never_logged(
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


def test_a_directory_can_replace_a_registry(lsst_schemas: Path) -> None:
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


def test_without_a_registry_every_id_is_unknown() -> None:
    with pytest.raises(UnknownSchemaId, match="no schema registry is configured"):
        open_registry(None).get(704)


def test_a_location_that_is_neither_url_nor_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotADirectoryError, match="neither a URL"):
        open_registry(str(tmp_path / "absent"))


def test_the_cache_is_in_the_xdg_cache_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert registry.default_cache_dir() == tmp_path / "broker-filter" / "schemas"
