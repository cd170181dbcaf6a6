"""Where a schema registry is: credentials are taken out of its URL, and no message shows them."""

from __future__ import annotations

from pathlib import Path

import pytest

from broker_filter.packets.schemas.registry import open_registry
from broker_filter.packets.schemas.registry_location import RegistryLocation, RegistryUrlError, registry_location


def test_credentials_are_taken_out_of_the_url() -> None:
    location = registry_location("https://me:one%2Ftwo@registry:8081/path/")
    assert location == RegistryLocation("https://registry:8081/path", "me", "one/two")
    assert location.is_remote
    assert "one/two" not in repr(location)


def test_a_path_is_the_location_of_a_directory() -> None:
    assert registry_location(Path("/data/me@home/schemas")) == RegistryLocation("/data/me@home/schemas")
    assert not registry_location("schemas").is_remote


@pytest.mark.parametrize(
    ("location", "shown"),
    [
        ("htps://me:secret@registry:8081", "'htps://***@registry:8081'"),
        ("https:/me:secret@registry", "'https:/***@registry'"),
        ("https//me:secret@registry", "'***@registry'"),
        ("me:sec@secret@registry", "'***@registry'"),
        ("htp://secret@registry", "'htp://***@registry'"),
        ("/data/me@home/schemas", "'/data/me@home/schemas'"),
    ],
)
def test_a_location_that_is_no_url_is_shown_without_credentials(location: str, shown: str) -> None:
    with pytest.raises(NotADirectoryError) as refused:
        open_registry(location)
    assert str(refused.value) == f"schema registry {shown} is neither a URL (http, https) nor a directory"


@pytest.mark.parametrize("password", ["secret/", "12/secret", "sec?ret", "sec#ret", "sec[ret", "secret/80"])
def test_a_url_with_unescaped_characters_is_refused_without_showing_the_password(password: str, tmp_path: Path) -> None:
    with pytest.raises(RegistryUrlError) as refused:
        open_registry(f"https://me:{password}@registry", tmp_path)
    assert str(refused.value).startswith("schema registry https://***@registry: the URL is not valid; percent-encode")


@pytest.mark.parametrize("url", ["http://", "http://:8081", "http://registry:none", "http://registry:99999"])
def test_a_url_without_a_usable_host_and_port_is_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(RegistryUrlError, match="the URL is not valid"):
        open_registry(url, tmp_path)
