"""Reads, splits and writes Avro object container files (Avro 1.11, "Object Container Files").

This module handles headers and blocks, and never decodes a record. It must not raise an exception on any bytes, and
must not decompress beyond a bound.
"""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from threading import Lock
from typing import BinaryIO, NamedTuple

import cramjam

from broker_filter.packets.rejects import RejectReason
from broker_filter.packets.schemas.writer_schema import (
    MAX_REMEMBERED_BYTES,
    MAX_SCHEMA_BYTES,
    SchemaError,
    WriterSchema,
    parse_schema,
)

MAGIC = b"Obj\x01"
SYNC_BYTES = 16
MAX_CONTAINER_BYTES = 16 << 20
"""The default limit on the decompressed records of a container, in bytes. The largest real packets have 0.4 MB."""
MAX_HEADER_BYTES = MAX_SCHEMA_BYTES + (1 << 16)
"""The maximum size of a header, in bytes. A header holds the schema and some short entries."""
MAX_METADATA = 1_000
"""The maximum number of metadata entries in a header. Writers use two to a dozen."""
MAX_BLOCKS = 10_000
"""The maximum number of blocks in a container. Each block costs some microseconds, however small it is."""
MAX_REPETITION = 64
"""The maximum ratio of the output of `split_container` to its input: the header is repeated in every piece. A block
with one LSST alert is as long as its header."""
_KNOWN_HEADERS = 64
"""The number of distinct headers in the cache. A survey has one per schema version, redistributors some dozens."""
_HEADER_BEGINNING = 48
"""The length, in bytes, of the key of the header cache. It includes the length of the schema, so most keys differ."""
_READ_BYTES = 1 << 18
"""The number of bytes that a splitter reads from a file at a time, enough for a few packets."""

CODECS = ("null", "deflate", "snappy", "zstandard", "bzip2", "xz")
"""All codecs of the Avro specification."""
GREATEST_RATIO = 1032
"""The maximum compression ratio of deflate (RFC 1951): a repetition of 258 bytes takes at least two bits. This limit is
also applied to compressed formats that have none."""
XZ_MEMORY = 80 << 20
"""The memory limit for decompressing xz, in bytes. xz -9 needs 65 MiB for its dictionary; a file may request 4 GiB."""

Damage = tuple[RejectReason, str]
"""Why bytes cannot be read: the reason and its description."""


class Block(NamedTuple):
    """A block of a container: the number of records that it claims to hold, and their decompressed bytes."""

    n_records: int
    body: memoryview


class Container(NamedTuple):
    """What could be read of a container.

    `blocks`: the valid blocks before the first damage. `error`: the damage; None if the whole container is valid.
    `schema`: the writer's schema; None only if the header is damaged. `codec`: the compression of the blocks.
    """

    schema: WriterSchema | None
    blocks: tuple[Block, ...]
    error: Damage | None = None
    codec: str = "null"


@dataclass(frozen=True, slots=True)
class _Header:
    """The magic and metadata of a container, up to the sync marker. All containers of a writer have the same header."""

    bytes: bytes
    codec: str
    schema: WriterSchema


class _DamagedError(Exception):
    """Raised inside this module to stop reading a container."""

    def __init__(self, reason: RejectReason, detail: str) -> None:
        super().__init__(detail)
        self.damage: Damage = (reason, detail)


_known_headers: tuple[_Header, ...] = ()  # newest first
_headers_by_beginning: dict[bytes, list[_Header]] = {}  # the same headers; replaced atomically, so reads need no lock
_header_lock = Lock()


def read_container(data: bytes, max_bytes: int = MAX_CONTAINER_BYTES) -> Container:
    """Read all blocks of `data`, a container that starts with MAGIC. Never raises.

    The blocks of the null codec are zero-copy views of `data`. A block is valid if the sync marker follows it. If the
    decompressed blocks exceed `max_bytes` in all, the container counts as damaged.
    """
    try:
        header = _header_of(data)
    except _DamagedError as error:
        return Container(None, (), error.damage)
    blocks: list[Block] = []
    try:
        start = len(header.bytes) + SYNC_BYTES
        sync = data[len(header.bytes) : start]
        if len(sync) < SYNC_BYTES:
            raise _DamagedError(RejectReason.TRUNCATED, "the container ends within its header")
        view, left = memoryview(data), max_bytes
        while start < len(data):
            count, begin, end = _read_block(data, start, sync)
            body = _inflate(header.codec, view[begin:end], left)
            left -= len(body)
            start = end + SYNC_BYTES
            blocks.append(Block(count, body))
            if len(blocks) == MAX_BLOCKS and start < len(data):
                raise _DamagedError(RejectReason.TOO_LARGE, f"the container has more than {MAX_BLOCKS} blocks")
    except _DamagedError as error:
        return Container(header.schema, tuple(blocks), error.damage, header.codec)
    return Container(header.schema, tuple(blocks), None, header.codec)


