"""Looks up Avro schemas by id, for wire format: in a Confluent schema registry, or in a directory of .avsc files.

The schema of an id does not change, so it is fetched once. It is cached in memory, and on disk for later runs and for
times when the registry does not answer. If alerts cannot be decoded with a cached schema, the registry is asked again,
because a wiped registry gives its ids to other schemas. An outage must never look like an unknown id.
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

from broker_filter.errors import without_credentials
from broker_filter.packets.schemas.registry_client import (
    DEADLINE_S,
    RegistryClient,
    no_beat,
    wait_for,
)
from broker_filter.packets.schemas.registry_client import RegistryUnavailable as RegistryUnavailable
from broker_filter.packets.schemas.registry_location import RegistryLocation, registry_location
from broker_filter.packets.schemas.writer_schema import (
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
"""The number of requests for one schema before the registry counts as unavailable."""
FIRST_PAUSE_S = 0.5
"""The pause after the first attempt, in seconds. It doubles after each attempt; 3.5 s in all bridge the restart of a
registry behind a load balancer."""
FORGET_UNKNOWN_S = 60.0
"""The time, in seconds, for which an unknown id, or an id whose schema is invalid, is not requested again. It prevents
a flood of requests if a topic holds other data than alerts."""
DOUBT_INTERVAL_S = 30.0
"""The minimum time, in seconds, between two repeated requests for an id whose alerts cannot be decoded. It prevents a
flood of requests if many alerts are corrupt."""
SCHEMA_NOT_FOUND = 40403
"""The error code for an unknown id, of Confluent, Karapace, Apicurio and Redpanda. No other answer means that an id is
unknown."""
LSST_MAJORS = range(7, 100)
"""The major versions of LSST's schema; the id of a schema in LSST's registry is 100 x major + minor."""
_MAX_VERDICTS = 10_000
"""The maximum number of remembered unknown ids. Ids are untrusted input and must not fill the memory."""


class UnknownSchemaId(Exception):  # noqa: N818 - it is an answer
    """The registry has no schema with this id."""


class SchemaRegistry(Protocol):
    """A source of schemas by their Confluent id."""

    def get(self, schema_id: int, doubted: WriterSchema | None = None) -> WriterSchema:
        """Return the schema with this id; the same object at each call. Thread-safe.

        `doubted`: the schema that this method returned for the id before, if an alert could not be decoded with it. The
        registry is then asked again. The result is another object only if the id now means another schema.

        Raises UnknownSchemaId; RegistryUnavailable if the registry does not answer; SchemaError if the schema is
        invalid.
        """
        ...


def open_registry(
    location: str | Path | RegistryLocation | None,
    cache_dir: Path | None = None,
    *,
    drop_cache: bool = False,
    waiting: Callable[[], None] = no_beat,
) -> SchemaRegistry:
    """Return the registry at `location`.

    `location`: a URL (http, https), a directory of .avsc files, or None if all ids are unknown.

    `cache_dir`: the folder of the disk cache, by default `broker-filter/schemas` in XDG_CACHE_HOME or `~/.cache`.
    `drop_cache`: delete the cached schemas of this registry first. `waiting`: see RegistryClient.

    Raises NotADirectoryError if `location` is neither a URL nor a directory, OSError if the cache cannot be deleted,
    and as RegistryClient does.
    """
    if location is None:
        return NoRegistry()
    if not isinstance(location, RegistryLocation):
        location = registry_location(location)
    if location.is_remote:
        registry = HttpRegistry(location, cache_dir or default_cache_dir(), waiting=waiting)
        if drop_cache:
            registry.drop_cache()
        return registry
    if not Path(location.url).is_dir():
        shown = without_credentials(location.url)
        raise NotADirectoryError(f"schema registry {shown!r} is neither a URL (http, https) nor a directory")
    return DirectoryRegistry(Path(location.url))


def default_cache_dir() -> Path:
    """Return the default folder of the disk cache of schemas."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "broker-filter" / "schemas"


class NoRegistry:
    """Stands for a registry if none is configured. All ids are unknown."""

    def get(self, schema_id: int, doubted: WriterSchema | None = None) -> WriterSchema:  # noqa: ARG002
        """Raise UnknownSchemaId: without a registry, no id is known."""
        raise UnknownSchemaId(f"{_described(schema_id)}: no schema registry is configured")


