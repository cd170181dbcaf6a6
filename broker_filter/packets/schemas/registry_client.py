"""The HTTP client for schema registries, used for reading and for registering schemas.

Each request has a total deadline and a bounded answer. Credentials must only be sent to the registry's own address, and
never be written to a log or an error message.
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
from urllib.parse import urlsplit

from broker_filter.errors import USAGE, BrokerFilterError
from broker_filter.packets.schemas.registry_location import RegistryLocation, TlsFiles, registry_location
from broker_filter.packets.schemas.writer_schema import MAX_SCHEMA_BYTES

DEADLINE_S = 10.0
"""The time limit of a request, from its start to the last byte of the answer, in seconds. A registry answers in
milliseconds."""
BEAT_S = 0.5
"""The interval between two calls of `waiting` while an answer is awaited, in seconds."""
MAX_ANSWER_BYTES = 2 * MAX_SCHEMA_BYTES
"""The maximum size of an answer. The registry sends the schema as a JSON string, in which each quote takes two
bytes."""
MAX_MESSAGE_CHARACTERS = 300
"""The maximum length of a registry's answer in an error message."""
_SHORTEST_TIMEOUT_S = 0.001
"""The minimum time-out of a socket, in seconds: 0 would make the socket non-blocking."""

T = TypeVar("T")


class RegistryUnavailable(BrokerFilterError):  # noqa: N818 - it is a state
    """The registry does not answer, and the schema is not in the cache. The caller should retry later."""


class CertificateError(BrokerFilterError, ValueError):
    """A certificate or key for a schema registry cannot be used. The message names the file."""

    exit_status = USAGE


class Answer(NamedTuple):
    """The answer of a registry: the HTTP status, and the JSON body as Python values (None if it is not JSON)."""

    status: int
    content: Any

    def __str__(self) -> str:
        return f"HTTP {self.status} {self._of_body('message') or ''}".strip()[:MAX_MESSAGE_CHARACTERS]

    @property
    def error_code(self) -> int | None:
        """Confluent's error code; None if the body has none, for example if a load balancer answered."""
        code = self._of_body("error_code")
        return code if isinstance(code, int) else None

    def _of_body(self, key: str) -> Any:
        return self.content.get(key) if isinstance(self.content, dict) else None


def _credentials(location: RegistryLocation) -> dict[str, str]:
    """Return the HTTP header with the credentials; empty if there are none."""
    if location.username is None:
        return {}
    credentials = f"{location.username}:{location.password or ''}"
    return {"Authorization": "Basic " + b64encode(credentials.encode()).decode()}


def _tls_context(tls: TlsFiles) -> ssl.SSLContext:
    """Return the context of TLS connections to a registry. Raises CertificateError."""
    try:
        context = ssl.create_default_context(cafile=tls.ca)
    except OSError as error:  # ssl.SSLError is an OSError
        raise CertificateError(f"{tls.ca}: {_reason(error, 'no PEM file of certificates')}") from None
    if tls.certificate is None:
        return context
    # Without any password, OpenSSL would ask for the password of an encrypted key at the terminal.
    try:
        context.load_cert_chain(tls.certificate, tls.key, tls.key_password or "")
    except OSError as error:
        unfit = "not the PEM files of a certificate and its key, or key_password is wrong"
        raise CertificateError(f"{tls.certificate}, {tls.key}: {_reason(error, unfit)}") from None
    return context


def _reason(error: OSError, unfit: str) -> str:
    """Return why files cannot be used. The text of an SSLError is about OpenSSL; `unfit` is used in its place."""
    return unfit if isinstance(error, ssl.SSLError) else error.strerror or str(error)


def no_beat() -> None:
    """Do nothing: the `waiting` callback of a program without a watchdog."""


def wait_for(future: Future[T], waiting: Callable[[], None], until: float | None = None) -> T:
    """Wait for the result of `future` and return it, calling `waiting` every BEAT_S seconds.

    `until`: the time of time.monotonic() at which waiting ends; None for no limit. Raises TimeoutError at that time,
    and the exceptions of the future.
    """
    while not future.done():
        left = BEAT_S if until is None else min(BEAT_S, until - time.monotonic())
        if left <= 0:
            raise TimeoutError
        wait([future], left)
        waiting()
    return future.result()


