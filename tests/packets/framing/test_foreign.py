"""A rejection of bytes that are not a packet names their format and says what to do."""

from __future__ import annotations

import io
import tarfile
import zipfile

import pytest

from broker_filter.packets.decode import Decoder
from broker_filter.packets.framing.foreign import describe
from broker_filter.packets.packet import FilePosition, Packet
from broker_filter.packets.rejects import RejectReason
from broker_filter.packets.schemas.registry import open_registry


def zipped(data: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("1.avro", data)
    return file.getvalue()


def empty_tar() -> bytes:
    file = io.BytesIO()
    tarfile.open(fileobj=file, mode="w").close()
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (zipped(b"Obj\x01 and so on"), "zip archive"),
        (zipped(bytes(1 << 20)), "zip archive"),
        (b"Rar!\x1a\x07\x01\x00", "rar archive"),
        (b"7z\xbc\xaf\x27\x1c\x00\x04", "7z archive"),
        (b"\xfd7zXZ\x00\x00", "xz-compressed"),
        (b"\x28\xb5\x2f\xfd\x00", "zstd-compressed"),
        (b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X", "AppleDouble"),
        (b'{"candid": 1}', "JSON: alerts are read in Avro or Parquet"),
        (b'{"diaObjectId": 169760235333878021, "decl": -38.1, "alert": {}}', "as Lasair sends it, without cutouts"),
        (b'{"ra": 1.5, "diaSourceId" : 169760235333878021}', "as Lasair sends it, without cutouts"),
        (empty_tar(), "tar archive without members"),
        (b"clouds after midnight", "neither an Avro container file nor Confluent wire format"),
    ],
)
def test_a_rejection_names_the_format_of_the_bytes(data: bytes, word: str) -> None:
    decoder = Decoder(open_registry(None), max_packet_bytes=1 << 16)
    _, [reject] = decoder.decode([Packet(data, FilePosition("x"))])
    assert reject.reason is RejectReason.NOT_AVRO
    assert word in reject.detail


def test_wire_format_is_never_recognised_as_another_format() -> None:
    for schema_id in (704, 900, 1101, 1, 2**32 - 1):
        assert describe(b"\x00" + schema_id.to_bytes(4, "big") + bytes(8)) is None