def count_records(container: bytes) -> int:
    """Return the number of records that the blocks of a container claim to hold.

    At most MAX_BLOCKS blocks are counted, and none after the first damage. Decompresses nothing and never raises.
    """
    records = 0
    try:
        known = _known_header(container)
        start = len(known.bytes) if known else _read_metadata(container)[0]
        sync = container[start : start + SYNC_BYTES]
        start += SYNC_BYTES
        for _ in range(MAX_BLOCKS):
            if start >= len(container):
                break
            count, _, end = _read_block(container, start, sync)
            records += count
            start = end + SYNC_BYTES
    except _DamagedError:
        pass
    return records


def split_container(stream: BinaryIO, max_block_bytes: int = MAX_CONTAINER_BYTES) -> Iterator[bytes]:
    """Yield each block of a container file as a container of its own, in constant memory.

    Blocks that are tiny compared with the header, such as blocks without records, are yielded together, because each
    yielded container repeats the header.

    If the file is damaged, or a block is longer than `max_block_bytes`, the last item is the header and the bytes read
    after it; decoding rejects it with the reason. If the file is not a container or has no block, all that was read is
    yielded as one item.
    """
    buffer = bytearray()

    def fill(size: int) -> bool:
        while len(buffer) < size:
            piece = stream.read(max(size - len(buffer), _READ_BYTES))
            if not piece:
                return False
            buffer.extend(piece)
        return True

    fill(1)
    while True:
        try:
            end, _ = _read_metadata(buffer)
            break
        except _DamagedError as error:
            short = error.damage[0] is RejectReason.TRUNCATED and len(buffer) < MAX_HEADER_BYTES
            if not (short and fill(len(buffer) + 1)):
                yield bytes(buffer)
                return
    fill(end + SYNC_BYTES)
    header, sync = bytes(buffer[: end + SYNC_BYTES]), bytes(buffer[end : end + SYNC_BYTES])
    del buffer[: end + SYNC_BYTES]
    if not fill(1):
        yield header
        return
    blocks = bytearray()
    while fill(1):
        try:
            end = _read_block(buffer, 0, sync)[2] + SYNC_BYTES
        except _DamagedError as error:
            short = error.damage[0] is RejectReason.TRUNCATED and len(buffer) < max_block_bytes
            if short and fill(len(buffer) + 1):
                continue
            yield header + bytes(blocks + buffer)
            return
        blocks += buffer[:end]
        del buffer[:end]
        if len(blocks) * MAX_REPETITION >= len(header):
            yield header + bytes(blocks)
            blocks.clear()
    if blocks:
        yield header + bytes(blocks)


def container_header(schema_json: bytes, sync: bytes) -> bytes:
    """Return the header of a container with the null codec.

    `sync`: the 16-byte marker that ends the header and each block.
    """
    return b"".join(
        (
            MAGIC,
            encode_long(2),
            _encode_bytes(b"avro.codec"),
            _encode_bytes(b"null"),
            _encode_bytes(b"avro.schema"),
            _encode_bytes(schema_json),
            encode_long(0),
            sync,
        )
    )


def encode_block(count: int, body: bytes, sync: bytes) -> bytes:
    """Return a block of the null codec with `count` records, whose encoded bytes are `body`, and the marker `sync`."""
    return b"".join((encode_long(count), encode_long(len(body)), body, sync))


