"""Each Parquet row becomes a container with the values of the row, which decodes as the packet does."""

from __future__ import annotations

import datetime
import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fastavro
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from broker_filter.bench.rows import PRIMITIVES, arrow_type
from broker_filter.packets.decode import Decoder
from broker_filter.packets.framing.parquet import (
    ALWAYS_ALLOWED_BYTES,
    LEAST_ROW_BYTES,
    MOST_BATCH_BYTES,
    MOST_ROWS,
    ROWS_AT_A_TIME,
    ParquetError,
    Rows,
)
from broker_filter.packets.packet import FilePosition, Packet
from broker_filter.packets.schemas.registry import open_registry


def rows_of(table: pa.Table, **options: Any) -> list[dict[str, Any]]:
    file = io.BytesIO()
    pq.write_table(table, file, **options)
    return [record(container) for container in Rows(file)]


def record(container: bytes) -> dict[str, Any]:
    (only,) = fastavro.reader(io.BytesIO(container))
    return only


def same(a: Any, b: Any) -> bool:
    """Return whether two values are equal; NaN equals NaN."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b))


def test_records_hold_every_value_of_the_shared_lsst_rows(shared_data: Path) -> None:
    paths = sorted((shared_data / "lsst" / "parquet").glob("*.parquet"))
    for path in paths:
        with path.open("rb") as file:
            records = [record(container) for container in Rows(file)]
        assert same(records, pq.read_table(path).to_pylist(maps_as_pydicts="strict"))
    assert len(paths) == 4


def test_lsst_rows_decode_to_their_own_values(shared_data: Path) -> None:
    paths = sorted((shared_data / "lsst" / "parquet").glob("*.parquet"))
    packets = []
    for path in paths:
        with path.open("rb") as file:
            packets += [Packet(data, FilePosition(str(path), record=row)) for row, data in enumerate(Rows(file))]
    alerts, rejects = Decoder(open_registry(None)).decode(packets)
    assert not rejects
    rows = pq.ParquetDataset(paths).read(["diaSource"]).to_pylist()
    sources = [row["diaSource"] for row in rows]
    assert alerts.alert_id.tolist() == [source["diaSourceId"] for source in sources]
    np.testing.assert_array_equal(alerts.mjd, [source["midpointMjdTai"] for source in sources])
    np.testing.assert_array_equal(alerts.column("psfFlux"), [source["psfFlux"] for source in sources])


def test_ztf_rows_in_fink_s_layout_decode_to_the_values_of_the_packets(ztf_packets: list[tuple[int, bytes]]) -> None:
    schema = fastavro.reader(io.BytesIO(ztf_packets[0][1])).writer_schema
    packets = [data for _, data in ztf_packets[:200] if fastavro.reader(io.BytesIO(data)).writer_schema == schema]
    table = pa.Table.from_pylist(
        [record(packet) for packet in packets], schema=pa.schema(arrow_type(schema, {**PRIMITIVES}).fields)
    )
    file = io.BytesIO()
    pq.write_table(table, file)
    decoder = Decoder(open_registry(None))
    expected, _ = decoder.decode([Packet(data, FilePosition(str(i))) for i, data in enumerate(packets)])
    alerts, rejects = decoder.decode([Packet(data, FilePosition(str(i))) for i, data in enumerate(Rows(file))])
    assert not rejects
    assert len(alerts) == len(expected) == len(packets) > 1
    assert alerts.alert_id.tolist() == expected.alert_id.tolist()
    assert list(alerts.object_id) == list(expected.object_id)
    np.testing.assert_array_equal(alerts.cutouts.view(np.uint32), expected.cutouts.view(np.uint32))
    np.testing.assert_array_equal(alerts.metadata, expected.metadata)
    np.testing.assert_array_equal(alerts.light_curves.flux, expected.light_curves.flux)


def test_arrow_types_have_avro_counterparts() -> None:
    utc = datetime.datetime(2026, 2, 25, 3, 4, 5, 678901, datetime.UTC)
    row = {
        "flag": True,
        "small": -3,
        "id": 2**62 + 1,
        "flux": 1.5,
        "mjd": 61000.123456789,
        "band": "r",
        "stamp": b"\x00\xff",
        "at": utc,
        "at_local": utc.replace(tzinfo=None),
        "night": utc.date(),
        "history": [{"mjd": 1.0, "band": None}, None],
        "scores": {"real": 0.5},
        "nothing": None,
    }
    schema = pa.schema(
        {
            "flag": pa.bool_(),
            "small": pa.int8(),
            "id": pa.uint64(),
            "flux": pa.float32(),
            "mjd": pa.float64(),
            "band": pa.dictionary(pa.int8(), pa.string()),
            "stamp": pa.large_binary(),
            "at": pa.timestamp("us", "UTC"),
            "at_local": pa.timestamp("us"),
            "night": pa.date32(),
            "history": pa.list_(pa.struct({"mjd": pa.float64(), "band": pa.string()})),
            "scores": pa.map_(pa.string(), pa.float64()),
            "nothing": pa.string(),
        }
    )
    assert rows_of(pa.Table.from_pylist([row], schema=schema)) == [row]


@pytest.mark.parametrize(
    ("kind", "value", "read"),
    [
        (pa.string_view(), "ZTF26a", "ZTF26a"),
        (pa.binary_view(), b"\x00\xff", b"\x00\xff"),
        (pa.list_view(pa.float32()), [1.0, None], [1.0, None]),
        (pa.large_list_view(pa.string_view()), ["a"], ["a"]),
        (pa.list_(pa.float64(), 3), [1.0, 2.0, 3.0], [1.0, 2.0, 3.0]),
        (pa.list_view(pa.struct({"band": pa.string()})), [{"band": "r"}], [{"band": "r"}]),
        (pa.binary(4), b"abcd", b"abcd"),
        (pa.dictionary(pa.int32(), pa.string()), "r", "r"),
        (pa.list_(pa.dictionary(pa.int8(), pa.string())), ["g", "r"], ["g", "r"]),
        (pa.map_(pa.large_string(), pa.float64()), {"real": 0.5}, {"real": 0.5}),
        (pa.null(), None, None),
        (pa.list_(pa.null()), [None, None], [None, None]),
        (pa.struct({"ssnamenr": pa.null(), "fid": pa.int8()}), {"fid": 1}, {"ssnamenr": None, "fid": 1}),
    ],
    ids=str,
)
def test_types_of_other_writers_are_read(kind: pa.DataType, value: Any, read: Any) -> None:
    schema = pa.schema({"id": pa.int64(), "x": kind})
    table = pa.Table.from_pylist([{"id": 1, "x": value}, {"id": 2, "x": None}], schema=schema)
    assert rows_of(table) == [{"id": 1, "x": read}, {"id": 2, "x": None}]


def test_columns_that_avro_cannot_express_are_left_out_and_reported(caplog: pytest.LogCaptureFixture) -> None:
    table = pa.table({"candid": [1], "i:mag": [2.0], "wait": pa.array([1], pa.duration("us"))})
    table = table.append_column(
        "candidate", pa.array([{"fid": 1, "at": 1}], pa.struct({"fid": pa.int8(), "at": pa.time64("us")}))
    )
    file = io.BytesIO()
    pq.write_table(table, file)
    rows = Rows(file)
    assert [record(container) for container in rows] == [{"candid": 1, "candidate": {"fid": 1}}]
    assert {path: str(kind) for path, kind in rows.left_out.items()} == {
        "i:mag": "double",
        "wait": "duration[us]",
        "candidate.at": "time64[us]",
    }
    assert not caplog.records


@pytest.mark.parametrize("view", [pa.string_view(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())], ids=str)
def test_ztf_alerts_decode_equally_for_all_arrow_types_of_text(
    ztf_packets: list[tuple[int, bytes]], view: pa.DataType
) -> None:
    schema = fastavro.reader(io.BytesIO(ztf_packets[0][1])).writer_schema
    named = {**PRIMITIVES, "string": view, "bytes": pa.binary_view() if view == pa.string_view() else pa.large_binary()}
    table = pa.Table.from_pylist([record(ztf_packets[0][1])], schema=pa.schema(arrow_type(schema, named).fields))
    file = io.BytesIO()
    pq.write_table(table, file)
    decoder = Decoder(open_registry(None))
    expected, _ = decoder.decode([Packet(ztf_packets[0][1], FilePosition("avro"))])
    alerts, rejects = decoder.decode([Packet(data, FilePosition("parquet")) for data in Rows(file)])
    assert not rejects
    assert list(alerts.object_id) == list(expected.object_id)
    np.testing.assert_array_equal(alerts.cutouts.view(np.uint32), expected.cutouts.view(np.uint32))
    np.testing.assert_array_equal(alerts.metadata, expected.metadata)


def test_rows_keep_their_order_across_row_groups() -> None:
    n = 3 * ROWS_AT_A_TIME + 1
    assert [row["candid"] for row in rows_of(pa.table({"candid": range(n)}), row_group_size=20)] == list(range(n))


@pytest.mark.parametrize("damaged", [b"PAR1", b"PAR1 but nothing more PAR1", b""])
def test_damaged_file_raises_parquet_error(damaged: bytes) -> None:
    with pytest.raises(ParquetError):
        list(Rows(io.BytesIO(damaged)))


@pytest.mark.parametrize("as_columns", [False, True], ids=["packets", "columns"])
def test_a_small_file_that_expands_to_gigabytes_is_read_up_to_the_limit(as_columns: bool) -> None:
    file = io.BytesIO()
    same = pa.DictionaryArray.from_arrays(pa.array(np.zeros(200_000, np.int32)), pa.array(["x" * 100_000]))
    pq.write_table(pa.table({"text": same}), file, compression="zstd")
    assert file.tell() < 20_000
    sizes = []
    with pytest.raises(ParquetError, match="more than"):
        sizes.extend(sizes_of(file, as_columns))
    assert 0 < max(sizes) < (MOST_ROWS if as_columns else 1) * 101_000
    assert sum(sizes) <= ALWAYS_ALLOWED_BYTES


def sizes_of(file: io.BytesIO, as_columns: bool) -> Iterator[int]:
    """Yield the size of each packet, or of each batch of columns, in bytes."""
    rows = Rows(file)
    if as_columns:
        yield from (batch.nbytes for batch, _ in rows.batches(()))
    else:
        yield from map(len, rows)


class CountingFile(io.BytesIO):
    """A file that counts the bytes that were read."""

    n_read = 0

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self.n_read += len(data)
        return data


def test_a_large_row_group_is_read_piece_by_piece() -> None:
    file = CountingFile()
    stamps = np.random.default_rng(0).bytes(16_000 * 2_000)
    table = pa.table({"stamp": [stamps[i : i + 16_000] for i in range(0, len(stamps), 16_000)]})
    pq.write_table(table, file, row_group_size=len(table), use_dictionary=False, write_batch_size=16)
    for first in (lambda rows: next(iter(rows)), lambda rows: next(rows.batches(()))):
        file.n_read = 0
        first(Rows(file))
        assert 0 < file.n_read < 6_000_000 < len(file.getvalue())


def test_batches_of_columns_are_small_if_repeated_values_are_large() -> None:
    file = io.BytesIO()
    same = pa.DictionaryArray.from_arrays(pa.array(np.zeros(200, np.int32)), pa.array([b"x" * (60 << 20)]))
    pq.write_table(pa.table({"stamp": same}), file, compression="zstd", write_statistics=False)
    assert Rows(file)._rows_of(["stamp"]) == MOST_BATCH_BYTES // (60 << 20)
    assert Rows(file)._rows_of(["other"]) == MOST_ROWS


def test_a_row_that_claims_more_values_than_fit_into_memory_is_not_read() -> None:
    values = pa.ListArray.from_arrays(pa.array([0, 20_000_000], pa.int32()), pa.nulls(20_000_000, pa.bool_()))
    file = io.BytesIO()
    pq.write_table(pa.table({"many": values}), file, compression="zstd")
    assert file.tell() < 50_000
    with pytest.raises(ParquetError, match="many"):
        Rows(file)


def test_tiny_rows_are_read_up_to_the_limit() -> None:
    file = io.BytesIO()
    pq.write_table(pa.table({"same": np.zeros(100_000, np.int8)}), file, compression="zstd")
    assert file.tell() < 5_000
    rows: list[int] = []
    with pytest.raises(ParquetError, match="more than"):
        rows.extend(len(container) for container in Rows(file))
    assert len(rows) == ALWAYS_ALLOWED_BYTES // LEAST_ROW_BYTES
    rows = []
    with pytest.raises(ParquetError, match="more than"):
        rows.extend(len(batch) for batch, _ in Rows(file).batches(()))
    assert sum(rows) == ALWAYS_ALLOWED_BYTES // LEAST_ROW_BYTES // MOST_ROWS * MOST_ROWS
