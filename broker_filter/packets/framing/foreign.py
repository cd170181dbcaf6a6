"""Recognises other file formats by their first bytes (magic numbers), so that a rejection can name the format.

This module only compares the first bytes, and in JSON looks for a key among them. It must never parse the data.
"""

from __future__ import annotations

import re

_UNPACK = "unpack it and pass the folder, or repack it as .tar, .tar.gz or .tar.zst"
_JSON = "JSON: alerts are read in Avro or Parquet"
_LASAIR = (
    "JSON of an LSST object, as Lasair sends it, without cutouts: Lasair's stream has none; read the survey's stream, "
    "or that of a broker that forwards the cutouts"
)
_LASAIR_KEY = re.compile(rb'"dia(?:Object|Source)Id"\s*:')
"""A key of the JSON that Lasair sends for an LSST object (https://lasair-lsst.readthedocs.io)."""
_JSON_START = 4096
"""The number of bytes in which the key is looked for. Lasair writes the attributes of the object before its history."""
_KNOWN = (
    ((b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08"), f"a zip archive: {_UNPACK}"),
    ((b"Rar!\x1a\x07",), f"a rar archive: {_UNPACK}"),
    ((b"7z\xbc\xaf\x27\x1c",), f"a 7z archive: {_UNPACK}"),
    ((b"LZIP",), "lzip-compressed: unpack it with `lzip -d`, or compress it with gzip, xz, bzip2 or zstd"),
    ((b"\x1f\x9d",), "compressed by `compress` (.Z): unpack it with `gzip -d`"),
    ((b"]\x00\x00",), "lzma-compressed (.lzma): unpack it with `xz -d`, or compress it with xz"),
    ((b"\xfd7zXZ\x00",), "xz-compressed: unpack it with `xz -d`"),
    ((b"BZh",), "bzip2-compressed: unpack it with `bzip2 -d`"),
    ((b"\x28\xb5\x2f\xfd",), "zstd-compressed: unpack it with `zstd -d`"),
    ((b"\x04\x22\x4d\x18",), "lz4-compressed: unpack it with `lz4 -d`"),
    ((b"\x1f\x8b",), "gzip-compressed: unpack it with `gzip -d`"),
    ((b"0707",), f"a cpio archive: {_UNPACK}"),
    ((b"SQLite format 3\x00",), "an SQLite database: export its alerts as Parquet or Avro"),
    ((b"\x89HDF\r\n\x1a\n",), "an HDF5 file: convert it to Parquet or Avro"),
    ((b"SIMPLE  =",), "a FITS file, not a packet that holds one"),
    ((b"ARROW1",), "an Arrow (Feather) file: convert it to Parquet"),
    ((b"ORC",), "an ORC file: convert it to Parquet"),
    ((b"PAR1", b"PARE"), "a Parquet file: `score` and `inspect` read it from a file of its own"),
    ((b"\x00\x05\x16\x07\x00\x02\x00\x00",), "an AppleDouble file, which macOS writes beside another: delete it"),
    ((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF8"), "a picture"),
    ((b"%PDF-",), "a PDF document"),
    ((b"<!DOCTYPE", b"<!doctype", b"<html", b"<HTML", b"<?xml"), "a web page: the download may have failed"),
    ((b"{", b"["), _JSON),
    # A tar ends with two blocks of 512 zero bytes.
    ((bytes(1024),), "zero bytes: a tar archive without members, or a file that was allocated and never written"),
)
"""Magic numbers, and the description of the format that begins with them.

The formats that `streaming.archives` can read are also listed, because a Kafka message cannot be an archive."""
_BY_FIRST_BYTE: dict[int, list[tuple[bytes, str]]] = {}
for _beginnings, _description in _KNOWN:
    for _beginning in _beginnings:
        _BY_FIRST_BYTE.setdefault(_beginning[0], []).append((_beginning, _description))


def describe(data: bytes) -> str | None:
    """Return the format of `data` and what to do about it; None if the first bytes are unknown.

    `data` must not be empty (IndexError).
    """
    for beginning, description in _BY_FIRST_BYTE.get(data[0], ()):
        if data.startswith(beginning):
            return _LASAIR if description is _JSON and _LASAIR_KEY.search(data, 0, _JSON_START) else description
    return None