def encode_long(value: int) -> bytes:
    """Return `value` as an Avro long.

    The encoding is zigzag, then 7 bits per byte, least significant first (Avro 1.11, "Binary Encoding").
    """
    zigzag = value << 1 if value >= 0 else (-value << 1) - 1
    encoded = bytearray()
    while zigzag > 0x7F:
        encoded.append(zigzag & 0x7F | 0x80)
        zigzag >>= 7
    encoded.append(zigzag)
    return bytes(encoded)


def _encode_bytes(value: bytes) -> bytes:
    return encode_long(len(value)) + value


def _header_of(data: bytes) -> _Header:
    """Return the header at the start of `data`; each distinct header is parsed once and then cached.

    Raises _DamagedError.
    """
    if known := _known_header(data):
        return known
    end, metadata = _read_metadata(data)
    codec = metadata.get(b"avro.codec", b"null").decode("ascii", "replace")
    if codec not in CODECS:
        raise _DamagedError(
            RejectReason.UNSUPPORTED_CODEC,
            f"unknown codec {codec[:40]!r}: write the container with {' or '.join(CODECS)}",
        )
    try:
        schema = parse_schema(metadata.get(b"avro.schema", b""))
    except SchemaError as error:
        raise _DamagedError(RejectReason.BAD_SCHEMA, str(error)) from error
    return _remember(_Header(data[:end], codec, schema))


def _known_header(data: bytes) -> _Header | None:
    """Return the cached header with which `data` starts; None if it is not in the cache."""
    for header in _headers_by_beginning.get(data[:_HEADER_BEGINNING], ()):
        if data.startswith(header.bytes):
            return header
    return None


def _remember(header: _Header) -> _Header:
    """Add a header to the cache and return it; if the cache has a header with the same bytes, return that one."""
    global _known_headers, _headers_by_beginning
    with _header_lock:
        if known := next((known for known in _known_headers if known.bytes == header.bytes), None):
            return known
        kept, n_bytes = [header], len(header.bytes)
        for known in _known_headers[: _KNOWN_HEADERS - 1]:
            if (n_bytes := n_bytes + len(known.bytes)) > MAX_REMEMBERED_BYTES:
                break
            kept.append(known)
        _known_headers = tuple(kept)
        by_beginning: dict[bytes, list[_Header]] = {}
        for known in _known_headers:
            by_beginning.setdefault(known.bytes[:_HEADER_BEGINNING], []).append(known)
        _headers_by_beginning = by_beginning
    return header


def _read_metadata(data: bytes | bytearray) -> tuple[int, dict[bytes, bytes]]:
    """Return the offset at which the metadata map ends, and the map. Raises _DamagedError."""
    if data[: len(MAGIC)] != MAGIC[: len(data)]:
        raise _DamagedError(RejectReason.NOT_AVRO, "the bytes do not start with the magic of an Avro container file")
    metadata: dict[bytes, bytes] = {}
    entries, position = 0, len(MAGIC)
    while True:
        count, position = _read_long(data, position)
        if count == 0:
            return position, metadata
        if count < 0:  # a negative count is followed by the block's size in bytes
            count, (_, position) = -count, _read_long(data, position)
        if (entries := entries + count) > MAX_METADATA:
            raise _DamagedError(RejectReason.CORRUPT, f"the header has more than {MAX_METADATA} metadata entries")
        for _ in range(count):
            key, position = _read_bytes(data, position)
            metadata[key], position = _read_bytes(data, position)
        if position > MAX_HEADER_BYTES:
            raise _DamagedError(RejectReason.CORRUPT, f"the header has more than {MAX_HEADER_BYTES} bytes")


def _read_block(data: bytes | bytearray, position: int, sync: bytes) -> tuple[int, int, int]:
    """Return the block at `position`: its claimed record count, and the start and end of its stored bytes.

    Raises _DamagedError, also if the sync marker does not follow the block.
    """
    at = position
    count, position = _read_long(data, position)
    size, begin = _read_long(data, position)
    if count < 0 or size < 0:
        raise _DamagedError(RejectReason.CORRUPT, f"impossible block at byte {at}: {count} records in {size} bytes")
    end = begin + size
    if end + SYNC_BYTES > len(data):
        raise _DamagedError(RejectReason.TRUNCATED, f"the container ends within the block at byte {at}")
    if data[end : end + SYNC_BYTES] != sync:
        raise _DamagedError(RejectReason.CORRUPT, f"no sync marker after the block at byte {at}")
    return count, begin, end


