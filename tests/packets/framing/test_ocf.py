"""Containers are read, split and written as by fastavro, and damage affects only the damaged part."""

from __future__ import annotations

import bz2
import io
import json
import lzma
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import fastavro
import pyarrow as pa
import pytest

from broker_filter.packets.framing import ocf
from broker_filter.packets.framing.ocf import Container, read_container
from broker_filter.packets.rejects import RejectReason
from broker_filter.packets.schemas.writer_schema import WriterSchema

SCHEMA = {
    "type": "record",
    "name": "point",
    "fields": [{"name": "id", "type": "long"}, {"name": "note", "type": ["null", "string"]}],
}
SYNC = bytes(range(16))
RECORDS = [{"id": i, "note": None if i % 3 else "x" * i} for i in range(100)]


def container(codec: str = "null", sync_interval: int = 200) -> bytes:
    """Return RECORDS in some 20 blocks, written by fastavro."""
    file = io.BytesIO()
    fastavro.writer(file, fastavro.parse_schema(SCHEMA), RECORDS, codec=codec, sync_interval=sync_interval)
    return file.getvalue()


def records(container: Container) -> list[dict[str, object]]:
    assert container.schema is not None
    decoded = []
    for block in container.blocks:
        stream = io.BytesIO(block.body)
        decoded += [fastavro.schemaless_reader(stream, SCHEMA, None) for _ in range(block.n_records)]
        assert stream.tell() == len(block.body)
    return decoded


def one(container: Container) -> WriterSchema:
    assert container.schema is not None
    return container.schema


def header_with(**metadata: bytes) -> bytes:
    """Return a header with these entries in the given order: `avro_codec=b"null"` is the entry `avro.codec`."""
    encoded = [
        ocf.encode_long(len(part)) + part
        for key, value in metadata.items()
        for part in (key.replace("_", ".").encode(), value)
    ]
    return ocf.MAGIC + ocf.encode_long(len(metadata)) + b"".join(encoded) + ocf.encode_long(0) + SYNC


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "zstandard": lambda data: bytes(pa.compress(data, codec="zstd", asbytes=True)),
    "bzip2": bz2.compress,
    "xz": lzma.compress,
}
XZ_DICTIONARY = 8 << 20
"""The memory in bytes that Python's decoder allocates for the usual compression level."""


def recoded(codec: str) -> bytes:
    """Return RECORDS in a container with a codec for which fastavro may need a package that is not installed."""
    plain = container()
    header = header_with(avro_codec=codec.encode(), avro_schema=json.dumps(SCHEMA).encode())
    blocks = []
    for block in read_container(plain).blocks:
        stored = COMPRESS[codec](bytes(block.body))
        blocks.append(ocf.encode_block(block.n_records, stored, SYNC))
    return header + b"".join(blocks)


@pytest.mark.parametrize("codec", ["zstandard", "bzip2", "xz"])
def test_every_codec_of_the_specification_is_read(codec: str) -> None:
    found = read_container(recoded(codec))
    assert found.error is None
    assert found.codec == codec
    assert records(found) == RECORDS


@pytest.mark.parametrize("codec", ["zstandard", "bzip2", "xz"])
def test_a_damaged_block_of_any_codec_is_rejected(codec: str) -> None:
    data = bytearray(recoded(codec))
    for at in range(300, len(data), 7):
        damaged = bytes(data[:at]) + bytes([data[at] ^ 0xFF]) + bytes(data[at + 1 :])
        read_container(damaged)  # never raises
    block = {"zstandard": b"\x28\xb5\x2f\xfd", "bzip2": b"BZh", "xz": b"\xfd7zXZ\x00"}[codec]
    body = ocf.encode_block(1, block + b"no more of it", SYNC)
    header = header_with(avro_codec=codec.encode(), avro_schema=json.dumps(SCHEMA).encode())
    error = read_container(header + body).error
    assert error is not None
    assert error[0] in (RejectReason.CORRUPT, RejectReason.TRUNCATED)


@pytest.mark.parametrize("codec", ["zstandard", "bzip2", "xz"])
def test_no_codec_exceeds_the_compression_ratio_of_deflate(codec: str) -> None:
    bomb = COMPRESS[codec](bytes(15 << 20))
    assert len(bomb) * ocf.GREATEST_RATIO < 15 << 20
    header = header_with(avro_codec=codec.encode(), avro_schema=json.dumps(SCHEMA).encode())
    tracemalloc.start()
    try:
        error = read_container(header + ocf.encode_block(1, bomb, SYNC)).error
        assert tracemalloc.get_traced_memory()[1] < 2 * len(bomb) * ocf.GREATEST_RATIO + XZ_DICTIONARY + (1 << 20)
    finally:
        tracemalloc.stop()
    assert error is not None
    assert error[0] is RejectReason.TOO_LARGE


