"""Avro schemas by id, for wire format: from a Confluent schema registry, or from a directory of .avsc files.

What an id means does not change, so a schema is fetched once: it stays in memory, and on disk for later runs and for
the time when the registry does not answer. Where alerts do not decode by it, the registry is asked once more, because
one that was wiped gives its ids to other schemas. Must never let an outage look like an unknown id.
"""

from __future__ import annotations

import contextlib
import hashlib
import http
import json
import logging
import math
import os
import re
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any, Protocol
from urllib.parse import urlsplit

from broker_filter.packets.registry_client import (
    DEADLINE_S,
    RegistryClient,
    no_beat,
    wait_for,
)
from broker_filter.packets.registry_client import RegistryUnavailable as RegistryUnavailable
from broker_filter.packets.schema import (
    MAX_SCHEMA_BYTES,
    SchemaError,
    WriterSchema,
    full_name,
    parse_schema,
    self_contained,
    writer_schema,
)

log = logging.getLogger(__name__)

ATTEMPTS = 4
FIRST_PAUSE_S = 0.5
"""Doubled after each attempt: 3.5 s of pauses bridge a registry's restart behind a load balancer."""
FORGET_UNKNOWN_S = 60.0
"""How long an id that has no schema of an alert is not asked for again: a stray topic must not become a flood of
requests."""
DOUBT_INTERVAL_S = 30.0
"""Between two questions about a known id whose alerts do not decode: many corrupt ones must not become as many
requests."""
SCHEMA_NOT_FOUND = 40403
"""Confluent's error code, which Karapace, Apicurio and Redpanda give too: the one answer that means an unknown id."""
_MAX_VERDICTS = 10_000
"""Ids: what a stray topic may name cannot fill the memory."""


class UnknownSchemaId(Exception):  # noqa: N818 - it is an answer
    """The registry has no schema of this id."""


class SchemaRegistry(Protocol):
    """Schemas by their Confluent id."""

    def get(self, schema_id: int, doubted: WriterSchema | None = None) -> WriterSchema:
        """The schema, the same object each time.

        `doubted`: what was given for the id before, by which an alert does not decode. A registry is then asked once
        more, and the answer is another object only where the id means another schema now.

        Raises UnknownSchemaId, RegistryUnavailable, or SchemaError for one that is no alert's schema. Thread-safe.
        """
        ...


def open_registry(
    location: str | None,
    cache_dir: Path | None = None,
    *,
    drop_cache: bool = False,
    waiting: Callable[[], None] = no_beat,
) -> SchemaRegistry:
    """The registry at `location`: a URL, a directory of .avsc files, or None, where every id is unknown.

    `cache_dir`: where a registry's schemas are kept, by default `~/.cache/broker-filter/schemas` (XDG_CACHE_HOME).
    `drop_cache` deletes first what is kept there of this registry. `waiting`: see RegistryClient.

    Raises NotADirectoryError for what is neither URL nor directory, and OSError.
    """
    if location is None:
        return NoRegistry()
    if location.startswith(("http://", "https://")):
        registry = HttpRegistry(location, cache_dir or default_cache_dir(), waiting=waiting)
        if drop_cache:
            registry.drop_cache()
        return registry
    if not Path(location).is_dir():
        raise NotADirectoryError(f"schema registry {location!r} is neither a URL (http, https) nor a directory")
    return DirectoryRegistry(Path(location))