def _read_long(data: bytes | bytearray, position: int) -> tuple[int, int]:
    value = shift = 0
    while position < len(data):
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return (value >> 1) ^ -(value & 1), position
        shift += 7
        if shift > 63:
            raise _DamagedError(RejectReason.CORRUPT, f"the number at byte {position - 10} has more than 64 bits")
    raise _DamagedError(RejectReason.TRUNCATED, "the container ends within a number")


def _read_bytes(data: bytes | bytearray, position: int) -> tuple[bytes, int]:
    size, position = _read_long(data, position)
    if not 0 <= size <= MAX_HEADER_BYTES:
        raise _DamagedError(RejectReason.CORRUPT, f"impossible length {size} in the header")
    if position + size > len(data):
        raise _DamagedError(RejectReason.TRUNCATED, "the container ends within its header")
    return bytes(data[position : position + size]), position + size


def _inflate(codec: str, stored: memoryview, limit: int) -> memoryview:
    """Return the decompressed bytes of a block. Raises _DamagedError, also if they exceed `limit` bytes."""
    if codec == "null":
        body: memoryview | bytes = stored
    elif codec == "deflate":
        body = _inflate_deflate(stored, limit)
    elif codec == "snappy":
        body = _inflate_snappy(stored, limit)
    else:
        limit = min(limit, GREATEST_RATIO * len(stored))
        body = _inflate_zstandard(stored, limit) if codec == "zstandard" else _inflate_stream(codec, stored, limit)
    if len(body) > limit:
        raise _DamagedError(RejectReason.TOO_LARGE, f"a block decompresses to more than the {limit} bytes allowed")
    return memoryview(body)


def _inflate_deflate(stored: memoryview, limit: int) -> bytes:
    stream = zlib.decompressobj(wbits=-zlib.MAX_WBITS)
    try:
        body = stream.decompress(stored, limit + 1)
    except zlib.error as error:
        raise _DamagedError(RejectReason.CORRUPT, f"a block cannot be decompressed: {error}") from error
    if not stream.eof and len(body) <= limit:
        raise _DamagedError(RejectReason.TRUNCATED, "a block's deflate stream ends early")
    return body


def _inflate_snappy(stored: memoryview, limit: int) -> bytes:
    """Return the records of a snappy block: raw snappy data, then the big-endian CRC-32 of the records."""
    if len(stored) < 4:
        raise _DamagedError(RejectReason.TRUNCATED, "a snappy block is too short for its checksum")
    packed, checksum = stored[:-4], int.from_bytes(stored[-4:], "big")
    try:
        if cramjam.snappy.decompress_raw_len(packed) > limit:
            raise _DamagedError(RejectReason.TOO_LARGE, f"a block decompresses to more than the {limit} bytes allowed")
        body = bytes(cramjam.snappy.decompress_raw(packed))
    except cramjam.DecompressionError as error:
        raise _DamagedError(RejectReason.CORRUPT, f"a block cannot be decompressed: {error}") from error
    if zlib.crc32(body) != checksum:
        raise _DamagedError(RejectReason.CORRUPT, "a block's checksum is wrong")
    return body


def _inflate_zstandard(stored: memoryview, limit: int) -> bytes:
    import pyarrow as pa  # importing pyarrow takes 0.1 s, and few containers use this codec

    try:
        with pa.CompressedInputStream(pa.BufferReader(pa.py_buffer(stored)), "zstd") as stream:
            return bytes(stream.read(limit + 1))
    except (OSError, pa.ArrowException) as error:
        raise _DamagedError(RejectReason.CORRUPT, f"a block cannot be decompressed: {error}") from error


def _inflate_stream(codec: str, stored: memoryview, limit: int) -> bytes:
    stream = bz2.BZ2Decompressor() if codec == "bzip2" else lzma.LZMADecompressor(memlimit=XZ_MEMORY)
    try:
        body = stream.decompress(stored, limit + 1)
    except (OSError, lzma.LZMAError) as error:
        raise _DamagedError(RejectReason.CORRUPT, f"a block cannot be decompressed: {error}") from error
    if not stream.eof and len(body) <= limit:
        raise _DamagedError(RejectReason.TRUNCATED, f"a block's {codec} stream ends early")
    return body
