"""One HTTP client for schema registries: schemas are read with it, and registered with it.

Every request has a total deadline and a bounded answer. Credentials go to the registry's own address only, and never
into a log or an error message.
"""

from __future__ import annotations

import http.client
import io
import json
import socket
import ssl
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import closing
from functools import partial
from threading import Thread
from typing import IO, Any, NamedTuple, TypeVar
from urllib.parse import unquote, urlsplit, urlunsplit

from broker_filter.packets.schema import MAX_SCHEMA_BYTES

DEADLINE_S = 10.0
"""Of one request from its beginning to the last byte of its answer. A registry answers in milliseconds."""
BEAT_S = 0.5
"""Between two calls of `waiting` while an answer is awaited."""
MAX_ANSWER_BYTES = 2 * MAX_SCHEMA_BYTES
"""The registry sends the schema as a JSON string, which doubles its quotes."""
MAX_MESSAGE_CHARACTERS = 300
"""Of a registry's own words in an error message."""
_SHORTEST_TIMEOUT_S = 0.001
"""A socket with a time-out of 0 does not wait at all, which means something else."""

T = TypeVar("T")


class RegistryUnavailable(Exception):  # noqa: N818 - it is a state
    """The registry cannot be asked now, and the schema is not at hand. Worth another try later."""


class Answer(NamedTuple):
    """What a registry answered: the HTTP status, and the JSON of the body as Python values (None for other bodies)."""

    status: int
    content: Any

    def __str__(self) -> str:
        return f"HTTP {self.status} {self._of_body('message') or ''}".strip()[:MAX_MESSAGE_CHARACTERS]

    @property
    def error_code(self) -> int | None:
        """Confluent's code of the error; None where no registry wrote the body, but a load balancer, say."""
        code = self._of_body("error_code")
        return code if isinstance(code, int) else None

    def _of_body(self, key: str) -> Any:
        return self.content.get(key) if isinstance(self.content, dict) else None


