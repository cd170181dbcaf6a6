"""Serves /metrics, /livez and /readyz over HTTP. A request never changes the state of the service."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from broker_filter.metrics import Metrics

TEXT = "text/plain; charset=utf-8"
PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"
REQUEST_TIMEOUT_S = 10.0
"""A connection is closed if the client sends no request, or reads no answer, for so long."""

log = logging.getLogger(__name__)


class Health:
    """The state of the service: the reasons why it is not ready, and the reason why it is unhealthy."""

    def __init__(self) -> None:
        self._waiting: dict[str, str] = {}
        self.note = ""
        """What an operator should know of a service that is ready. /readyz says it, and its status does not change."""
        self.unhealthy_reason: Callable[[], str | None] = lambda: None
        """Returns why the service is unhealthy: which stage is stuck or has ended. Returns None if it is healthy."""

    def set(self, subject: str, reason: str | None) -> None:
        """Set why `subject` keeps the service from being ready. With None or an empty `reason`, `subject` is ready."""
        if reason:
            self._waiting[subject] = reason
        else:
            self._waiting.pop(subject, None)

    @property
    def waiting(self) -> str:
        """The reasons why the service is not ready, as one line of text; empty if it is ready."""
        return "; ".join(f"{subject}: {reason}" for subject, reason in sorted(self._waiting.copy().items()))


class _Server(ThreadingHTTPServer):
    """An HTTP server that does not report an error if a client closes its connection early."""

    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:  # noqa: ARG002
        """Log why a request ended: one line if the client closed the connection, a traceback otherwise."""
        error = sys.exception()
        if isinstance(error, OSError):
            log.debug("HTTP client %s: %s", client_address, error)
        else:
            log.exception("an HTTP request from %s failed", client_address)


@contextmanager
def serve(health: Health, metrics: Metrics, host: str, port: int) -> Iterator[int]:
    """Serve on `host:port` until the block ends, and yield the port. The system chooses a port if `port` is 0.

    Raises OSError if the service cannot listen on the address.
    """

    class Request(BaseHTTPRequestHandler):
        timeout = REQUEST_TIMEOUT_S

        def do_GET(self) -> None:
            match self.path.partition("?")[0]:
                case "/metrics":
                    self._answer(HTTPStatus.OK, metrics.exposition(), PROMETHEUS)
                case "/livez":
                    self._answer_check(health.unhealthy_reason())
                case "/readyz":
                    self._answer_check(health.unhealthy_reason() or health.waiting, health.note)
                case _:
                    self._answer(HTTPStatus.NOT_FOUND, b"/metrics, /livez, /readyz\n", TEXT)

        def _answer_check(self, reason: str | None, note: str = "") -> None:
            status = HTTPStatus.SERVICE_UNAVAILABLE if reason else HTTPStatus.OK
            text = "; ".join(filter(None, [reason or "ok", note]))
            self._answer(status, f"{text}\n".encode(), TEXT)

        def _answer(self, status: HTTPStatus, body: bytes, kind: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Log nothing: Prometheus sends a request every few seconds."""

    try:
        server = _Server((host, port), Request)
    except OSError as error:
        raise OSError(
            f"cannot serve metrics and health on {host}:{port}: {error.strerror}; set another http.host or http.port"
        ) from None
    thread = threading.Thread(target=server.serve_forever, name="http", daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
