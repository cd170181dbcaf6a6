"""Where the page listens, and which requests may reach it."""

from __future__ import annotations

import ipaddress
import logging
import secrets
import socket
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, field

from broker_filter.errors import USAGE, BrokerFilterError

LOCALHOST = "localhost"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Access:
    """Which requests are answered. `hosts`: the allowed Host headers; None allows all, if there is a `key`.

    `key`: the secret that the address of the page must hold; None on loopback.
    """

    hosts: Collection[str] | None
    key: str | None = None
    token: str = field(default_factory=lambda: secrets.token_urlsafe(32))


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
