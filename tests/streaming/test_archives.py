"""Archives: packets are read byte for byte in constant memory, also from nested, misnamed or damaged files."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import random
import tarfile
import tracemalloc
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import fastavro
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from broker_filter.packets.alert_rows import AlertRows
from broker_filter.packets.decode import Decoder
from broker_filter.packets.packet import FilePosition, Packet
from broker_filter.packets.schemas.registry import open_registry
from broker_filter.streaming.archives import MAX_DEPTH, InputError, read_packets

SCHEMA = {
    "type": "record",
    "name": "alert",
    "fields": [{"name": "candid", "type": "long"}, {"name": "stamp", "type": "bytes"}],
}


def container(*candids: int, stamp_bytes: int = 3000, block_bytes: int = 1) -> bytes:
    """Return a container file of one or more alerts; by default, each alert has its own block (`block_bytes`)."""
    alerts = [{"candid": candid, "stamp": random.Random(candid).randbytes(stamp_bytes)} for candid in candids]
    file = io.BytesIO()
    fastavro.writer(file, SCHEMA, alerts, sync_interval=block_bytes, sync_marker=b"0123456789abcdef")
    return file.getvalue()


def tar(members: Iterable[tuple[str, bytes]]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def parquet(candids: list[int]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"candid": candids}), file)
    return file.getvalue()


def save(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def read(*inputs: Path, **options: int) -> list[tuple[str, bytes]]:
    return [(str(packet.position), packet.data) for packet in read_packets(inputs, **options)]


PACKETS = [(f"{candid}.avro", container(candid)) for candid in range(1, 8)]


def test_every_member_of_the_shared_archive_is_a_packet_byte_for_byte(
    shared_data: Path, ztf_packets: list[tuple[int, bytes]]
) -> None:
    path = shared_data / "ztf" / "ztf_alerts.tar"
    expected = [(f"{path}::{candid}.avro", data) for candid, data in ztf_packets]
    assert read(path) == expected


def test_real_night_archive_is_read_completely(shared_data: Path) -> None:
    path = shared_data / "ztf" / "archives" / "ztf_public_20180819_mod1000.tar.gz"
    with tarfile.open(path) as archive:
        expected = [archive.extractfile(member).read() for member in archive]
    assert len(expected) == 30
    assert [data for _, data in read(path)] == expected


def test_bytes_and_not_the_name_decide_the_format_of_a_file(tmp_path: Path) -> None:
    (name, packet), *_ = PACKETS
    wire = b"\x00\x00\x00\x02\xc0 a body"
    saved = {
        "a.tar": packet,
        "b.avro": tar([(name, packet)]),
        "c.parquet": gzip.compress(packet),
        "d": gzip.compress(tar([("x", gzip.compress(packet))])),
        "e.tar.gz": wire,
        "f.avro": b"no alert at all",
        "g.avro": b"",
    }
    for file_name, data in saved.items():
        save(tmp_path, file_name, data)
    assert read(tmp_path) == [
        (f"{tmp_path}/a.tar", packet),
        (f"{tmp_path}/b.avro::{name}", packet),
        (f"{tmp_path}/c.parquet", packet),
        (f"{tmp_path}/d::x", packet),
        (f"{tmp_path}/e.tar.gz", wire),
        (f"{tmp_path}/f.avro", b"no alert at all"),
        (f"{tmp_path}/g.avro", b""),
    ]


def test_nested_archives_are_read(tmp_path: Path) -> None:
    night = gzip.compress(tar([("night/", b""), *((f"night/{name}", data) for name, data in PACKETS)]))
    season = gzip.compress(tar([("20180819.tar.gz", night), ("one.avro.gz", gzip.compress(PACKETS[0][1]))]))
    path = save(tmp_path, "season.tar.gz", season)
    expected = [(f"{path}::20180819.tar.gz/night/{name}", data) for name, data in PACKETS]
    assert read(path)[1:] == [*expected, (f"{path}::one.avro.gz", PACKETS[0][1])]


def zstd(data: bytes) -> bytes:
    return bytes(pa.compress(data, codec="zstd", asbytes=True))


def lz4(data: bytes) -> bytes:
    return bytes(pa.compress(data, codec="lz4", asbytes=True))


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "xz": lzma.compress,
    "bz2": bz2.compress,
    "zst": zstd,
    "lz4": lz4,
}


@pytest.mark.parametrize("suffix", COMPRESS)
def test_every_compression_is_read_alone_inside_a_tar_and_around_a_tar(tmp_path: Path, suffix: str) -> None:
    compress = COMPRESS[suffix]
    packet = PACKETS[0][1]
    alone = save(tmp_path, f"1.avro.{suffix}", compress(packet))
    night = save(tmp_path, f"night.tar.{suffix}", compress(tar([*PACKETS, ("8.avro", compress(packet))])))
    assert read(alone) == [(str(alone), packet)]
    expected = [(f"{night}::{name}", data) for name, data in [*PACKETS, ("8.avro", packet)]]
    assert read(night) == expected


def test_files_of_pzstd_are_read(tmp_path: Path) -> None:
    size_of_the_next_frame = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + bytes(4)
    path = save(tmp_path, "night.tar.zst", size_of_the_next_frame + zstd(tar(PACKETS)))
    assert [data for _, data in read(path)] == [data for _, data in PACKETS]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_concatenated_compressed_streams_are_read_to_the_end(tmp_path: Path, suffix: str) -> None:
    archive, compress = tar(PACKETS), COMPRESS[suffix]
    parts = [archive[i : i + 5000] for i in range(0, len(archive), 5000)]
    path = save(tmp_path, "night", b"".join(compress(part) for part in parts))
    assert [data for _, data in read(path)] == [data for _, data in PACKETS]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_damage_in_any_compression_gives_a_packet_that_cannot_be_decoded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, suffix: str
) -> None:
    many = [(f"{candid}.avro", container(candid)) for candid in range(200)]
    whole = COMPRESS[suffix](tar(many))
    path = save(tmp_path, "night", whole[: len(whole) // 2])
    *packets, (last, rest) = read(path)
    assert (last, rest) == (str(path), b"")
    assert f"{path}: damaged" in caplog.text
    # Random bytes do not compress, so half of the file holds half of the packets, minus one compressed block.
    complete = [data for (_, data), (_, original) in zip(packets, many, strict=False) if data == original]
    if suffix != "bz2":  # bzip2 has blocks of 900 kB
        assert len(complete) > 50
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 0xFF
    assert read(save(tmp_path, "night", bytes(damaged)))


@pytest.mark.parametrize("suffix", ["xz", "bz2", "zst"])
def test_decompression_bomb_is_stopped_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, suffix: str
) -> None:
    bombs = {
        "one large member": header("huge", 1 << 30) + bytes(40 << 20),
        "padding": tar(PACKETS[:1]) + bytes(40 << 20),
        "one large packet": b"x" * (40 << 20),
    }
    for content in bombs.values():
        path = save(tmp_path, "bomb", COMPRESS[suffix](content))
        tracemalloc.start()
        try:
            packets = read(path, max_packet_bytes=1 << 20)
            assert tracemalloc.get_traced_memory()[1] < 16 << 20
        finally:
            tracemalloc.stop()
        assert len(packets) <= 2
    assert "decompression bomb" in caplog.text or "after its end" in caplog.text


def test_files_that_macos_adds_are_ignored(tmp_path: Path) -> None:
    apple_double = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        " + bytes(100)
    members = [
        ("._night", apple_double),
        ("night/._1.avro", apple_double),
        (f"night/{PACKETS[0][0]}", PACKETS[0][1]),
        ("__MACOSX/night/._1.avro", apple_double),
        ("night/.DS_Store", b"\x00\x00\x00\x01Bud1"),
        ("night/._2.avro", PACKETS[1][1]),  # this is an alert: bytes decide, not names
    ]
    path = save(tmp_path / "archive", "night.tar", tar(members))
    assert [data for _, data in read(path)] == [PACKETS[0][1], PACKETS[1][1]]
    for name, data in members:
        save(tmp_path / "folder", name, data)
    assert sorted(data for _, data in read(tmp_path / "folder")) == sorted([PACKETS[0][1], PACKETS[1][1]])


def test_folders_are_read_recursively_in_order_of_names_and_inputs_in_the_order_given(tmp_path: Path) -> None:
    for name in ("b/2", "b/1", "a", "c/d/3"):
        save(tmp_path / "night", name, name.encode())
    alone = save(tmp_path, "alone", b"alone")
    assert [data for _, data in read(alone, tmp_path / "night")] == [b"alone", b"a", b"b/1", b"b/2", b"c/d/3"]


def test_each_block_of_a_container_file_is_a_packet_with_its_first_record_number(tmp_path: Path) -> None:
    path = save(tmp_path, "many.avro", container(*range(100), block_bytes=20_000))
    seen: list[int] = []
    for packet in read_packets([path]):
        assert packet.position == FilePosition(str(path), record=len(seen))
        seen += [alert["candid"] for alert in fastavro.reader(io.BytesIO(packet.data))]
        assert len(packet.data) < 40_000
    assert seen == list(range(100))


def test_each_row_of_parquet_is_a_packet_also_inside_an_archive(tmp_path: Path) -> None:
    alone = save(tmp_path, "alerts", parquet([7, 8]))
    archived = save(tmp_path, "alerts.tar.gz", gzip.compress(tar([("part-0", parquet([9]))])))
    packets = list(read_packets([alone, archived]))
    assert [alert["candid"] for p in packets for alert in fastavro.reader(io.BytesIO(p.data))] == [7, 8, 9]
    assert [str(packet.position) for packet in packets] == [f"{alone}", f"{alone}#1", f"{archived}::part-0"]


def test_in_batches_rows_of_parquet_stay_columns_between_packets(tmp_path: Path) -> None:
    for i in range(3):
        save(tmp_path, f"a{i}.avro", container(i))
    save(tmp_path, "b.parquet", parquet(list(range(200))))
    save(tmp_path, "c.avro", container(3))
    batches = list(read_packets([tmp_path]).batches(2))
    assert [(type(batch).__name__, len(batch)) for batch in batches] == [
        ("list", 2),
        ("list", 1),
        ("AlertRows", 128),
        ("AlertRows", 72),
        ("list", 1),
    ]
    assert [str(batch[-1].position) for batch in batches[2:4]] == [f"{tmp_path}/b.parquet#{row}" for row in (127, 199)]
    assert [packet.position for batch in batches for packet in batch] == [p.position for p in read_packets([tmp_path])]


def test_only_wanted_columns_of_parquet_are_read_in_batches(tmp_path: Path) -> None:
    table = pa.table(
        {"candid": [1], "candidate": [{"jd": 1.0, "fid": 2}], "prv_candidates": [[{"jd": 1.0, "rb": 0.5}]]}
    )
    pq.write_table(table, tmp_path / "rows.parquet")
    (rows,) = read_packets([tmp_path], wanted=["candid", "candidate.fid", "prv_candidates.jd", "absent.x"]).batches(9)
    assert isinstance(rows, AlertRows)
    assert rows.batch.to_pylist() == [{"candid": 1, "candidate": {"fid": 2}, "prv_candidates": [{"jd": 1.0}]}]


def test_damaged_parquet_ends_with_an_empty_packet_in_batches_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = save(tmp_path, "alerts.parquet", parquet([7, 8])[:-30])
    assert list(read_packets(path).batches(9)) == [[Packet(b"", FilePosition(str(path)))]]
    assert f"{path}: damaged Parquet" in caplog.text


def test_too_large_packet_is_not_read_to_its_end(tmp_path: Path) -> None:
    members = [("huge", b"x" * 2_000_000), ("huge.avro", container(1, stamp_bytes=2_000_000)), PACKETS[1]]
    path = save(tmp_path, "night.tar.gz", gzip.compress(tar(members)))
    (_, huge), (_, huge_container), last = read(path, max_packet_bytes=100_000)
    assert len(huge) == 100_001
    assert 100_000 < len(huge_container) < 1_000_000
    assert last == (f"{path}::{PACKETS[1][0]}", PACKETS[1][1])


def readable_part(archive: bytes) -> bytes:
    """Return the contents of PACKETS that a truncated archive still holds, without headers and padding."""
    stream = zlib.decompressobj(wbits=31)
    left = stream.decompress(archive) if archive.startswith(b"\x1f\x8b") else archive
    parts = []
    for _, data in PACKETS:
        parts.append(left[tarfile.BLOCKSIZE :][: len(data)])
        left = left[tarfile.BLOCKSIZE + -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE :]
    return b"".join(parts)


@pytest.mark.parametrize("compress", [gzip.compress, bytes], ids=["tar.gz", "tar"])
def test_truncated_archive_yields_its_packets_and_then_one_that_cannot_be_decoded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, compress: type[bytes]
) -> None:
    whole = compress(tar(PACKETS))
    for cut in range(600, int(len(whole) * 0.9), 997):
        path = save(tmp_path, "night.tar.gz", whole[:cut])
        *packets, (last_position, rest) = read(path)
        assert (last_position, rest) == (str(path), b"")
        assert f"{path}: damaged tar" in caplog.text
        caplog.clear()
        assert b"".join(data for _, data in packets) == readable_part(whole[:cut])


def test_damaged_gzip_loses_only_packets_after_the_damage(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    archive = bytearray(gzip.compress(tar(PACKETS)))
    archive[-4000] ^= 0xFF
    path = save(tmp_path, "night.tar.gz", bytes(archive))
    packets = read(path)
    assert [data for _, data in packets[:5]] == [data for _, data in PACKETS[:5]]
    assert packets[-1] == (str(path), b"")
    assert "damaged" in caplog.text


def test_wrong_gzip_checksum_is_reported_after_the_last_packet(tmp_path: Path) -> None:
    archive = bytearray(gzip.compress(tar(PACKETS)))
    archive[-8] ^= 0xFF
    path = save(tmp_path, "night.tar.gz", bytes(archive))
    assert [data for _, data in read(path)] == [*(data for _, data in PACKETS), b""]


def test_damaged_tar_header_is_not_taken_for_the_end_of_the_archive(tmp_path: Path) -> None:
    archive = bytearray(tar(PACKETS))
    second_header = archive.index(PACKETS[1][0].encode())
    archive[second_header + 148] ^= 0xFF  # the header's checksum
    path = save(tmp_path, "night.tar", bytes(archive))
    assert read(path) == [(f"{path}::{PACKETS[0][0]}", PACKETS[0][1]), (str(path), b"")]


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE, layout: int = tarfile.GNU_FORMAT) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(layout)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % tarfile.BLOCKSIZE)


def attributes(*records: bytes, kind: bytes = tarfile.XHDTYPE) -> bytes:
    """Return a pax header. A record has 4 bytes besides its content: two digits of length, a blank and a newline."""
    body = b"".join(b"%d %s\n" % (len(record) + 4, record) for record in records)
    return header("attributes", len(body), kind) + padded(body)


PLAIN = header(PACKETS[0][0], len(PACKETS[0][1])) + padded(PACKETS[0][1])
ASTRAY = {
    "size below 0": attributes(b"size=-1") + PLAIN,
    "size that leads back": attributes(b"size=-1536") + PLAIN,
    "size that leads back in what is no file": attributes(b"size=-1536") + header("odd", 0, b"Z") + PLAIN,
    "size of all that follow": attributes(b"size=-1", kind=tarfile.XGLTYPE) + PLAIN,
    "size beyond any file": attributes(b"size=" + b"9" * 30) + PLAIN,
    "attributes of attributes": attributes(b"path=name") * 2000 + PLAIN,
    "names of names": (header("name", 5, tarfile.GNUTYPE_LONGNAME) + padded(b"name")) * 2000 + PLAIN,
    "holes that are no numbers": attributes(b"GNU.sparse.map=0,x") + PLAIN,
    "holes without a map": attributes(b"GNU.sparse.major=1", b"GNU.sparse.minor=0") + PLAIN,
}


@pytest.mark.parametrize("compress", [gzip.compress, bytes], ids=["tar.gz", "tar"])
@pytest.mark.parametrize("astray", ASTRAY)
def test_malicious_headers_are_reported_as_damage(tmp_path: Path, astray: str, compress: type[bytes]) -> None:
    path = save(tmp_path, "night.tar", compress(PLAIN + ASTRAY[astray] + PLAIN + bytes(1024)))
    assert read(path) == [(f"{path}::{PACKETS[0][0]}", PACKETS[0][1]), (str(path), b"")]


def test_sparse_members_are_not_read(tmp_path: Path) -> None:
    stored = padded(bytes(700))
    members = [
        attributes(b"GNU.sparse.size=9000", b"GNU.sparse.map=0,500,800,200") + header("pax", 700) + stored,
        header("old", 700, tarfile.GNUTYPE_SPARSE) + stored,
        PLAIN,
    ]
    path = save(tmp_path, "night.tar", b"".join(members) + bytes(1024))
    assert read(path) == [(f"{path}::pax", b""), (f"{path}::old", b""), (f"{path}::{PACKETS[0][0]}", PACKETS[0][1])]


def edited(member: bytes, edits: list[tuple[int, int]]) -> bytes:
    """Return a member's header with changed bytes and the correct checksum for them."""
    block = bytearray(member)
    for at, value in edits:
        block[at] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def as_tarfile_reads(archive: bytes) -> list[tuple[str, bytes]]:
    members = []
    try:
        with tarfile.open(fileobj=io.BytesIO(archive), errors="replace") as opened:
            for member in opened:
                data = archive[member.offset_data : member.offset_data + member.size]
                if member.isfile():
                    members.append((member.name.lstrip("/"), b"" if member.issparse() else data))
    except tarfile.ReadError:  # the archive ends early
        pass
    return members


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["a", "night/a.avro", "/a", "a/", "x" * 100, f"{'d' * 60}/{'x' * 60}", "\xe9"]),
    layout=st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    edits=st.lists(st.tuples(st.integers(0, 511), st.sampled_from(b"\0 /0178xS\xe9")), max_size=3),
)
def test_headers_are_read_as_tarfile_reads_them(
    tmp_path: Path, name: str, layout: int, edits: list[tuple[int, int]]
) -> None:
    headers = header(name, 700, layout=layout)
    last = edited(headers[-tarfile.BLOCKSIZE :], edits)
    archive = PLAIN + headers[: -tarfile.BLOCKSIZE] + last + padded(b"x" * 700) + PLAIN + bytes(1024)
    expected = as_tarfile_reads(archive)
    packets = [(p.position.member, p.data) for p in read_packets([save(tmp_path, "night.tar", archive)])]
    assert packets[: len(expected)] == expected
    assert packets[len(expected) :] in ([], [("", b"")])


