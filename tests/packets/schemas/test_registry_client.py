"""The client of schema registries: certificates and credentials are the same for reading and for registering."""

from __future__ import annotations

import json
import shutil
import ssl
import subprocess
import threading
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from broker_filter.config import Registry, SecretError
from broker_filter.packets.schemas.registry_client import CertificateError, RegistryClient, RegistryUnavailable

PASSWORD = "hunter2"
READ, REGISTER = "/schemas/ids/704", "/subjects/me.scored-value/versions"


class Certificate(NamedTuple):
    """PEM files of a self-signed certificate and its private key."""

    certificate: Path
    key: Path


@dataclass
class Requests:
    """What a server was asked."""

    url: str
    redirect: str = ""
    authorization: list[str | None] = field(default_factory=list)
    certificates: list[Any] = field(default_factory=list)  # of the clients, as ssl.SSLSocket.getpeercert returns them


@pytest.fixture(scope="module")
def make_certificate(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Certificate]:
    """Make a certificate for 127.0.0.1 and localhost, with an encrypted key if a password is given."""
    if not shutil.which("openssl"):
        pytest.skip("needs openssl to make certificates")

    def make(password: str = "") -> Certificate:
        folder = tmp_path_factory.mktemp("certificate")
        made = Certificate(folder / "certificate.pem", folder / "key.pem")
        encryption = ["-passout", f"pass:{password}"] if password else ["-nodes"]
        key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", *encryption, "-keyout", str(made.key)]
        name = ["-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"]
        command = ["openssl", "req", "-x509", *key, *name, "-out", str(made.certificate)]
        subprocess.run(command, check=True, capture_output=True)
        return made

    return make


@pytest.fixture(scope="module")
def server_certificate(make_certificate: Callable[..., Certificate]) -> Certificate:
    return make_certificate()


@pytest.fixture(scope="module")
def client_certificate(make_certificate: Callable[..., Certificate]) -> Certificate:
    return make_certificate(PASSWORD)


@contextmanager
def tls_server(own: Certificate, client: Certificate, needs: ssl.VerifyMode) -> Iterator[Requests]:
    """Run a registry with TLS that asks for the certificate `client`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.authorization.append(self.headers["Authorization"])
            seen.certificates.append(self.connection.getpeercert())  # type: ignore[attr-defined]
            self.rfile.read(int(self.headers["Content-Length"] or 0))
            body = json.dumps({"path": self.path}).encode()
            self.send_response(307 if seen.redirect else 200)
            if seen.redirect:
                self.send_header("Location", seen.redirect + self.path)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            self.do_GET()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            pass  # a refused handshake

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=client.certificate)
    context.load_cert_chain(*own)
    context.verify_mode = needs
    with Server(("127.0.0.1", 0), Handler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        seen = Requests(f"https://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield seen
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def server(server_certificate: Certificate, client_certificate: Certificate) -> Iterator[Requests]:
    """A registry that is only reached with a client certificate."""
    with tls_server(server_certificate, client_certificate, ssl.CERT_REQUIRED) as seen:
        yield seen


def section(url: str, ca: Certificate, client: Certificate | None = None, **keys: object) -> Registry:
    tls: dict[str, object] = {"ca": ca.certificate}
    if client:
        tls |= {"certificate": client.certificate, "key": client.key, "key_password": {"env": "KEY_PASSWORD"}}
    return Registry.model_validate({"url": url, "tls": tls, **keys})


@pytest.mark.parametrize(("path", "document"), [(READ, None), (REGISTER, {"schema": "{}"})], ids=["read", "register"])
def test_a_registry_with_its_own_ca_and_mutual_tls_answers(
    server: Requests, server_certificate: Certificate, client_certificate: Certificate, path: str, document: Any
) -> None:
    login = {"username": "me:too", "password": {"env": "REGISTRY_PASSWORD"}}
    registry = section(server.url, server_certificate, client_certificate, **login)
    client = RegistryClient(registry.location({"KEY_PASSWORD": PASSWORD, "REGISTRY_PASSWORD": "s3cret\n"}))
    assert client.ask(path, document).content == {"path": path}
    assert server.authorization == ["Basic " + b64encode(b"me:too:s3cret").decode()]
    assert client.url == server.url


def test_neither_side_accepts_an_unknown_certificate(
    server: Requests, server_certificate: Certificate, client_certificate: Certificate
) -> None:
    for registry, reason in (
        (section(server.url, client_certificate), "certificate verify failed"),  # another authority than the server's
        (Registry(url=server.url), "certificate verify failed"),  # the system's authorities
        (section(server.url, server_certificate), ""),  # the client shows no certificate
    ):
        with pytest.raises(RegistryUnavailable, match=f"schema registry {server.url}: .*{reason}"):
            RegistryClient(registry.location()).ask(READ)
    assert server.authorization == []


def test_another_host_gets_no_client_certificate_and_no_credentials(
    server: Requests,
    server_certificate: Certificate,
    client_certificate: Certificate,
    make_certificate: Callable[..., Certificate],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    login = {"username": "me", "password": {"env": "REGISTRY_PASSWORD"}}
    registry = section(server.url, server_certificate, client_certificate, **login)
    other_certificate = make_certificate()
    monkeypatch.setenv("SSL_CERT_FILE", str(other_certificate.certificate))  # the system's authorities
    with tls_server(other_certificate, client_certificate, ssl.CERT_OPTIONAL) as other:
        server.redirect = other.url
        client = RegistryClient(registry.location({"KEY_PASSWORD": PASSWORD, "REGISTRY_PASSWORD": "s3cret"}))
        assert client.ask(READ).content == {"path": READ}
    assert server.certificates[0]["subject"]
    assert other.authorization == [None]
    assert other.certificates == [None]


def test_files_that_are_no_certificates_are_named(
    tmp_path: Path, server_certificate: Certificate, client_certificate: Certificate
) -> None:
    junk = tmp_path / "junk.pem"
    junk.write_text("junk")
    url, environment = "https://registry", {"KEY_PASSWORD": "wrong"}
    with pytest.raises(CertificateError, match=r"junk\.pem: no PEM file of certificates"):
        RegistryClient(section(url, Certificate(junk, junk)).location())
    for certificate, key in ((junk, client_certificate.key), client_certificate):  # the second: a wrong password
        mutual = section(url, server_certificate, Certificate(certificate, key))
        with pytest.raises(CertificateError, match=rf"{certificate}, {key}: not the PEM files of .+ key_password"):
            RegistryClient(mutual.location(environment))
    with pytest.raises(CertificateError, match=r"none\.pem: No such file"):
        RegistryClient(section(url, Certificate(tmp_path / "none.pem", junk)).location())


def test_an_encrypted_key_without_password_is_refused_and_not_asked_for(
    server_certificate: Certificate, client_certificate: Certificate
) -> None:
    tls = {"certificate": client_certificate.certificate, "key": client_certificate.key}
    with pytest.raises(CertificateError, match="key_password"):
        RegistryClient(Registry.model_validate({"url": "https://registry", "tls": tls}).location())


def test_a_missing_secret_is_named(server_certificate: Certificate) -> None:
    login = {"username": "me", "password": {"env": "NO_SUCH_SECRET"}}
    with pytest.raises(SecretError, match="NO_SUCH_SECRET"):
        section("https://registry", server_certificate, **login).location({})