def registry_address(url: str) -> tuple[str, dict[str, str]]:
    """A registry's URL without its credentials, which may be shown, and the header that carries them, which may not."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    shown = urlunsplit((parts.scheme, host, parts.path.rstrip("/"), "", ""))
    if parts.username is None:
        return shown, {}
    credentials = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
    return shown, {"Authorization": "Basic " + b64encode(credentials).decode()}


def no_beat() -> None:
    """The `waiting` of a program that no watchdog observes."""


def wait_for(future: Future[T], waiting: Callable[[], None], until: float | None = None) -> T:
    """The result of `future`, calling `waiting` every BEAT_S. `until`: time.monotonic() at which it gives up.

    Raises what the future raises, and TimeoutError.
    """
    while not future.done():
        left = BEAT_S if until is None else min(BEAT_S, until - time.monotonic())
        if left <= 0:
            raise TimeoutError
        wait([future], left)
        waiting()
    return future.result()


class RegistryClient:
    """A schema registry's address, its credentials, and the rules of talking to it. Thread-safe.

    `url`: of the registry, with credentials where it asks for any (`https://user:key@host`). `waiting` is called by the
    asking thread every BEAT_S while it waits for an answer, so that a watchdog does not take it for stuck.
    """

    def __init__(self, url: str, waiting: Callable[[], None] = no_beat) -> None:
        self.url, credentials = registry_address(url)
        self.waiting = waiting
        self._headers = {"Accept": "application/vnd.schemaregistry.v1+json, application/json", **credentials}
        self._opener = urllib.request.build_opener(_Transport, _SameHostRedirects)

    def ask(self, path: str, document: Any = None, timeout_s: float = DEADLINE_S) -> Answer:
        """The answer to GET `path`, or to POST `path` where there is a `document` (JSON).

        Raises RegistryUnavailable where no complete answer comes within `timeout_s`, name look-up, TLS handshake and
        redirects included, or where it is larger than MAX_ANSWER_BYTES.
        """
        data, headers = None, self._headers
        if document is not None:
            data = json.dumps(document).encode()
            headers = headers | {"Content-Type": "application/vnd.schemaregistry.v1+json"}
        # The scheme, http or https, was checked with the configuration.
        request = urllib.request.Request(f"{self.url}{path}", data, headers)  # noqa: S310
        answer: Future[Answer] = Future()
        # A thread of its own, because the system's name look-up and its connecting know no deadline.
        Thread(target=self._answer, args=(request, timeout_s, answer), name="registry", daemon=True).start()
        try:
            return wait_for(answer, self.waiting, time.monotonic() + timeout_s)
        except TimeoutError:
            failure = f"no complete answer within {timeout_s:.0f} s"
        except (OSError, http.client.HTTPException) as error:
            failure = str(error) or type(error).__name__
        raise RegistryUnavailable(f"schema registry {self.url}: {failure[:MAX_MESSAGE_CHARACTERS]}")

    def _answer(self, request: urllib.request.Request, timeout_s: float, answer: Future[Answer]) -> None:
        try:
            answer.set_result(self._exchange(request, timeout_s))
        except BaseException as error:
            answer.set_exception(error)

    def _exchange(self, request: urllib.request.Request, timeout_s: float) -> Answer:
        try:
            response = self._opener.open(request, timeout=timeout_s)
        except urllib.error.HTTPError as error:
            response = error
        with closing(response):
            body = response.read(MAX_ANSWER_BYTES + 1)
            if len(body) > MAX_ANSWER_BYTES:
                raise OSError(f"it answers with more than {MAX_ANSWER_BYTES} bytes")
            try:
                return Answer(response.status, json.loads(body))
            except (ValueError, RecursionError):
                return Answer(response.status, None)


class _SameHostRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects of GET requests to http and https, with credentials only where scheme, host and port stay."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        """The request to make next; None where the redirect itself is the answer."""
        old, new = urlsplit(req.full_url), urlsplit(newurl)
        if req.data is not None or new.scheme not in ("http", "https"):
            return None
        redirected = super().redirect_request(req, fp, code, msg, headers, newurl)
        if redirected is not None and (old.scheme, old.netloc) != (new.scheme, new.netloc):
            redirected.remove_header("Authorization")
        return redirected


class _Response(http.client.HTTPResponse):
    """An answer that must be complete within its socket's time-out, however slowly its bytes come."""

    def __init__(
        self, sock: socket.socket, debuglevel: int = 0, method: str | None = None, url: str | None = None
    ) -> None:
        super().__init__(sock, debuglevel, method, url)
        deadline = time.monotonic() + (sock.gettimeout() or DEADLINE_S)
        self.fp = io.BufferedReader(_DeadlineReader(sock, self.fp.detach(), deadline))


class _DeadlineReader(io.RawIOBase):
    """Reads a socket's stream until a moment: `deadline` of time.monotonic()."""

    def __init__(self, sock: socket.socket, stream: io.RawIOBase, deadline: float) -> None:
        self._sock = sock
        self._stream = stream
        self._deadline = deadline

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: Any, /) -> int | None:
        """Reads as a socket's stream does. Raises TimeoutError at the deadline."""
        self._sock.settimeout(max(self._deadline - time.monotonic(), _SHORTEST_TIMEOUT_S))
        return self._stream.readinto(buffer)

    def close(self) -> None:
        """Closes the stream, and the socket with it where nobody else has it open."""
        self._stream.close()
        super().close()


class _Transport(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    """HTTP and HTTPS whose answers have a deadline; proxies of the environment are used as urllib uses them."""

    def __init__(self) -> None:
        super().__init__()
        self._tls = ssl.create_default_context()

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        """Sends a request over TCP."""
        return self.do_open(partial(_connection, http.client.HTTPConnection), req)

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        """Sends a request over TLS, by the system's authorities (or those of SSL_CERT_FILE)."""
        return self.do_open(partial(_connection, http.client.HTTPSConnection), req, context=self._tls)


def _connection(kind: type[http.client.HTTPConnection], host: str, **options: Any) -> http.client.HTTPConnection:
    connection = kind(host, **options)
    connection.response_class = _Response
    return connection