class DirectoryRegistry:
    """A directory of .avsc files, also in subfolders, that replaces a registry.

    The file name contains the id of the schema: both `lsst.v7_4.alert.avsc` and `704.avsc` have the id 704 (LSST's ids
    are 100 x major + minor). Named types that a schema uses but does not define are read from the other files of its
    folder.
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
                    raise UnknownSchemaId(f"{_described(schema_id)}: no .avsc file in {self._directory} has this id")
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
    """A Confluent schema registry.

    `registry`, `waiting`: see RegistryClient. `cache_dir`: the folder of the disk cache. `sleep`, `clock`: for tests.
    """

    def __init__(
        self,
        registry: RegistryLocation | str,
        cache_dir: Path,
        *,
        waiting: Callable[[], None] = no_beat,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = RegistryClient(registry, waiting)
        self._url = self._client.url
        host = urlsplit(self._url).netloc
        # Each registry has a cache folder of its own, because the same id means other schemas in other registries.
        digest = hashlib.sha256(self._url.encode()).hexdigest()[:12]
        self._cache = cache_dir / f"{re.sub(r'[^A-Za-z0-9.-]', '_', host)}-{digest}"
        self._schemas: dict[int, WriterSchema] = {}
        self._look_ups: dict[int, Future[WriterSchema]] = {}  # look-ups in progress
        self._verdicts: dict[int, tuple[float, UnknownSchemaId | SchemaError]] = {}  # failed look-ups: time, error
        self._doubted: dict[int, float] = {}  # time of the last repeated request
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
        if look_up is not None:  # another thread is requesting this id
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
        """Delete all schemas of this registry from the disk cache. Raises OSError."""
        for file in self._cache.glob("*.avsc"):
            file.unlink()

    def _at_hand(self, schema_id: int, doubted: WriterSchema | None) -> WriterSchema | None:
        """Return the schema that is in memory, or None if the registry must be asked.

        The registry must be asked for a schema that is not in memory, and again for the schema `doubted`.
        """
        schema = self._schemas.get(schema_id)
        asked = self._doubted.get(schema_id)
        just_asked = asked is not None and self._clock() - asked < DOUBT_INTERVAL_S
        return schema if schema is not doubted or just_asked else None

    def _confirmed(self, schema: WriterSchema) -> WriterSchema:
        """Return the schema that the id of `schema` has now.

        The result is `schema` itself if the registry still has it, gives no valid schema, or does not answer.
        """
        schema_id = schema.registry_id
        assert schema_id is not None
        try:
            fetched = self._fetch(schema_id)
        except (RegistryUnavailable, UnknownSchemaId, SchemaError) as error:
            log.warning("schema %d does not fit an alert, and cannot be fetched again: %s", schema_id, error)
            return schema
        finally:
            self._doubted[schema_id] = self._clock()
        if fetched.fingerprint == schema.fingerprint:
            return schema
        log.warning(
            "schema id %d of %s now has another schema than before (fingerprint %s, not %s): was the registry wiped?",
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
            log.warning("schema %d cannot be read from the cache in %s: %s", schema_id, self._cache, error)
            return None

    def _fetch(self, schema_id: int) -> WriterSchema:
        asked, verdict = self._verdicts.get(schema_id, (-math.inf, None))
        if verdict is not None and self._clock() - asked < FORGET_UNKNOWN_S:
            raise verdict.with_traceback(None)  # otherwise its traceback would grow each time it is raised
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
        """Return the JSON of a schema, after at most ATTEMPTS requests within DEADLINE_S.

        Raises UnknownSchemaId and RegistryUnavailable.
        """
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
                raise UnknownSchemaId(f"{_described(schema_id)}: the registry at {self._url} does not know it")
            text = answer.content.get("schema") if isinstance(answer.content, dict) else None
            if answer.status == http.HTTPStatus.OK and isinstance(text, str):
                return text.encode(errors="surrogatepass")
            # Such an answer can come from a load balancer or a captive portal, so it does not mean an unknown id.
            failure = f"schema registry {self._url} gives no schema for id {schema_id}: {answer}"
        raise RegistryUnavailable(failure)

    def _keep(self, schema_id: int, text: bytes) -> None:
        """Write a schema to the disk cache atomically. If that fails, it only logs a warning."""
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
            log.warning("schema %d cannot be written to the cache in %s: %s", schema_id, self._cache, error)


def _described(schema_id: int) -> str:
    """Return the id, and the version of LSST's schema that the id stands for if it is one of LSST's registry."""
    major, minor = divmod(schema_id, 100)
    return f"schema id {schema_id}" + (f" (LSST {major}.{minor})" if major in LSST_MAJORS else "")


def _read_json(path: Path) -> Any:
    with path.open("rb") as file:
        text = file.read(MAX_SCHEMA_BYTES + 1)
    if len(text) > MAX_SCHEMA_BYTES:
        raise SchemaError(f"{path} is larger than {MAX_SCHEMA_BYTES} bytes")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SchemaError(f"{path} is not JSON: {error}") from error