@pytest.mark.parametrize("codec", ["null", "deflate", "snappy"])
def test_every_record_of_every_block_is_read(codec: str) -> None:
    read = read_container(container(codec))
    assert read.error is None
    assert len(read.blocks) > 3
    assert records(read) == RECORDS


@pytest.mark.parametrize("codec", ["lz4", "no-such"])
def test_an_unsupported_codec_is_named(codec: str) -> None:
    data = header_with(avro_schema=json.dumps(SCHEMA).encode(), avro_codec=codec.encode())
    reason, detail = read_container(data).error or (None, "")
    assert reason is RejectReason.UNSUPPORTED_CODEC
    assert codec in detail


def test_metadata_keys_may_have_any_order_and_the_codec_is_optional() -> None:
    schema = json.dumps(SCHEMA).encode()
    block = ocf.encode_block(1, b"\x02\x00", SYNC)
    for header in (
        header_with(avro_schema=schema, avro_codec=b"null"),
        header_with(avro_codec=b"null", avro_schema=schema),
        header_with(avro_schema=schema),
        header_with(other=b"x", avro_schema=schema),
    ):
        assert records(read_container(header + block)) == [{"id": 1, "note": None}]


def test_metadata_in_several_blocks_with_sizes_is_read() -> None:
    def pair(key: bytes, value: bytes) -> bytes:
        return ocf.encode_long(len(key)) + key + ocf.encode_long(len(value)) + value

    codec, schema = pair(b"avro.codec", b"null"), pair(b"avro.schema", json.dumps(SCHEMA).encode())
    metadata = b"".join(ocf.encode_long(-1) + ocf.encode_long(len(part)) + part for part in (codec, schema))
    read = read_container(ocf.MAGIC + metadata + b"\x00" + SYNC + ocf.encode_block(1, b"\x02\x00", SYNC))
    assert records(read) == [{"id": 1, "note": None}]


def test_equal_headers_give_the_same_schema_object() -> None:
    assert one(read_container(container())) is one(read_container(container(sync_interval=50)))
    assert one(read_container(container())) is not one(read_container(container("deflate")))


def test_null_codec_bodies_are_views_of_the_packet() -> None:
    data = container()
    assert all(block.body.obj is data for block in read_container(data).blocks)


def test_blocks_before_a_damage_are_kept() -> None:
    data = container()
    sound = read_container(data)
    second = len(data) // 2
    for damaged, reason in ((data[:second], RejectReason.TRUNCATED), (data[:second] + b"\xff" * 50, None)):
        read = read_container(damaged)
        assert read.error is not None
        assert reason in (None, read.error[0])
        assert 0 < len(read.blocks) < len(sound.blocks)
        assert [bytes(block.body) for block in read.blocks] == [
            bytes(block.body) for block in sound.blocks[: len(read.blocks)]
        ]


def test_a_wrong_sync_marker_is_corrupt() -> None:
    data = bytearray(container())
    data[-1] ^= 1
    error = read_container(bytes(data)).error
    assert error is not None
    assert error[0] is RejectReason.CORRUPT


@pytest.mark.parametrize("codec", ["deflate", "snappy"])
def test_a_block_is_not_decompressed_beyond_the_limit(codec: str) -> None:
    file = io.BytesIO()
    fastavro.writer(file, fastavro.parse_schema(SCHEMA), [{"id": 1, "note": "x" * 1_000_000}], codec=codec)
    assert read_container(file.getvalue(), 1_100_000).error is None
    read = read_container(file.getvalue(), 900_000)
    assert read.error is not None
    assert read.error[0] is RejectReason.TOO_LARGE
    assert not read.blocks


def test_damage_in_a_compressed_block_is_detected() -> None:
    for codec in ("deflate", "snappy"):
        data = bytearray(container(codec, sync_interval=16_000))
        data[-40] ^= 0x55
        read = read_container(bytes(data))
        # Deflate has no checksum: a flipped bit may give other bytes of the same length.
        assert codec == "deflate" or (read.error is not None and read.error[0] is RejectReason.CORRUPT)
    body = zlib.compress(b"\x02\x00" * 500, wbits=-15)[:-3]
    cut = header_with(avro_codec=b"deflate", avro_schema=json.dumps(SCHEMA).encode()) + ocf.encode_block(
        500, body, SYNC
    )
    error = read_container(cut).error
    assert error is not None
    assert error[0] is RejectReason.TRUNCATED