def default_cache_dir() -> Path:
    """Where registries' schemas are kept unless told otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "broker-filter" / "schemas"


class NoRegistry:
    """No registry: it knows no id."""

    def get(self, schema_id: int, doubted: WriterSchema | None = None) -> WriterSchema:  # noqa: ARG002
        """Raises UnknownSchemaId."""
        raise UnknownSchemaId(f"schema id {schema_id}: no schema registry is configured")


class DirectoryRegistry:
    """A directory of .avsc files, nested as one likes, that stands in for a registry.

    A schema's id is in its file's name: `lsst.v7_4.alert.avsc` is 704 (100 x major + minor, as LSST numbers them),
    and so is `704.avsc`. Named types that a schema only mentions are looked up in the other files of its folder.
    """

    _VERSIONED = re.compile(r"lsst\.v(\d+)_(\d+)\.alert\.avsc")
    _NUMBERED = re.compile(r"(\d+)\.avsc")

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files: dict[int, Path] = {}
        self._schemas: dict[int, WriterSchema] = {}
        self._lock = Lock()
        for path in sorted(directory.rglob("*.avsc")):
            if version := self._VERSIONED.fullmatch(path.name):
                self._files[100 * int(version[1]) + int(version[2])] = path
            elif number := self._NUMBERED.fullmatch(path.name):
                self._files[int(number[1])] = path

    def get(self, schema_id: int, doubted: WriterSchema | None = None) -> WriterSchema:  # noqa: ARG002
        """See SchemaRegistry."""
        with self._lock:
            if schema_id not in self._schemas:
                if schema_id not in self._files:
                    raise UnknownSchemaId(f"schema id {schema_id}: not among the .avsc files in {self._directory}")
                self._schemas[schema_id] = self._read(schema_id)
            return self._schemas[schema_id]

    def _read(self, schema_id: int) -> WriterSchema:
        path = self._files[schema_id]
        definition = _read_json(path)
        others: dict[str, dict[str, Any]] = {}
        for sibling in sorted(path.parent.glob("*.avsc")):
            other = _read_json(sibling)
            if sibling != path and isinstance(other, dict) and "name" in other:
                others[full_name(other, "")] = other
        return writer_schema(self_contained(definition, "", others, set()), schema_id)


class HttpRegistry:
    """A Confluent schema registry, read anonymously or with the credentials in its URL (`https://user:key@host`).

    `waiting`: see RegistryClient.
    """

    def __init__(
        self,
        url: str,
        cache_dir: Path,
        *,
        waiting: Callable[[], None] = no_beat,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = RegistryClient(url, waiting)
        self._url = self._client.url
        host = urlsplit(self._url).netloc
        # Another registry's ids mean other schemas.
        digest = hashlib.sha256(self._url.encode()).hexdigest()[:12]
        self._cache = cache_dir / f"{re.sub(r'[^A-Za-z0-9.-]', '_', host)}-{digest}"
        self._schemas: dict[int, WriterSchema] = {}
        self._look_ups: dict[int, Future[WriterSchema]] = {}  # that have begun and not ended
        self._verdicts: dict[int, tuple[float, UnknownSchemaId | SchemaError]] = {}  # when the registry said so, what
        self._doubted: dict[int, float] = {}  # when the registry was asked once more
        self._lock = Lock()
        self._sleep = sleep
        self._clock = clock

    def get(self, schema_id: int, doubted: WriterSchema | None = None) -> WriterSchema:
        """See SchemaRegistry."""
        if schema := self._at_hand(schema_id, doubted):
            return schema
        with self._lock:
            if schema := self._at_hand(schema_id, doubted):
                return schema
            look_up = self._look_ups.get(schema_id)
            if look_up is None:
                mine = self._look_ups[schema_id] = Future[WriterSchema]()
        if look_up is not None:  # one request for an id, however many threads want it
            return wait_for(look_up, self._client.waiting)
        try:
            schema = self._confirmed(doubted) if doubted else self._read_cached(schema_id) or self._fetch(schema_id)
            self._schemas[schema_id] = schema
            mine.set_result(schema)
        except BaseException as error:
            mine.set_exception(error)
            raise
        finally:
            del self._look_ups[schema_id]
        return schema

    def drop_cache(self) -> None:
        """Deletes what earlier runs have kept of this registry's schemas. Raises OSError."""
        for file in self._cache.glob("*.avsc"):
            file.unlink()

    def _at_hand(self, schema_id: int, doubted: WriterSchema | None) -> WriterSchema | None:
        """The schema in memory, if there is no need to ask the registry."""
        schema = self._schemas.get(schema_id)
        asked = self._doubted.get(schema_id)
        just_asked = asked is not None and self._clock() - asked < DOUBT_INTERVAL_S
        return schema if schema is not doubted or just_asked else None

    def _confirmed(self, schema: WriterSchema) -> WriterSchema:
        """What the id of a schema means now; the same object where that has not changed or the registry is away."""
        schema_id = schema.registry_id
        assert schema_id is not None
        try:
            fetched = self._fetch(schema_id)
        except (RegistryUnavailable, UnknownSchemaId, SchemaError) as error:
            log.warning("schema %d does not fit an alert, and cannot be fetched once more: %s", schema_id, error)
            return schema
        finally:
            self._doubted[schema_id] = self._clock()
        if fetched.fingerprint == schema.fingerprint:
            return schema
        log.warning(
            "schema id %d of %s means another schema than before (fingerprint %s, not %s): was the registry wiped?",
            schema_id,
            self._url,
            fetched.fingerprint,
            schema.fingerprint,
        )
        return fetched

    def _read_cached(self, schema_id: int) -> WriterSchema | None:
        path = self._cache / f"{schema_id}.avsc"
        try:
            with path.open("rb") as file:
                return replace(parse_schema(file.read(MAX_SCHEMA_BYTES + 1), schema_id), cached=path)
        except FileNotFoundError:
            return None
        except (OSError, SchemaError) as error:
            log.warning("schema %d is not usable from the cache in %s: %s", schema_id, self._cache, error)
            return None

    def _fetch(self, schema_id: int) -> WriterSchema:
        asked, verdict = self._verdicts.get(schema_id, (-math.inf, None))
        if verdict is not None and self._clock() - asked < FORGET_UNKNOWN_S:
            raise verdict.with_traceback(None)  # it would grow with every time that it is raised
        try:
            text = self._ask(schema_id)
            schema = parse_schema(text, schema_id)
        except (UnknownSchemaId, SchemaError) as error:
            if len(self._verdicts) >= _MAX_VERDICTS:
                self._verdicts.clear()
            self._verdicts[schema_id] = self._clock(), error
            raise
        self._keep(schema_id, text)
        log.info("fetched schema %d (fingerprint %s) from %s", schema_id, schema.fingerprint, self._url)
        return schema

    def _ask(self, schema_id: int) -> bytes:
        """The schema's text, after as many attempts as it takes and DEADLINE_S allows."""
        deadline = self._clock() + DEADLINE_S
        failure = ""
        for attempt in range(ATTEMPTS):
            if attempt:
                self._sleep(FIRST_PAUSE_S * 2 ** (attempt - 1))
            if (left := deadline - self._clock()) <= 0:
                break
            try:
                answer = self._client.ask(f"/schemas/ids/{schema_id}", timeout_s=left)
            except RegistryUnavailable as error:
                failure = str(error)
                continue
            if answer.status == http.HTTPStatus.NOT_FOUND and answer.error_code == SCHEMA_NOT_FOUND:
                raise UnknownSchemaId(f"schema id {schema_id}: the registry at {self._url} does not know it")
            text = answer.content.get("schema") if isinstance(answer.content, dict) else None
            if answer.status == http.HTTPStatus.OK and isinstance(text, str):
                return text.encode(errors="surrogatepass")
            # A load balancer or a portal of the network answers so, whether or not the registry knows the id.
            failure = f"schema registry {self._url} gives no schema for id {schema_id}: {answer}"
        raise RegistryUnavailable(failure)

    def _keep(self, schema_id: int, text: bytes) -> None:
        """Writes to the cache, whole or not at all; without a cache the service goes on."""
        try:
            self._cache.mkdir(parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(dir=self._cache, prefix=f".{schema_id}-")
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(text)
                Path(temporary).replace(self._cache / f"{schema_id}.avsc")
            except OSError:
                with contextlib.suppress(OSError):
                    Path(temporary).unlink()
                raise
        except OSError as error:
            log.warning("schema %d cannot be kept in %s: %s", schema_id, self._cache, error)


def _read_json(path: Path) -> Any:
    with path.open("rb") as file:
        text = file.read(MAX_SCHEMA_BYTES + 1)
    if len(text) > MAX_SCHEMA_BYTES:
        raise SchemaError(f"{path} is larger than {MAX_SCHEMA_BYTES} bytes")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SchemaError(f"{path} is not JSON: {error}") from error
