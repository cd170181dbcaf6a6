"""Where a schema registry is, and how to connect to it: the values that a client of the registry needs.

This module must import nothing heavy, and it must not know service files: `config.Registry.location` makes a location
of a section of one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit, urlunsplit

from broker_filter.errors import USAGE, BrokerFilterError, without_credentials


class RegistryUrlError(BrokerFilterError, ValueError):
    """The URL of a schema registry cannot be used. The message does not show the credentials in it."""

    exit_status = USAGE


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files for TLS to a server, and the password of the key.

    `ca`: trusted certificate authorities; None for those of the system. `certificate`, `key`: the client certificate
    and its private key; None for a client that shows no certificate.
    """

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    key_password: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class RegistryLocation:
    """A schema registry at an HTTP(S) URL, or a directory of .avsc files that replaces one.

    `url`: the URL without credentials, or the path of the directory. `username`, `password`: for HTTP basic
    authentication. `tls`: certificates; None for the authorities of the system and no client certificate.
    """

    url: str
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    tls: TlsFiles | None = None

    @property
    def is_remote(self) -> bool:
        """Whether `url` is an HTTP(S) URL, not the path of a directory."""
        return is_http(self.url)


def registry_location(location: str | Path) -> RegistryLocation:
    """Return the location at an HTTP(S) URL, which may contain credentials, or at the path of a directory.

    Raises RegistryUrlError if the host or the port of the URL cannot be read.
    """
    text = str(location)
    if not is_http(text):
        return RegistryLocation(text)
    parts = _split(text)
    if parts is None:
        raise RegistryUrlError(
            f"schema registry {without_credentials(text)}: the URL is not valid; percent-encode the special characters "
            "of a user name and password in it, such as / as %2F"
        )
    host = parts.netloc.rpartition("@")[2]
    url = urlunsplit((parts.scheme, host, parts.path.rstrip("/"), "", ""))
    if parts.username is None:
        return RegistryLocation(url)
    return RegistryLocation(url, unquote(parts.username), unquote(parts.password or ""))


def is_http(location: str) -> bool:
    """Return whether `location` is an HTTP(S) URL."""
    return location.lower().startswith(("http://", "https://"))


def _split(url: str) -> SplitResult | None:
    """Return the parts of an HTTP(S) URL; None if its host or port cannot be read."""
    try:
        parts = urlsplit(url)
        # A character such as / in a password would end the host, and the rest of the password would be in the path.
        valid = parts.hostname and parts.port != 0 and "@" not in parts.path + parts.query + parts.fragment
    except ValueError:  # a bracket that begins no IPv6 address, or a port that is no number
        return None
    return parts if valid else None
