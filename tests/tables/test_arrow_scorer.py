"""ArrowScorer gives one row for each row of a table, with the scores that `score_archive` gives."""

from __future__ import annotations

import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from broker_filter import ArrowScorer, BrokerFilterError, score_archive
from broker_filter.simulate import SCHEMAS, simulate_night


@pytest.fixture(scope="module")
def packets() -> list[bytes]:
    """Six simulated ZTF packets."""
    return [alert.packet for alert in simulate_night(6, seed=3)]


@pytest.fixture(scope="module")
def expected(packets: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    """The rows that `score_archive` gives for `packets`."""
    folder = tmp_path_factory.mktemp("night")
    for i, packet in enumerate(packets):
        (folder / f"{i}.avro").write_bytes(packet)
    return score_archive(folder).read_all()


def scores(table: pa.Table) -> pa.Table:
    """Return a table without the column `source`, which names the file or the row."""
    return table.drop_columns(["source"])


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view()], ids=str)
@pytest.mark.parametrize("name", ["packet", "value", "alert"])
def test_packets_get_the_scores_of_score_archive(
    packets: list[bytes], expected: pa.Table, kind: pa.DataType, name: str
) -> None:
    table = pa.table({"id": range(len(packets)), name: pa.array(packets, kind)})
    assert scores(ArrowScorer()(table)).equals(scores(expected))


def test_a_record_batch_and_a_table_in_chunks_give_the_same(packets: list[bytes], expected: pa.Table) -> None:
    scorer = ArrowScorer("default")
    batch = pa.record_batch({"packet": packets})
    assert scores(scorer(batch)).equals(scores(expected))
    chunked = pa.Table.from_batches([batch.slice(0, 1), batch.slice(1, 0), batch.slice(1)])
    assert scores(scorer(chunked)).equals(scores(expected))
    assert scorer(chunked.slice(0, 0)).num_rows == 0


def test_bad_packets_are_rows_with_a_reason_at_their_place(packets: list[bytes]) -> None:
    several = pa.table({"packet": [packets[0], None, b"no alert", packets[1][:-900], packets[1]]})
    result = ArrowScorer()(several)
    assert result["reject_reason"].to_pylist() == [None, "empty", "not_avro", "truncated", None]
    assert result["source"].to_pylist() == ["<memory>", *(f"<memory>#{i}" for i in range(1, 5))]
    assert result["default__real"].is_null().to_pylist() == [False, True, True, True, False]


def test_a_packet_of_several_alerts_is_one_rejected_row(packets: list[bytes]) -> None:
    from broker_filter.packets.framing import ocf

    container = ocf.read_container(packets[0], 1 << 24)
    (block,) = container.blocks
    header = packets[0][: packets[0].index(bytes(block.body)[:64])]
    sync = packets[0][-16:]
    end_of_header = header.rindex(sync) + 16
    twice = packets[0][:end_of_header] + ocf.encode_block(2, bytes(block.body) * 2, sync)
    result = ArrowScorer()(pa.table({"packet": [packets[0], twice, packets[1]]}))
    assert result["reject_reason"].to_pylist() == [None, "too_large", None]
    assert "holds 2 alerts" in result["reject_detail"][1].as_py()


def test_columns_are_copied_and_the_schema_is_known_before(packets: list[bytes]) -> None:
    table = pa.table({"packet": packets, "night": pa.array([1, 2, 3, 4, 5, None], pa.int16()), "x": ["a"] * 6})
    scorer = ArrowScorer(["default", "embedder"], columns=["x", "night"])
    result = scorer(table)
    assert result.schema == scorer.schema_of(table.schema)
    assert result.schema.names == [*scorer.schema.names, "x", "night"]
    assert result["night"].to_pylist() == [1, 2, 3, 4, 5, None]
    assert result["embedder__embedding"].null_count == 0


def test_a_copy_by_pickle_shares_the_models_of_the_process(packets: list[bytes], expected: pa.Table) -> None:
    from broker_filter.tables import arrow_scorer

    scorer = ArrowScorer([Path("default")], also=["lsst"])
    data = pickle.dumps(scorer)
    assert len(data) < 500
    copies = [pickle.loads(data) for _ in range(3)]
    table = pa.table({"packet": packets})
    before = arrow_scorer._open.cache_info().misses
    assert all(scores(copy(table)).equals(scores(expected)) for copy in [scorer, *copies])
    assert arrow_scorer._open.cache_info().misses == before + 1


def test_wire_format_needs_a_registry() -> None:
    table = pa.table({"value": [alert.packet for alert in simulate_night(2, seed=2, survey="lsst")]})
    assert ArrowScorer(schema_registry=SCHEMAS)(table)["status"].to_pylist() == ["scored"] * 2
    assert ArrowScorer()(table)["reject_reason"].to_pylist() == ["unknown_schema_id"] * 2


def test_fink_columns_of_lsst_get_the_scores_of_score_archive(shared_data: Path) -> None:
    paths = sorted((shared_data / "lsst" / "parquet").glob("*.parquet"))
    table = pq.ParquetDataset(paths).read()
    result = ArrowScorer()(table)
    assert scores(result).equals(scores(score_archive(paths).read_all()))
    assert result["status"].to_pylist() == ["scored"] * table.num_rows


@pytest.mark.parametrize(
    "columns",
    [
        {"diaSourceId": [7], "ra": [10.0], "dec": [-5.0], "midpointMjdTai": [61000.0], "psfFlux": [800.0]},
        {"diaSourceId": [7], "ra": [10.0], "dec": [-5.0], "visit": [3]},
        {"diaObjectId": [7], "ra": [10.0], "dec": [-5.0], "diaSource": [[{"psfFlux": 3.0}]]},
        {"diaObjectId": [7], "ra": [10.0], "dec": [-5.0], "diaSource": [{"psfFlux": [3.0], "band": ["r"]}]},
    ],
    ids=["sources", "sources without a time", "objects of lists", "objects of structs"],
)
def test_catalogues_have_no_cutouts_so_each_row_has_a_reason(columns: dict[str, list[object]]) -> None:
    result = ArrowScorer()(pa.table({"_healpix_29": [1], **columns}))
    assert result["status"].to_pylist() == ["rejected"]
    assert result["reject_reason"][0].as_py() in ("missing_cutout", "missing_field")
    assert result["default__real"].to_pylist() == [None]


def test_a_source_of_a_catalogue_keeps_its_id_and_position() -> None:
    columns = {"diaSourceId": [7], "ra": [10.0], "dec": [-5.0], "midpointMjdTai": [61000.0], "psfFlux": [800.0]}
    (row,) = ArrowScorer()(pa.table(columns)).to_pylist()
    assert (row["alert_id"], row["survey"], row["mjd"], row["ra"], row["dec"]) == (7, "lsst", 61000.0, 10.0, -5.0)
    assert row["reject_reason"] == "missing_cutout"


def test_unusable_columns_are_one_error(packets: list[bytes]) -> None:
    with pytest.raises(BrokerFilterError, match="neither a column of packets"):
        ArrowScorer()(pa.table({"x": [1], "text": ["a"]}))
    with pytest.raises(BrokerFilterError, match="'night', but the table has the columns packet"):
        ArrowScorer(columns=["night"])(pa.table({"packet": packets}))
    with pytest.raises(BrokerFilterError, match="also a column of the result"):
        ArrowScorer(columns="mjd")(pa.table({"packet": packets, "mjd": [1.0] * 6}))
    with pytest.raises(BrokerFilterError, match="defualt"):
        ArrowScorer("defualt")(pa.table({"packet": packets}))