def test_damaged_parquet_ends_with_a_packet_that_cannot_be_decoded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = save(tmp_path, "alerts.parquet", parquet([7, 8])[:-30])
    assert read(path) == [(str(path), b"")]
    assert f"{path}: damaged Parquet" in caplog.text


def test_wanted_columns_that_cannot_be_read_are_logged_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wait = pa.array([1, 2], pa.duration("us"))
    source = pa.StructArray.from_arrays(
        [wait, wait, pa.array([1, 2])], ["psfFlux", "timeProcessedMjdTai", "diaSourceId"]
    )
    for name in ("a", "b"):
        pq.write_table(pa.table({"diaSource": source, "observation_reason": wait}), tmp_path / name)
    assert len(read(tmp_path)) == 4
    assert not caplog.records
    wanted = Decoder(open_registry(None), columns=["psfFlux"]).fields
    assert len(list(read_packets([tmp_path], wanted=wanted))) == 4
    [line] = caplog.messages
    assert "diaSource.psfFlux (duration[us])" in line
    assert "Processed" not in line


FUZZED = {
    "tar": tar(PACKETS[:3]),
    "tar.gz": gzip.compress(tar(PACKETS[:3])),
    "tar.xz": lzma.compress(tar(PACKETS[:3])),
    "tar.bz2": bz2.compress(tar(PACKETS[:3])),
    "tar.zst": zstd(tar(PACKETS[:3])),
    "tar.lz4": lz4(tar(PACKETS[:3])),
    "tar in tar": tar([("inner", tar([("a" * 200, PACKETS[0][1]), PACKETS[1]]))]),
    "container": container(*range(30), block_bytes=20_000),
    "parquet": parquet([7, 8]),
}


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    archive=st.sampled_from(sorted(FUZZED)),
    edits=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=5),
    header_edits=st.lists(st.tuples(st.integers(0, 600), st.integers(0, 255)), max_size=3),
    kept=st.one_of(st.just(1.0), st.floats(0, 1)),
)
def test_damage_gives_a_packet_and_never_an_exception(
    tmp_path: Path, archive: str, edits: list[tuple[float, int]], header_edits: list[tuple[int, int]], kept: float
) -> None:
    damaged = bytearray(FUZZED[archive])
    for at, value in edits:
        damaged[int(at * len(damaged))] = value
    for at, value in header_edits:
        damaged[at % len(damaged)] = value
    del damaged[int(kept * len(damaged)) :]
    path = save(tmp_path, "damaged", bytes(damaged))
    packets = read(path, max_packet_bytes=50_000)
    assert packets
    batches = read_packets([path], max_packet_bytes=50_000).batches(9)
    positions = [str(packet.position) for batch in batches for packet in batch]
    assert positions == [position for position, _ in packets] or archive == "parquet"
    assert positions