class RegistryClient:
    """Sends requests to a schema registry. Thread-safe.

    `registry`: its location, or its URL, with credentials if it needs them (`https://user:key@host`). `waiting`: called
    every BEAT_S seconds by the requesting thread while it waits for an answer, so that a watchdog knows that it is not
    stuck.

    Raises CertificateError if a certificate or key cannot be used, and RegistryUrlError if the URL cannot be used.
    """

    def __init__(self, registry: RegistryLocation | str, waiting: Callable[[], None] = no_beat) -> None:
        location = registry_location(registry) if isinstance(registry, str) else registry
        self.url = location.url
        """The URL of the registry without credentials, which may be logged."""
        self.waiting = waiting
        self._headers = {
            "Accept": "application/vnd.schemaregistry.v1+json, application/json",
            **_credentials(location),
        }
        tls = None if location.tls is None else _tls_context(location.tls)
        self._opener = urllib.request.build_opener(_Transport(urlsplit(self.url).netloc, tls), _SameHostRedirects)

    def ask(self, path: str, document: Any = None, timeout_s: float = DEADLINE_S) -> Answer:
        """Return the answer to GET `path`, or to POST `path` if there is a `document`, which is sent as JSON.

        Raises RegistryUnavailable if the complete answer does not arrive within `timeout_s` seconds (including name
        look-up, TLS handshake and redirects), or is larger than MAX_ANSWER_BYTES.
        """
        data, headers = None, self._headers
        if document is not None:
            data = json.dumps(document).encode()
            headers = headers | {"Content-Type": "application/vnd.schemaregistry.v1+json"}
        # The scheme is http or https: `registry_location` takes anything else for a directory.
        request = urllib.request.Request(f"{self.url}{path}", data, headers)  # noqa: S310
        answer: Future[Answer] = Future()
        # A separate thread, because name look-up and connecting have no total deadline.
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
                raise OSError(f"the answer has more than {MAX_ANSWER_BYTES} bytes")
            try:
                return Answer(response.status, json.loads(body))
            except (ValueError, RecursionError):
                return Answer(response.status, None)


class _SameHostRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects of GET requests to http and https; sends credentials only to the same scheme, host and port."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        """Return the next request; None if the redirect is not followed and is itself the answer."""
        old, new = urlsplit(req.full_url), urlsplit(newurl)
        if req.data is not None or new.scheme not in ("http", "https"):
            return None
        redirected = super().redirect_request(req, fp, code, msg, headers, newurl)
        if redirected is not None and (old.scheme, old.netloc) != (new.scheme, new.netloc):
            redirected.remove_header("Authorization")
        return redirected


class _Response(http.client.HTTPResponse):
    """An HTTP response for which the time-out of the socket is a deadline for the whole answer, not for each read."""

    def __init__(
        self, sock: socket.socket, debuglevel: int = 0, method: str | None = None, url: str | None = None
    ) -> None:
        super().__init__(sock, debuglevel, method, url)
        deadline = time.monotonic() + (sock.gettimeout() or DEADLINE_S)
        self.fp = io.BufferedReader(_DeadlineReader(sock, self.fp.detach(), deadline))


class _DeadlineReader(io.RawIOBase):
    """Reads the stream of a socket until `deadline`, a time of time.monotonic()."""

    def __init__(self, sock: socket.socket, stream: io.RawIOBase, deadline: float) -> None:
        self._sock = sock
        self._stream = stream
        self._deadline = deadline

    def readable(self) -> bool:
        """Return True: the stream can be read."""
        return True

    def readinto(self, buffer: Any, /) -> int | None:
        """Read into `buffer` and return the number of bytes. Raises TimeoutError at the deadline."""
        self._sock.settimeout(max(self._deadline - time.monotonic(), _SHORTEST_TIMEOUT_S))
        return self._stream.readinto(buffer)

    def close(self) -> None:
        """Close the stream, and the socket if it is not used elsewhere."""
        self._stream.close()
        super().close()


class _Transport(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    """HTTP and HTTPS with a deadline for each answer. Proxies are taken from the environment, as urllib does."""

    def __init__(self, host: str, tls: ssl.SSLContext | None) -> None:
        """`host`: host and port of the registry. `tls`: the context of connections to it, if it has its own.

        Other connections, to which a registry redirects, trust the system's certificate authorities (or those in
        SSL_CERT_FILE), and show no client certificate.
        """
        super().__init__()
        self._host = host
        self._system_tls = ssl.create_default_context()
        self._tls = tls or self._system_tls

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        """Send a request over TCP."""
        return self.do_open(partial(_connection, http.client.HTTPConnection), req)

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        """Send a request over TLS."""
        tls = self._tls if urlsplit(req.full_url).netloc == self._host else self._system_tls
        return self.do_open(partial(_connection, http.client.HTTPSConnection), req, context=tls)


def _connection(kind: type[http.client.HTTPConnection], host: str, **options: Any) -> http.client.HTTPConnection:
    connection = kind(host, **options)
    connection.response_class = _Response
    return connection
