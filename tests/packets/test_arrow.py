"""Rows of a table give the alerts and the rejects that they give as Avro packets, bit for bit."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import fastavro
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from broker_filter.bench.rows import PRIMITIVES, arrow_type
from broker_filter.packets.alert_rows import AlertRows
from broker_filter.packets.batch import AlertBatch, LightCurves
from broker_filter.packets.decode import MAX_POINTS, Decoder
from broker_filter.packets.framing.parquet import MOST_ROWS, AvroRows, Rows
from broker_filter.packets.packet import FilePosition, Packet
from broker_filter.packets.rejects import Reject
from broker_filter.packets.surveys import DEFAULT_COLUMNS, DESIGNATION
from broker_filter.simulate import simulate_night

COLUMNS = ("survey", "alert_id", "mjd", "ra", "dec", "band", "cutouts", "cutout_box", "metadata", "packet_index")
PLANES = ("variance", "psf", "usable_planes")
TEXTS = ("object_id", "schema_version")
CURVES = ("offsets", "mjd", "band", "flux", "flux_err", "kind")
POSITION = FilePosition("night.parquet")
EVERYTHING = (*DEFAULT_COLUMNS, DESIGNATION.name)
Decoded = tuple[AlertBatch, list[Reject]]
SLICES = 4
"""The parts into which the shared alerts are divided, so that each test is short."""


def rows_of(table: pa.Table) -> AlertRows:
    (batch,) = table.combine_chunks().to_batches()
    return AlertRows(batch, AvroRows(table.schema).schema, POSITION)


def packets_of(rows: AlertRows) -> list[Packet]:
    avro = AvroRows(rows.batch.schema)
    containers = avro.containers(rows.batch.select(avro.columns))
    return [Packet(data, FilePosition(POSITION.path, record=i)) for i, data in enumerate(containers)]


def assert_same(found: Decoded, expected: Decoded, *, rejects_too: bool = True) -> None:
    (alerts, rejects), (same, same_rejects) = found, expected
    for name in (*COLUMNS, *PLANES):
        a, b = getattr(alerts, name), getattr(same, name)
        if b is None:
            assert a is None
        else:
            assert (a.dtype, a.shape) == (b.dtype, b.shape), name
            assert a.tobytes() == b.tobytes(), name
    for name in TEXTS:
        assert list(getattr(alerts, name)) == list(getattr(same, name))
    for name in CURVES:
        assert getattr(alerts.light_curves, name).tobytes() == getattr(same.light_curves, name).tobytes(), name
    assert alerts.reliability_version == same.reliability_version
    assert alerts.designation == same.designation
    if rejects_too:
        assert list(map(described, rejects)) == list(map(described, same_rejects))


def described(reject: Reject) -> tuple[object, ...]:
    return (
        str(reject.packet.position),
        reject.packet_index,
        reject.reason,
        reject.detail,
        repr(reject.alert),
        reject.schema,
    )


def decoded_both_ways(table: pa.Table) -> Decoded:
    """Return the alerts and rejects of a table; assert that its rows as Avro packets give the same."""
    decoder = Decoder(columns=EVERYTHING, planes=("variance", "psf"))
    rows = rows_of(table)
    found = decoder.decode(rows)
    assert_same(found, decoder.decode(packets_of(rows)))
    return found


@pytest.mark.parametrize("part", range(SLICES))
def test_every_shared_row_of_lsst(shared_data: Path, part: int) -> None:
    paths = [*(shared_data / "lsst" / "parquet").glob("*"), *(shared_data / "lsst" / "more" / "parquet").glob("*")]
    n = 0
    for path in sorted(paths)[part::SLICES]:
        alerts, rejects = decoded_both_ways(pq.read_table(path))
        n += len(alerts) + len(rejects)
    assert n > 10


def tables_of(packets: Sequence[bytes]) -> Iterator[tuple[pa.Table, list[bytes]]]:
    """Yield the packets of each schema as a table; schemas that `arrow_type` cannot express are left out."""
    of_schema: dict[str, tuple[Any, list[bytes], list[Any]]] = {}
    for data in packets:
        reader = fastavro.reader(io.BytesIO(data))
        _, same, records = of_schema.setdefault(repr(reader.writer_schema), (reader.writer_schema, [], []))
        same.append(data)
        records.append(next(reader))
    for schema, same, records in of_schema.values():
        try:
            table = pa.Table.from_pylist(records, schema=pa.schema(arrow_type(schema, {**PRIMITIVES}).fields))
        except (KeyError, ValueError, pa.ArrowInvalid):
            continue
        yield table, same


@pytest.mark.parametrize("part", range(SLICES))
def test_every_shared_packet_of_ztf_as_a_row(ztf_packets: list[tuple[int, bytes]], part: int) -> None:
    decoder = Decoder(columns=EVERYTHING)
    n = named = 0
    for table, packets in tables_of([data for _, data in ztf_packets[part::SLICES]]):
        expected = decoder.decode([Packet(data) for data in packets])
        assert_same(decoder.decode(rows_of(table)), expected, rejects_too=False)
        n += len(packets)
        named += sum(designation is not None for designation in expected[0].designation or ())
    assert n > 300
    assert named > 30


@pytest.fixture(scope="module")
def ztf() -> pa.Table:
    """Six simulated alerts of ZTF as a table."""
    ((table, _),) = tables_of([alert.packet for alert in simulate_night(6, seed=5)])
    return table


def with_column(table: pa.Table, name: str, column: pa.Array) -> pa.Table:
    return table.set_column(table.schema.names.index(name), name, column)


def with_field(table: pa.Table, record: str, name: str, values: pa.Array) -> pa.Table:
    """Return the table with another column in the place of the field `name` of `record`."""
    old = table[record].combine_chunks()
    fields = {field.name: pc.struct_field(old, [i]) for i, field in enumerate(old.type)} | {name: values}
    return with_column(table, record, pa.StructArray.from_arrays(list(fields.values()), list(fields)))


def test_nulls_in_every_column(ztf: pa.Table) -> None:
    n = ztf.num_rows
    for name in ztf.schema.names:
        mask = pa.array([i % 2 == 1 for i in range(n)])
        column = ztf[name].combine_chunks()
        alerts, rejects = decoded_both_ways(
            with_column(ztf, name, column.take(pa.array(range(n), mask=np.array(mask))))
        )
        assert len(alerts) + len(rejects) == n
    nothing = pa.table({name: pa.nulls(n, ztf.schema.field(name).type) for name in ztf.schema.names})
    alerts, rejects = decoded_both_ways(nothing)
    assert (len(alerts), {reject.reason for reject in rejects}) == (0, {"missing_field"})


def test_nulls_in_every_field_of_a_record(ztf: pa.Table) -> None:
    candidate = ztf["candidate"][0].as_py()
    candidates = [candidate | {name: None} for name in candidate]
    rows = pa.concat_tables([ztf.slice(0, 1)] * len(candidates))
    kind = ztf.schema.field("candidate").type
    alerts, rejects = decoded_both_ways(with_column(rows, "candidate", pa.array(candidates, kind)))
    assert len(alerts) + len(rejects) == len(candidates) > 100
    assert 0 < len(rejects) < 10


@pytest.mark.parametrize(
    "values",
    [
        [1.5] * 6,
        ["x"] * 6,
        [b"SIMPLE"] * 6,
        [[1]] * 6,
        [{"a": 1}] * 6,
        [True] * 6,
        [None] * 6,
    ],
    ids=["floats", "texts", "bytes", "lists", "structs", "booleans", "nulls"],
)
@pytest.mark.parametrize(
    "name", ["objectId", "candid", "schemavsn", "prv_candidates", "fp_hists", "cutoutScience", "candidate"]
)
def test_wrong_types(ztf: pa.Table, name: str, values: list[Any]) -> None:
    wrong = with_column(ztf, name, pa.array(values))
    if name == "candidate":  # then it is no alert of ZTF
        alerts, rejects = Decoder().decode(rows_of(wrong))
        assert (len(alerts), {reject.reason for reject in rejects}) == (0, {"unknown_survey"})
        return
    alerts, rejects = decoded_both_ways(wrong)
    assert len(alerts) + len(rejects) == ztf.num_rows


@pytest.mark.parametrize("key", ["diaSourceId", "diaObjectId"])
def test_rows_of_an_lsst_catalogue_are_rejected_because_they_have_no_cutouts(key: str) -> None:
    table = pa.table({key: [1, 2], "ra": [1.0, 2.0], "dec": [1.0, 2.0], "psfFlux": [1.0, 2.0]})
    alerts, rejects = Decoder().decode(rows_of(table))
    assert (len(alerts), [reject.reason for reject in rejects]) == (0, ["missing_cutout"] * 2)
    assert "catalogue" in rejects[0].detail


@pytest.mark.parametrize("name", ["jd", "fid", "candid", "isdiffpos", "magpsf", "ra", "ncovhist"])
@pytest.mark.parametrize(
    "values",
    [
        pa.array(["1"] * 6),
        pa.array(["1"] * 6, pa.string_view()),
        pa.array(["1", None, "", "t", "0", "g"]).dictionary_encode(),
        pa.array([1] * 5 + [None], pa.int8()),
        pa.array([2**53 + 1] * 5 + [None], pa.int64()),
        pa.array([2**63 - 1] * 5 + [0], pa.uint64()),
        pa.array([1.5] * 5 + [None], pa.float16()),
        pa.array([True, False, None] * 2),
        pa.array([12] * 6, pa.date32()),
        pa.array([12] * 6, pa.timestamp("ms")),
        pa.array([12] * 6, pa.timestamp("ns")),
        pa.array([12] * 6, pa.time64("us")),
        pa.array([12] * 6, pa.decimal128(9, 2)),
        pa.array([[1.5]] * 6),
    ],
    ids=lambda values: str(values.type)[:30],
)
def test_types_of_a_field(ztf: pa.Table, name: str, values: pa.Array) -> None:
    alerts, rejects = decoded_both_ways(with_field(ztf, "candidate", name, values))
    assert len(alerts) + len(rejects) == ztf.num_rows


@pytest.mark.parametrize(
    "as_list",
    [pa.list_, pa.large_list, pa.list_view, pa.large_list_view, lambda item: pa.list_(item, 2)],
    ids=["list", "large_list", "list_view", "large_list_view", "fixed_size_list"],
)
def test_kinds_of_lists(ztf: pa.Table, as_list: Any) -> None:
    history = [row[:2] if row and len(row) > 1 else None for row in ztf["prv_candidates"].to_pylist()]
    history[0] = [{"jd": 2460000.5, "fid": 1, "magpsf": None, "diffmaglim": 20.0}, None]
    item = ztf.schema.field("prv_candidates").type.value_type
    alerts, rejects = decoded_both_ways(with_column(ztf, "prv_candidates", pa.array(history, as_list(item))))
    assert (len(alerts), len(rejects)) == (6, 0)
    assert len(alerts.light_curves.mjd) > 6


@pytest.mark.parametrize("kind", [pa.large_binary(), pa.binary_view(), pa.dictionary(pa.int8(), pa.binary())], ids=str)
def test_kinds_of_bytes(ztf: pa.Table, kind: pa.DataType) -> None:
    stamps = pc.struct_field(ztf["cutoutScience"].combine_chunks(), ["stampData"])
    changed = with_field(ztf, "cutoutScience", "stampData", pa.array(stamps.to_pylist(), kind))
    alerts, _ = decoded_both_ways(changed)
    assert len(alerts) == 6


def test_bad_stamps_get_the_same_reasons(ztf: pa.Table) -> None:
    stamps = [b"", b"\x1f\x8b", None, b"no stamp", b"SIMPLE  = T".ljust(2880), b"\x00" * 10]
    alerts, rejects = decoded_both_ways(with_field(ztf, "cutoutTemplate", "stampData", pa.array(stamps)))
    assert len(alerts) == 0
    assert {reject.reason for reject in rejects} == {"missing_cutout", "bad_cutout"}


def test_a_slice_of_a_table_gives_its_own_rows(ztf: pa.Table) -> None:
    whole = rows_of(ztf)
    decoder = Decoder()
    alerts, _ = decoder.decode(whole[2:5])
    everything, _ = decoder.decode(whole)
    assert alerts.metadata.tobytes() == everything.metadata[2:5].tobytes()
    assert alerts.cutouts.tobytes() == everything.cutouts[2:5].tobytes()
    assert [str(packet.position) for packet in alerts.packets] == [f"night.parquet#{i}" for i in (2, 3, 4)]
    assert str(whole[0].position) == "night.parquet"
    with pytest.raises(IndexError):
        whole[6]
    with pytest.raises(ValueError, match="steps of 1"):
        whole[::2]


def as_struct_of_lists(history: pa.ChunkedArray) -> pa.StructArray:
    """Return a column of lists of structs in the layout of nested HATS catalogues."""
    lists = history.combine_chunks()
    fields = {field.name: pc.struct_field(lists.values, [i]) for i, field in enumerate(lists.type.value_type)}
    columns = [pa.ListArray.from_arrays(lists.offsets, values) for values in fields.values()]
    return pa.StructArray.from_arrays(columns, list(fields))


def test_a_history_as_a_struct_of_lists_gives_the_same_light_curve(ztf: pa.Table) -> None:
    decoder = Decoder()
    filled = with_column(
        ztf,
        "prv_candidates",
        pa.array([row or [] for row in ztf["prv_candidates"].to_pylist()], ztf.schema.field("prv_candidates").type),
    )
    nested = with_column(filled, "prv_candidates", as_struct_of_lists(filled["prv_candidates"]))
    found, expected = decoder.decode(rows_of(nested)), decoder.decode(rows_of(filled))
    assert_same(found, expected)
    assert isinstance(found[0].light_curves, LightCurves)
    assert len(found[0].light_curves.mjd) > 6


def test_lists_of_a_history_that_differ_in_length_reject_the_row(ztf: pa.Table) -> None:
    nested = pa.StructArray.from_arrays(
        [pa.array([[1.0, 2.0]] * 6), pa.array([[1.0, 2.0]] * 5 + [[1.0]])], ["jd", "magpsf"]
    )
    alerts, [reject] = Decoder().decode(rows_of(with_column(ztf, "prv_candidates", nested)))
    assert len(alerts) == 5
    assert (reject.reason, reject.packet_index) == ("corrupt", 5)
    assert reject.alert is not None
    assert reject.alert.alert_id == ztf["candid"][5].as_py()


def test_a_history_without_bound_is_rejected_before_it_is_copied(ztf: pa.Table) -> None:
    n = MAX_POINTS + 1
    items = pa.StructArray.from_arrays([pa.repeat(pa.scalar(2460000.5), n)], ["jd"])
    long = pa.ListArray.from_arrays(pa.array([0, 0, n, n, n, n, n], pa.int32()), items)
    alerts, [reject] = Decoder().decode(rows_of(with_column(ztf, "prv_candidates", long)))
    assert len(alerts) == 5
    assert (reject.reason, reject.packet_index) == ("too_large", 1)


def test_rows_that_take_much_memory_are_decoded_in_parts(ztf: pa.Table) -> None:
    n = MAX_POINTS
    items = pa.StructArray.from_arrays([pa.repeat(pa.scalar(2460000.5), n)], ["jd"])
    six = pa.ListArray.from_arrays(pa.array([i * n // 6 for i in range(7)], pa.int32()), items)
    rows = rows_of(with_column(ztf, "prv_candidates", six))
    parts = [len(alerts) for alerts, _ in Decoder().decode_batches([rows])]
    assert sum(parts) == 6
    assert len(parts) > 1


def test_a_file_is_read_in_batches_of_the_wanted_columns(ztf: pa.Table) -> None:
    file = io.BytesIO()
    table = pa.concat_tables([ztf] * 50)
    pq.write_table(table, file)
    decoder = Decoder(columns=["magpsf"])
    batches = list(Rows(file).batches(decoder.fields))
    assert [len(batch) for batch, _ in batches] == [MOST_ROWS, MOST_ROWS, 300 - 2 * MOST_ROWS]
    assert "sgscore1" not in [field.name for field in batches[0][0].schema.field("candidate").type]
    assert "publisher" not in batches[0][0].schema.names
    rows = [AlertRows(batch, schema, POSITION) for batch, schema in batches]
    ids = [alert_id for alerts, _ in decoder.decode_batches(rows) for alert_id in alerts.alert_id.tolist()]
    assert ids == table["candid"].to_pylist()
