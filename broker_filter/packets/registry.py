"""Avro schemas by id, for wire format: from a Confluent schema registry, or from a directory of .avsc files.

What an id means never changes, so a schema is fetched once: it stays in memory, and on disk for the time when the
registry does not answer. Must never let an outage look like an unknown id, nor write credentials to a log.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import logging
import os
import re
import tempfile
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit, urlunsplit

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

TIMEOUT_S = 10.0
"""Of one request: a registry answers in milliseconds; one that does not in ten seconds is down."""
ATTEMPTS = 4
FIRST_PAUSE_S = 0.5
"""Doubled after each attempt: 3.5 s of pauses bridge a registry's restart behind a load balancer."""
FORGET_UNKNOWN_S = 60.0
"""How long an id stays unknown without asking again: a stray topic must not become a flood of requests."""
_MAX_ANSWER_BYTES = 2 * MAX_SCHEMA_BYTES
"""The registry sends the schema as a JSON string, which doubles its quotes."""
_MAX_UNKNOWN = 10_000


class UnknownSchemaId(Exception):  # noqa: N818 - it is an answer
    """The registry has no schema of this id."""


class RegistryUnavailable(Exception):  # noqa: N818 - it is a state
    """The registry cannot be asked now, and the schema is not at hand. Worth another try later."""


class SchemaRegistry(Protocol):
    """Schemas by their Confluent id."""

    def get(self, schema_id: int) -> WriterSchema:
        """The schema, the same object each time.

        Raises UnknownSchemaId, RegistryUnavailable, or SchemaError for one that is no alert's schema. Thread-safe.
        """
        ...


def open_registry(location: str | None, cache_dir: Path | None = None) -> SchemaRegistry:
    """The registry at `location`: a URL, a directory of .avsc files, or None, where every id is unknown.

    `cache_dir`: where a registry's schemas are kept, by default `~/.cache/broker-filter/schemas` (XDG_CACHE_HOME).
    Raises NotADirectoryError for what is neither URL nor directory.
    """
    if location is None:
        return NoRegistry()
    if location.startswith(("http://", "https://")):
        return HttpRegistry(location, cache_dir or default_cache_dir())
    if not Path(location).is_dir():
        raise NotADirectoryError(f"schema registry {location!r} is neither a URL (http, https) nor a directory")
    return DirectoryRegistry(Path(location))


def default_cache_dir() -> Path:
    """Where registries' schemas are kept unless told otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "broker-filter" / "schemas"


class NoRegistry:
    """No registry: it knows no id."""

    def get(self, schema_id: int) -> WriterSchema:
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

    def get(self, schema_id: int) -> WriterSchema:
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


def registry_address(url: str) -> tuple[str, dict[str, str]]:
    """A registry's URL without its credentials, which may be shown, and the header that carries them, which may not."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    shown = urlunsplit((parts.scheme, host, parts.path.rstrip("/"), "", ""))
    if parts.username is None:
        return shown, {}
    credentials = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
    return shown, {"Authorization": "Basic " + b64encode(credentials).decode()}


class HttpRegistry:
    """A Confluent schema registry, read anonymously or with the credentials in its URL (`https://user:key@host`)."""

    def __init__(
        self,
        url: str,
        cache_dir: Path,
        *,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._url, credentials = registry_address(url)
        self._headers = {"Accept": "application/vnd.schemaregistry.v1+json, application/json", **credentials}
        host = urlsplit(self._url).netloc
        # Another registry's ids mean other schemas.
        digest = hashlib.sha256(self._url.encode()).hexdigest()[:12]
        self._cache = cache_dir / f"{re.sub(r'[^A-Za-z0-9.-]', '_', host)}-{digest}"
        self._schemas: dict[int, WriterSchema] = {}
        self._unknown: dict[int, float] = {}  # when it was asked for
        self._lock = Lock()
        self._sleep = sleep
        self._clock = clock

    def get(self, schema_id: int) -> WriterSchema:
        """See SchemaRegistry."""
        if (schema := self._schemas.get(schema_id)) is not None:
            return schema
        with self._lock:  # one request an id, however many threads want it
            if (schema := self._schemas.get(schema_id)) is None:
                schema = self._read_cached(schema_id) or self._fetch(schema_id)
                self._schemas[schema_id] = schema
            return schema

    def _read_cached(self, schema_id: int) -> WriterSchema | None:
        try:
            with (self._cache / f"{schema_id}.avsc").open("rb") as file:
                return parse_schema(file.read(MAX_SCHEMA_BYTES + 1), schema_id)
        except FileNotFoundError:
            return None
        except (OSError, SchemaError) as error:
            log.warning("schema %d is not usable from the cache in %s: %s", schema_id, self._cache, error)
            return None

    def _fetch(self, schema_id: int) -> WriterSchema:
        asked = self._unknown.get(schema_id)
        if asked is not None and self._clock() - asked < FORGET_UNKNOWN_S:
            raise UnknownSchemaId(f"schema id {schema_id}: the registry at {self._url} does not know it")
        answer = self._ask(schema_id)
        try:
            text = json.loads(answer)["schema"].encode()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise RegistryUnavailable(f"the schema registry at {self._url} gave no schema: {error!r}") from None
        schema = parse_schema(text, schema_id)
        self._keep(schema_id, text)
        log.info("fetched schema %d (fingerprint %s) from %s", schema_id, schema.fingerprint, self._url)
        return schema

    def _ask(self, schema_id: int) -> bytes:
        # The scheme was checked by open_registry.
        request = urllib.request.Request(f"{self._url}/schemas/ids/{schema_id}", headers=self._headers)  # noqa: S310
        failure = ""
        for attempt in range(ATTEMPTS):
            if attempt:
                self._sleep(FIRST_PAUSE_S * 2 ** (attempt - 1))
            try:
                with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:  # noqa: S310
                    answer: bytes = response.read(_MAX_ANSWER_BYTES + 1)
                if len(answer) > _MAX_ANSWER_BYTES:
                    raise SchemaError(f"schema {schema_id} of {self._url} is larger than {_MAX_ANSWER_BYTES} bytes")
                return answer
            except urllib.error.HTTPError as error:
                error.close()
                if error.code == http.HTTPStatus.NOT_FOUND:
                    if len(self._unknown) >= _MAX_UNKNOWN:
                        self._unknown.clear()
                    self._unknown[schema_id] = self._clock()
                    raise UnknownSchemaId(
                        f"schema id {schema_id}: the registry at {self._url} does not know it"
                    ) from None
                failure = f"HTTP {error.code} {error.reason}"
            except (OSError, http.client.HTTPException) as error:
                failure = str(error) or type(error).__name__
        raise RegistryUnavailable(f"the schema registry at {self._url} does not answer: {failure}")

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
