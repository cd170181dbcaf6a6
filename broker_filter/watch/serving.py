"""The web server: the socket, the address of the page, and the run until the process is asked to end."""

from __future__ import annotations

import ipaddress
import logging
import secrets
import socket
from contextlib import suppress

import uvicorn

from broker_filter.errors import USAGE, BrokerFilterError
from broker_filter.watch.server import Access, Application, Night, Receive, Scope, Send, make_app

MAX_CONNECTIONS = 200
"""The most connections and requests at a time; a browser opens six for a page."""
END_S = 1
"""How long requests in flight are waited for at the end."""
LOCALHOST = "localhost"

log = logging.getLogger(__name__)


class ListenError(BrokerFilterError, OSError):
    """The page cannot be served at the given address. The message says what to do."""

    exit_status = USAGE


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens at an address. Raises ListenError."""
    try:
        [(family, _, _, _, address), *_] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        raise ListenError(f"{host}:{port}: {error.strerror}; choose another --host or --port") from error


def access_to(host: str, port: int) -> tuple[Access, str]:
    """Return who may ask a server at this address, and the address of the page.

    On loopback, requests must name the server as the browser on this machine does. Elsewhere the address holds a key.
    """
    named = f"[{host}]" if ":" in host else host
    if _is_loopback(host):
        return Access({f"{name}:{port}" for name in (named, LOCALHOST)}), f"http://{named}:{port}/"
    key = secrets.token_urlsafe(32)
    log.warning(
        "%s is not loopback: whoever has the address below can see the alerts and label them, and the connection is "
        "not encrypted; an SSH tunnel to a page on loopback is safer",
        host,
    )
    wildcard = host in ("", "0.0.0.0", "::")  # noqa: S104 - a comparison
    shown = socket.getfqdn() if wildcard else named
    return Access(None if wildcard else {f"{named}:{port}"}, key), f"http://{shown}:{port}/?key={key}"


def _is_loopback(host: str) -> bool:
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == LOCALHOST


def serve(night: Night, listener: socket.socket, host: str) -> None:
    """Serve the page on a socket until SIGINT or SIGTERM, and print its address first."""
    access, address = access_to(host, listener.getsockname()[1])

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await pages(scope, receive, send)

    options = uvicorn.Config(
        app,
        lifespan="off",
        ws="none",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=END_S,
    )
    server = uvicorn.Server(options)
    pages: Application = make_app(night, access, lambda: server.should_exit)
    print(f"{address}\nThe page is there until you press Ctrl-C.", flush=True)  # noqa: T201 - the command's result
    server.run(sockets=[listener])