@pytest.mark.parametrize(
    "schema",
    [
        b"",
        b"{",
        b'"long"',
        b'["null"]',
        b'{"type": "record", "name": "a"}',
        b'{"type": "record", "name": "a", "fields": [{"name": "b", "type": "c"}]}',
        b'{"type": "record", "name": "a", "fields": [{"name": "b", "type": null}]}',
        b'{"type": "record", "name": "a", "fields": [{"name": "b", "type": {"type": "fixed", "name": "f"}}]}',
        b'{"type": "record", "name": "a\xff", "fields": []}',
        b'{"type": "record", "name": "\\ud800", "fields": []}',
        b"[" * 100_000,
        b'{"type": "record", "name": "a", "fields": [{"name": "b", "type": '
        + b'{"type": "array", "items": ' * 500
        + b'"int"'
        + b"}" * 500
        + b"}]}",
    ],
)
def test_an_invalid_schema_damages_the_header(schema: bytes) -> None:
    read = read_container(header_with(avro_schema=schema) + ocf.encode_block(1, b"\x02\x00", SYNC))
    assert read.schema is None
    assert read.error is not None
    assert read.error[0] is RejectReason.BAD_SCHEMA


def test_fastavro_reads_the_written_containers() -> None:
    body = io.BytesIO()
    for record in RECORDS[:2]:
        fastavro.schemaless_writer(body, SCHEMA, record)
    data = ocf.container_header(json.dumps(SCHEMA).encode(), SYNC) + ocf.encode_block(2, body.getvalue(), SYNC)
    assert list(fastavro.reader(io.BytesIO(data))) == RECORDS[:2]
    assert records(read_container(data)) == RECORDS[:2]


@pytest.mark.parametrize("value", [0, -1, 1, 63, 64, -64, -65, 2**31, -(2**63), 2**63 - 1])
def test_longs_are_encoded_as_fastavro_does(value: int) -> None:
    expected = io.BytesIO()
    fastavro.schemaless_writer(expected, "long", value)
    assert ocf.encode_long(value) == expected.getvalue()


class Trickle(io.BytesIO):
    """A stream that returns three bytes at a time."""

    def read(self, size: int | None = -1) -> bytes:
        return super().read(min(3, size if size is not None and size >= 0 else 3))


def split(data: bytes, **bounds: int) -> Iterator[Container]:
    for piece in ocf.split_container(Trickle(data), **bounds):
        yield read_container(piece)


@pytest.mark.parametrize("codec", ["null", "deflate", "snappy"])
def test_a_file_splits_into_containers_of_one_block(codec: str) -> None:
    data = container(codec)
    pieces = list(split(data))
    assert [len(piece.blocks) for piece in pieces] == [1] * len(read_container(data).blocks)
    assert [record for piece in pieces for record in records(piece)] == RECORDS
    assert ocf.count_records(data) == len(RECORDS)
    assert [ocf.count_records(piece) for piece in ocf.split_container(io.BytesIO(data))] == [
        piece.blocks[0].n_records for piece in pieces
    ]


def test_a_damaged_file_splits_into_its_valid_blocks_and_one_remainder() -> None:
    data = container()
    *sound, rest = split(data[: len(data) // 2])
    assert all(piece.error is None for piece in sound)
    assert [record for piece in sound for record in records(piece)] == RECORDS[
        : sum(p.blocks[0].n_records for p in sound)
    ]
    assert rest.error is not None
    assert rest.error[0] is RejectReason.TRUNCATED
    assert not rest.blocks


def test_a_block_beyond_the_limit_is_not_read_completely() -> None:
    header = ocf.container_header(json.dumps(SCHEMA).encode(), SYNC)
    file = io.BytesIO(header + ocf.encode_block(1, bytes(20 << 20), SYNC))
    (rest,) = ocf.split_container(file, max_block_bytes=1 << 20)
    assert len(rest) < 2 << 20
    assert file.tell() < 3 << 20


def test_a_file_that_is_no_container_is_one_piece() -> None:
    for data in (b"", b"Ob", b"no container at all" * 10, header_with(avro_schema=b"{")[:40]):
        assert list(ocf.split_container(io.BytesIO(data))) == [data]


def test_shared_containers_match_the_values_of_fastavro(
    shared_data: Path, ztf_packets: list[tuple[int, bytes]]
) -> None:
    files = [data for _, data in ztf_packets[::20]]
    files += [path.read_bytes() for path in sorted((shared_data / "lsst" / "ocf").rglob("*.avro"))]
    for data in files:
        read = read_container(data)
        blocks = list(fastavro.block_reader(io.BytesIO(data)))
        assert read.error is None
        assert [block.n_records for block in read.blocks] == [block.num_records for block in blocks]
        assert [bytes(block.body) for block in read.blocks] == [block.bytes_.getvalue() for block in blocks]


def test_fingerprints_are_those_of_the_canonical_form(ztf_packets: list[tuple[int, bytes]]) -> None:
    schemas = {schema.fingerprint: schema for _, data in ztf_packets if (schema := read_container(data).schema)}
    assert len(schemas) > 20
    for fingerprint, schema in schemas.items():
        canonical = fastavro.schema.to_parsing_canonical_form(fastavro.parse_schema(schema.definition))
        assert canonical == json.dumps(schema.canonical, separators=(",", ":"))
        assert fingerprint == fastavro.schema.fingerprint(canonical, "CRC-64-AVRO")
