"""/metrics, /livez and /readyz over HTTP. Reads what the service says of itself and changes nothing."""

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
"""A client that sends no request, or reads no answer, is let go."""

log = logging.getLogger(__name__)


class Health:
    """Whether the service works, in its own words: what it waits for, and what is wrong with it."""

    def __init__(self) -> None:
        self._waiting: dict[str, str] = {}
        self.unhealthy_reason: Callable[[], str | None] = lambda: None
        """Returns why the service is unhealthy: which stage is stuck or has ended. Returns None if it is healthy."""

    def set(self, subject: str, reason: str | None) -> None:
        """Not ready for this `reason`, or ready as far as `subject` goes."""
        if reason:
            self._waiting[subject] = reason
        else:
            self._waiting.pop(subject, None)

    @property
    def waiting(self) -> str:
        """All that is waited for; empty where the service is ready."""
        return "; ".join(f"{subject}: {reason}" for subject, reason in sorted(self._waiting.copy().items()))


class _Server(ThreadingHTTPServer):
    """An HTTP server for which a client that goes away, whenever it does, is no error."""

    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:  # noqa: ARG002
        """Says in one line what ended a request."""
        error = sys.exception()
        if isinstance(error, OSError):
            log.debug("HTTP client %s: %s", client_address, error)
        else:
            log.exception("an HTTP request of %s failed", client_address)


@contextmanager
def serve(health: Health, metrics: Metrics, host: str, port: int) -> Iterator[int]:
    """Answers on `host:port` within the block; yields the port, which the system chooses where `port` is 0.

    Raises OSError where the address cannot be had.
    """

    class Request(BaseHTTPRequestHandler):
        timeout = REQUEST_TIMEOUT_S

        def do_GET(self) -> None:
            match self.path.partition("?")[0]:
                case "/metrics":
                    self._answer(HTTPStatus.OK, metrics.exposition(), PROMETHEUS)
                case "/livez":
                    self._judge(health.unhealthy_reason())
                case "/readyz":
                    self._judge(health.unhealthy_reason() or health.waiting)
                case _:
                    self._answer(HTTPStatus.NOT_FOUND, b"/metrics, /livez, /readyz\n", TEXT)

        def _judge(self, complaint: str | None) -> None:
            if complaint:
                self._answer(HTTPStatus.SERVICE_UNAVAILABLE, f"{complaint}\n".encode(), TEXT)
            else:
                self._answer(HTTPStatus.OK, b"ok\n", TEXT)

        def _answer(self, status: HTTPStatus, body: bytes, kind: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Scrapes are no news."""

    try:
        server = _Server((host, port), Request)
    except OSError as error:
        raise OSError(f"cannot serve metrics and health on {host}:{port}: {error.strerror}; see `http`") from None
    thread = threading.Thread(target=server.serve_forever, name="http", daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