def test_nesting_is_limited(tmp_path: Path) -> None:
    bomb = PACKETS[0][1]
    for _ in range(MAX_DEPTH + 1):
        bomb = gzip.compress(bomb)
    ((_, data),) = read(save(tmp_path, "bomb", bomb))
    assert gzip.decompress(data) == PACKETS[0][1]


def test_memory_does_not_grow_with_the_number_of_packets(tmp_path: Path) -> None:
    path = save(tmp_path, "night.tar.gz", gzip.compress(tar((f"{i}.avro", b"\x00" * 700) for i in range(10_000)), 1))
    packets = read_packets([path])
    for _ in range(1000):
        next(packets)
    tracemalloc.start()
    try:
        for _ in packets:
            pass
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


def test_fraction_read_grows_from_0_to_1(tmp_path: Path) -> None:
    folder = tmp_path / "nights"
    for night in ("1.tar", "2.tar.gz"):
        content = tar((f"{i}.avro", random.Random(i).randbytes(20_000)) for i in range(100))
        save(folder, night, gzip.compress(content) if night.endswith("gz") else content)
    packets = read_packets([folder])
    shares = [packets.share_read() for _ in packets]
    assert len(shares) == 200
    assert shares == sorted(shares)
    assert shares[0] < 0.2
    assert 0.4 < shares[100] < 0.7
    assert packets.share_read() == 1.0


def test_fraction_read_of_a_pipe_is_unknown(tmp_path: Path) -> None:
    pipe = tmp_path / "night"
    os.mkfifo(pipe)
    assert read_packets([pipe]).share_read() is None


def test_missing_input_is_named_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no-such-night"):
        read_packets([save(tmp_path, "there", b""), tmp_path / "no-such-night.tar.gz"])


def test_names_that_are_not_unicode_are_replaced_in_positions(tmp_path: Path) -> None:
    path = Path(str(tmp_path), "night-\udcff")
    path.write_bytes(b"")
    ((position, _),) = read(path)
    assert position.encode() == f"{tmp_path}/night-?".encode()
