"""The Decoder reads each real packet as fastavro and astropy do, rejects each bad one with a reason, and loses none."""

from __future__ import annotations

import gzip
import io
import json
import math
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fastavro
import numpy as np
import pytest
from astropy.io import fits
from numpy.typing import NDArray

from broker_filter.packets import decode as decode_module
from broker_filter.packets.batch import CUTOUTS, PLANES, PSF_SIZE, AlertBatch, Survey
from broker_filter.packets.decode import Decoder
from broker_filter.packets.framing import ocf, wire
from broker_filter.packets.framing.ocf import read_container
from broker_filter.packets.packet import FilePosition, Packet
from broker_filter.packets.rejects import Reject, RejectReason
from broker_filter.packets.schemas.registry import RegistryUnavailable, UnknownSchemaId, open_registry
from broker_filter.packets.schemas.writer_schema import WriterSchema
from broker_filter.packets.surveys import COLUMNS, Column, Field
from broker_filter.simulate import simulate_night
from broker_filter.streaming.archives import read_packets

pytestmark = pytest.mark.filterwarnings("ignore:Found a SIMPLE card:astropy.io.fits.verify.VerifyWarning")

FIELDS = ("cutoutScience", "cutoutTemplate", "cutoutDifference")
SIZE = 63


def packet(data: bytes, name: str = "test") -> Packet:
    return Packet(data, FilePosition(name))


def decode(*data: bytes, **options: Any) -> tuple[AlertBatch, list[Reject]]:
    return Decoder(open_registry(None), **options).decode([packet(item) for item in data])


def pixels(stamp: bytes) -> NDArray[np.float32]:
    with fits.open(io.BytesIO(gzip.decompress(stamp) if stamp[:2] == b"\x1f\x8b" else stamp)) as hdus:
        return np.asarray(hdus[0].data)


def published(column: Column, survey: Survey, record: dict[str, Any]) -> float:
    """Return the value of a column that the packet contains directly."""
    source = column.source(survey)
    assert isinstance(source, Field)
    for path in source.paths:
        outer, inner = path.split(".")
        if inner in (record.get(outer) or {}):
            value = record[outer][inner]
            return math.nan if value is None or value == source.missing else float(value)
    return math.nan


def assert_columns(alerts: AlertBatch, records: dict[int, dict[str, Any]], survey: Survey) -> None:
    """Check the columns that the survey publishes directly, and that columns without a source are NaN.

    `records`: the records as read by fastavro, by the row of the alert.
    """
    rows = list(records)
    for column in COLUMNS:
        values = alerts.column(column.name)[rows]
        if isinstance(column.source(survey), Field):
            np.testing.assert_equal(
                values, [published(column, survey, record) for record in records.values()], column.name
            )
        elif column.source(survey) is None:
            assert np.isnan(values).all()


def assert_stamps(alerts: AlertBatch, i: int, stamps: Sequence[bytes]) -> None:
    """Check that each slot holds the pixels that astropy reads, bit for bit, with zeros around them."""
    for c, stamp in enumerate(stamps):
        image = pixels(stamp)
        y, x, height, width = alerts.cutout_box[i, c].tolist()
        assert (height, width) == image.shape
        slot = alerts.cutouts[i, c].copy()
        assert slot[y : y + height, x : x + width].tobytes() == image.astype(np.float32).tobytes()
        slot[y : y + height, x : x + width] = 0
        assert not slot.any()


def assert_record(alerts: AlertBatch, i: int, record: dict[str, Any]) -> None:
    """Check that the undecoded body is that of the record, and the spans are those of its cutouts."""
    held = alerts.records[i]
    definition = fastavro.parse_schema(held.schema.definition)
    stream = io.BytesIO(held.body)
    np.testing.assert_equal(fastavro.schemaless_reader(stream, definition, None), record)
    assert stream.tell() == len(held.body)
    rest = {**held.schema.definition}
    rest["fields"] = [field for field in rest["fields"] if field["name"] not in FIELDS]
    body, at = b"", 0
    for begin, end in held.cutout_spans:
        body, at = body + bytes(held.body[at:begin]), end
    stream = io.BytesIO(body + bytes(held.body[at:]))
    without = fastavro.schemaless_reader(stream, fastavro.parse_schema(rest), None)
    np.testing.assert_equal(without, {name: value for name, value in record.items() if name not in FIELDS})
    assert not stream.read()


def test_ztf_packets_decode_to_the_values_of_fastavro_and_astropy(ztf_packets: list[tuple[int, bytes]]) -> None:
    versions: Counter[str] = Counter()
    schemas: set[WriterSchema] = set()
    for start in range(0, len(ztf_packets), 128):
        chunk = ztf_packets[start : start + 128]
        alerts, rejects = decode(*(data for _, data in chunk))
        assert not rejects
        assert len(alerts) == len(chunk)
        np.testing.assert_array_equal(alerts.packet_index, np.arange(len(chunk)))
        np.testing.assert_array_equal(alerts.alert_id, [candid for candid, _ in chunk])
        versions.update(alerts.schema_version)
        records: dict[int, dict[str, Any]] = {}
        for i, (_, data) in enumerate(chunk):
            (record,) = fastavro.reader(io.BytesIO(data))
            candidate = record["candidate"]
            identity = alerts.identity(i)
            assert identity.object_id == record["objectId"]
            assert identity.survey is Survey.ZTF
            assert identity.schema_version == record.get("schemavsn", "unversioned")
            assert identity.mjd == candidate["jd"] - 2400000.5
            assert (identity.ra, identity.dec) == (candidate["ra"], candidate["dec"])
            assert identity.band == {1: "g", 2: "r", 3: "i"}[candidate["fid"]]
            if i % 4 == 0:  # test_stamps compares all stamps
                assert_stamps(alerts, i, [record[name]["stampData"] for name in FIELDS])
            records[i] = record
            if alerts.records[i].schema not in schemas:
                schemas.add(alerts.records[i].schema)
                assert_record(alerts, i, record)
        assert_columns(alerts, records, Survey.ZTF)
    assert set(versions) == {"unversioned", "2.0", "3.0", "3.1", "3.2", "3.3", "3.5", "4.01", "4.02"}
    assert versions.total() > 1900


def lsst_records(shared_data: Path, lsst_schemas: Path) -> list[tuple[Packet, list[dict[str, Any]]]]:
    """Return all shared LSST packets with a schema, and their records as read by fastavro."""
    registry = open_registry(str(lsst_schemas))
    found = []
    for path in sorted((shared_data / "lsst").rglob("*.avro")):
        data = path.read_bytes()
        if wire.is_wire_message(data):
            message = wire.unframe(data)
            try:
                schema = registry.get(message.schema_id)
            except UnknownSchemaId:
                continue
            records = [fastavro.schemaless_reader(io.BytesIO(message.body), schema.definition, None)]
        else:
            records = list(fastavro.reader(io.BytesIO(data)))
        found.append((packet(data, str(path)), records))
    return found


def test_planes_of_shared_lsst_packets_are_those_of_astropy(shared_data: Path, lsst_schemas: Path) -> None:
    folders = [shared_data / "lsst" / name for name in ("wire", "ocf", "more/wire")]
    packets = list(read_packets(folders))
    size, shapes, seen = 102, set(), 0
    for start in range(0, len(packets), 64):
        some = packets[start : start + 64]
        alone, _ = Decoder(open_registry(str(lsst_schemas)), cutout_size=size).decode(some)
        alerts, _ = Decoder(open_registry(str(lsst_schemas)), cutout_size=size, planes=PLANES).decode(some)
        assert alone.variance is alone.psf is alone.usable_planes is None
        assert alerts.cutouts.tobytes() == alone.cutouts.tobytes()
        assert alerts.usable_planes is not None
        assert alerts.usable_planes.all()
        assert alerts.variance is not None
        assert alerts.psf is not None
        assert not any(alerts.lost_planes(plane).any() for plane in PLANES)
        for i, record in enumerate(alerts.records):
            fields = [field["name"] for field in record.schema.canonical["fields"]]
            in_order = sorted(range(3), key=lambda c: fields.index(FIELDS[c]))
            for c, (begin, end) in zip(in_order, record.cutout_spans, strict=True):
                field = bytes(record.body[begin:end])
                with fits.open(io.BytesIO(field[field.index(b"SIMPLE  =") :])) as hdus:
                    pixels, variance, psf = (np.asarray(hdu.data, np.float32) for hdu in hdus)
                y, x, height, width = alerts.cutout_box[i, c].tolist()
                inside = (i, c, slice(y, y + height), slice(x, x + width))
                assert alerts.cutouts[inside].tobytes() == pixels.tobytes()
                assert alerts.variance[inside].tobytes() == variance.tobytes()
                assert np.count_nonzero(alerts.variance[i, c]) == np.count_nonzero(variance)
                top, left = (length // 2 - PSF_SIZE // 2 for length in psf.shape)
                assert alerts.psf[i, c].tobytes() == psf[top : top + PSF_SIZE, left : left + PSF_SIZE].tobytes()
                shapes.add(psf.shape)
                seen += 1
    assert seen > 200
    assert len(shapes) > 5


def test_planes_of_ztf_are_nan(ztf_packets: list[tuple[int, bytes]]) -> None:
    alerts, _ = decode(*(data for _, data in ztf_packets[:40]), planes=PLANES)
    assert alerts.variance is not None
    assert alerts.psf is not None
    assert alerts.usable_planes is not None
    assert np.isnan(alerts.variance).all()
    assert np.isnan(alerts.psf).all()
    assert not alerts.usable_planes.any()
    assert not alerts.lost_planes("variance").any()  # ZTF publishes none


def test_an_unknown_plane_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown planes: mask; the planes are variance, psf"):
        Decoder(planes=["mask"])  # type: ignore[list-item]


def test_planes_of_a_night_without_lsst_take_no_memory() -> None:
    packets = [Packet(alert.packet, FilePosition("")) for alert in simulate_night(3, seed=1)]
    alerts, _ = Decoder(planes=PLANES).decode(packets)
    for plane, size in ((alerts.variance, alerts.cutouts.shape[-1]), (alerts.psf, PSF_SIZE)):
        assert plane is not None
        assert plane.shape == (3, len(CUTOUTS), size, size)
        assert plane.strides == (0, 0, 0, 0)
        assert np.isnan(plane).all()
    assert alerts.usable_planes is not None
    assert not alerts.usable_planes.any()


def test_lsst_packets_decode_to_the_values_of_fastavro_and_astropy(shared_data: Path, lsst_schemas: Path) -> None:
    expected = lsst_records(shared_data, lsst_schemas)
    alerts, rejects = Decoder(open_registry(str(lsst_schemas)), cutout_size=102).decode([item for item, _ in expected])
    rejected = {(reject.packet.position, reject.record): reject for reject in rejects}
    at = {
        (p, r): i
        for i, (p, r) in enumerate(zip(alerts.packet_index.tolist(), alerts.record_index.tolist(), strict=True))
    }
    read: dict[int, dict[str, Any]] = {}
    schemas: set[WriterSchema] = set()
    for p, (source, records) in enumerate(expected):
        for r, record in enumerate(records):
            stamps = [record.get(name) for name in FIELDS]
            if not all(stamps):
                reject = rejected.pop((source.position, r))
                assert reject.reason is RejectReason.MISSING_CUTOUT
                assert reject.alert is not None
                assert reject.alert.alert_id is not None
                assert reject.alert.band == record["diaSource"].get("band")
                continue
            i = at.pop((p, r))
            source_ = record["diaSource"]
            identity = alerts.identity(i)
            assert identity.alert_id == source_["diaSourceId"]
            assert identity.object_id == str(
                (record.get("diaObject") or {}).get("diaObjectId") or (record.get("ssSource") or {})["ssObjectId"]
            )
            assert identity.survey is Survey.LSST
            assert (identity.mjd, identity.ra, identity.dec) == (
                source_["midpointMjdTai"],
                source_["ra"],
                source_["dec"],
            )
            assert identity.band == source_["band"]
            declared = record.get("lsst_schema_version")
            assert identity.schema_version == (
                declared.removeprefix("lsst.v").replace("_", ".") if declared else identity.schema_version
            )
            assert alerts.column("sso")[i] == float((record.get("ssSource") or {}).get("ssObjectId") is not None)
            assert_stamps(alerts, i, stamps)
            read[i] = record
            if alerts.records[i].schema not in schemas:
                schemas.add(alerts.records[i].schema)
                assert_record(alerts, i, record)
    assert_columns(alerts, read, Survey.LSST)
    assert not rejected
    assert not at
    assert {"7.1", "7.3", "7.4", "9.0", "10.0", "unversioned"} == set(alerts.schema_version)


def test_columns_of_both_surveys_have_the_same_meaning(
    ztf_packets: list[tuple[int, bytes]], shared_data: Path, lsst_schemas: Path
) -> None:
    ztf, _ = decode(*(data for _, data in ztf_packets[:200]))
    sign = np.where(ztf.column("isdiffpos") == 1, 1, -1)
    np.testing.assert_allclose(ztf.column("psfFlux"), sign * 3631e9 * 10 ** (-0.4 * ztf.column("magpsf")), rtol=2e-4)
    np.testing.assert_allclose(ztf.column("snr"), np.abs(ztf.column("psfFlux") / ztf.column("psfFluxErr")))
    lsst, _ = Decoder(open_registry(str(lsst_schemas))).decode(
        [item for item, _ in lsst_records(shared_data, lsst_schemas)]
    )
    np.testing.assert_allclose(3631e9 * 10 ** (-0.4 * lsst.column("magpsf")), np.abs(lsst.column("psfFlux")), rtol=2e-4)
    np.testing.assert_allclose(
        lsst.column("sigmapsf"), 1.0857 * np.abs(lsst.column("psfFluxErr") / lsst.column("psfFlux")), rtol=1e-4
    )
    np.testing.assert_array_equal(lsst.column("isdiffpos") == 1, lsst.column("psfFlux") > 0)
    assert 0 < lsst.column("sso").sum() < len(lsst)


def test_sso_is_true_for_ztf_within_five_arcsec(ztf_packets: list[tuple[int, bytes]]) -> None:
    alerts, _ = decode(*(data for _, data in ztf_packets[:600]))
    distance = alerts.column("ssdistnr")
    np.testing.assert_array_equal(alerts.column("sso"), ((distance >= 0) & (distance <= 5)).astype(float))
    assert (distance > 5).any()
    assert np.isnan(distance).any()


def test_every_damaged_packet_is_rejected_with_a_reason(shared_data: Path) -> None:
    paths = sorted((shared_data / "ztf" / "damaged").iterdir())
    reasons: Counter[str] = Counter()
    for path in paths:
        alerts, (reject,) = decode(path.read_bytes())
        reasons[reject.reason] += 1
        assert reject.detail
        # One packet consists of several concatenated containers, the first of which is valid.
        assert len(alerts) == reject.record == (1 if "schema_4.02" in path.name else 0)
    assert reasons == {"not_avro": 3, "bad_schema": 5, "truncated": 7, "corrupt": 1}


def test_packets_of_other_surveys_are_rejected_as_unknown(shared_data: Path) -> None:
    paths = sorted(path for path in (shared_data / "other").rglob("*") if path.is_file())
    assert len(paths) > 15
    alerts, rejects = decode(*(path.read_bytes() for path in paths))
    assert len(alerts) == 0
    assert [reject.reason for reject in rejects] == [RejectReason.UNKNOWN_SURVEY] * len(paths)


def test_a_reject_has_the_fingerprint_of_its_schema_if_that_could_be_read(
    shared_data: Path, ztf_packets: list[tuple[int, bytes]]
) -> None:
    packet = ztf_packets[0][1]
    schema = read_container(packet).schema
    assert schema is not None
    for data in (packet[:-1], packet[:-1] + b"?"):
        _, [reject] = decode(data)
        assert reject.schema == schema.fingerprint
    _, [unknown] = decode(next((shared_data / "other" / "decam").iterdir()).read_bytes())
    assert unknown.schema is not None
    _, [unreadable] = decode(b"no packet")
    assert unreadable.schema is None


# Modified packets.


def rewritten(data: bytes, change: Any = None, schema: Any = None) -> bytes:
    """Return a ZTF packet re-encoded by fastavro after `change(record)`, with `schema` (by default its own schema)."""
    reader = fastavro.reader(io.BytesIO(data))
    (record,) = reader
    if change:
        change(record)
    file = io.BytesIO()
    fastavro.writer(file, schema or reader.writer_schema, [record])
    return file.getvalue()


@pytest.fixture(scope="module")
def nullable(ztf_packets: list[tuple[int, bytes]]) -> bytes:
    """A packet in which all fields are nullable."""
    return next(data for candid, data in ztf_packets if candid == 2481114533215015024)


@pytest.fixture(scope="module")
def original(ztf_packets: list[tuple[int, bytes]]) -> bytes:
    """A packet as published by the survey, schemavsn 4.02."""
    return next(data for candid, data in ztf_packets if candid == 2695378462115010012)


@pytest.mark.parametrize(
    ("change", "reason", "says"),
    [
        (lambda r: r.update(cutoutScience=None), RejectReason.MISSING_CUTOUT, "cutoutScience"),
        (lambda r: r["cutoutTemplate"].update(stampData=b""), RejectReason.MISSING_CUTOUT, "cutoutTemplate"),
        (lambda r: r["cutoutDifference"].update(stampData=b"x" * 99), RejectReason.BAD_CUTOUT, "cutoutDifference"),
        (
            lambda r: r["cutoutScience"].update(stampData=r["cutoutScience"]["stampData"][:-99]),
            RejectReason.BAD_CUTOUT,
            "",
        ),
        (lambda r: (r.update(candid=None), r["candidate"].update(candid=None)), RejectReason.MISSING_FIELD, "id"),
        (lambda r: r["candidate"].update(jd=None), RejectReason.MISSING_FIELD, "time"),
        (
            lambda r: r["candidate"].update(ra=None, dec=-999.0),
            RejectReason.MISSING_FIELD,
            "right ascension and no declination",
        ),
        (lambda r: r["candidate"].update(dec=math.nan), RejectReason.MISSING_FIELD, "declination"),
        (lambda r: r.update(candidate=None), RejectReason.MISSING_FIELD, "time"),
    ],
)
def test_an_invalid_alert_is_rejected_and_other_alerts_are_not(
    nullable: bytes, change: Any, reason: RejectReason, says: str
) -> None:
    alerts, (reject,) = decode(nullable, rewritten(nullable, change), nullable)
    assert alerts.packet_index.tolist() == [0, 2]
    assert alerts.cutouts[0].tobytes() == alerts.cutouts[1].tobytes()
    assert reject.reason is reason
    assert says in reject.detail
    assert reject.alert is not None
    assert reject.alert.object_id == alerts.object_id[0]
    np.testing.assert_equal(alerts.metadata[0], alerts.metadata[1])
    assert np.diff(alerts.light_curves.offsets).tolist() == [np.diff(alerts.light_curves.offsets)[0]] * 2


@pytest.mark.parametrize(
    "lost",
    [lambda r: r.update(cutoutTemplate=None), lambda r: r["cutoutTemplate"].update(stampData=b"x" * 99)],
)
def test_the_other_cutouts_are_decoded_if_cutouts_are_not_required(nullable: bytes, lost: Any) -> None:
    packets = [Packet(nullable), Packet(rewritten(nullable, lost))]
    alerts, rejects = Decoder(require_cutouts=False).decode(packets)
    assert rejects == []
    whole, rest = alerts.cutouts
    np.testing.assert_array_equal(whole[[0, 2]], rest[[0, 2]])
    assert np.isnan(rest[1]).all()
    assert alerts.cutout_box[:, :, 2].tolist() == [[63, 63, 63], [63, 0, 63]]


def test_the_top_level_candid_is_optional(nullable: bytes) -> None:
    alerts, _ = decode(rewritten(nullable, lambda r: r.update(candid=None)))
    assert alerts.alert_id.tolist() == [2481114533215015024]


def test_a_blank_stamp_is_rejected(original: bytes) -> None:
    def blank(record: dict[str, Any]) -> None:
        image = pixels(record["cutoutTemplate"]["stampData"])
        file = io.BytesIO()
        fits.PrimaryHDU(np.full_like(image, np.nan)).writeto(file)
        record["cutoutTemplate"]["stampData"] = gzip.compress(file.getvalue())

    _, (reject,) = decode(rewritten(original, blank))
    assert reject.reason is RejectReason.BLANK_CUTOUT
    assert reject.alert is not None
    assert reject.alert.alert_id == 2695378462115010012


def test_types_and_order_of_fields_do_not_matter(original: bytes) -> None:
    """Fields in reverse order, with numbers as doubles and strings in unions, decode to the same values."""
    (record,) = fastavro.reader(io.BytesIO(original))
    schema = fastavro.reader(io.BytesIO(original)).writer_schema

    def loosened(type_: Any) -> Any:
        if isinstance(type_, list):
            return [loosened(branch) for branch in reversed(type_)]
        if isinstance(type_, dict) and "fields" in type_:
            fields = [{**field, "type": loosened(field["type"])} for field in reversed(type_["fields"])]
            return {key: value for key, value in type_.items() if key != "fields"} | {
                "fields": [{k: v for k, v in field.items() if k != "default"} for field in fields]
            }
        if isinstance(type_, dict) and "items" in type_:
            return {**type_, "items": loosened(type_["items"])}
        return (
            {"float": ["boolean", "float", "null"], "double": ["double", "string"], "int": ["null", "long"]}.get(
                type_, type_
            )
            if isinstance(type_, str)
            else type_
        )

    cutout = next(field["type"] for field in schema["fields"] if field["name"] == "cutoutScience")[1]
    for field in schema["fields"]:  # the definition of the type now comes last
        if field["name"] == "cutoutScience":
            field["type"] = ["null", cutout["name"]]
        if field["name"] == "cutoutDifference":
            field["type"] = ["null", cutout]
    file = io.BytesIO()
    fastavro.writer(file, loosened(schema), [record])
    alerts, rejects = decode(original, file.getvalue())
    assert not rejects
    np.testing.assert_equal(alerts.metadata[1], alerts.metadata[0])
    assert alerts.cutouts[1].tobytes() == alerts.cutouts[0].tobytes()
    curves = alerts.light_curves
    half = curves.offsets[1]
    assert len(curves.mjd) == 2 * half
    np.testing.assert_array_equal(curves.flux[:half], curves.flux[half:])
    assert alerts.identity(0) == alerts.identity(1)


def test_several_records_in_a_packet_are_several_alerts(ztf_packets: list[tuple[int, bytes]], original: bytes) -> None:
    schema = fastavro.reader(io.BytesIO(original)).writer_schema
    same = [data for _, data in ztf_packets if fastavro.reader(io.BytesIO(data)).writer_schema == schema][:6]
    records = [record for data in same for record in fastavro.reader(io.BytesIO(data))]
    file = io.BytesIO()
    fastavro.writer(file, schema, records, codec="deflate", sync_interval=200_000)
    together, rejects = decode(file.getvalue())
    apart, _ = decode(*same)
    assert not rejects
    assert together.packet_index.tolist() == [0] * 6
    assert together.record_index.tolist() == list(range(6))
    np.testing.assert_array_equal(together.alert_id, apart.alert_id)
    np.testing.assert_equal(together.metadata, apart.metadata)
    assert together.cutouts.tobytes() == apart.cutouts.tobytes()
    assert [bytes(a.body) for a in together.records] == [bytes(b.body) for b in apart.records]
    assert [a.cutout_spans for a in together.records] == [b.cutout_spans for b in apart.records]


def test_damage_after_good_records_is_one_reject(original: bytes) -> None:
    container = ocf.read_container(original)
    assert container.schema is not None
    body = bytes(container.blocks[0].body)
    sync = bytes(16)
    header = ocf.container_header(json.dumps(container.schema.definition).encode(), sync)
    sound = ocf.encode_block(2, body * 2, sync)
    for tail, reason, record in (
        (ocf.encode_block(3, body + body[:-40], sync), RejectReason.TRUNCATED, 3),
        (ocf.encode_block(1, body + b"\x00", sync), RejectReason.CORRUPT, 2),
        (sound[:-1], RejectReason.TRUNCATED, 2),
        (ocf.encode_block(2, body * 2, b"x" * 16), RejectReason.CORRUPT, 2),
        (b"\x01", RejectReason.TRUNCATED, 2),
    ):
        alerts, (reject,) = decode(header + sound + tail)
        assert (reject.reason, reject.record) == (reason, record)
        assert alerts.record_index.tolist() == list(range(record))


def test_a_bad_block_does_not_affect_the_next(original: bytes) -> None:
    container = ocf.read_container(original)
    assert container.schema is not None
    body = bytes(container.blocks[0].body)
    header = ocf.container_header(json.dumps(container.schema.definition).encode(), bytes(16))
    blocks = [ocf.encode_block(2, body + body[:100], bytes(16)), ocf.encode_block(1, body, bytes(16))]
    alerts, (reject,) = decode(header + b"".join(blocks))
    assert alerts.record_index.tolist() == [0, 2]
    assert (reject.reason, reject.record) == (RejectReason.TRUNCATED, 1)
    assert reject.alert is not None
    assert reject.alert.alert_id == 2695378462115010012


def test_other_bytes_than_packets_are_rejected() -> None:
    _, rejects = decode(b"", b"\x00", b"hello, world", b"Obj\x01", bytes(1000), b"Obj\x01" + bytes(30))
    assert [reject.reason for reject in rejects] == [
        RejectReason.EMPTY,
        RejectReason.NOT_AVRO,
        RejectReason.NOT_AVRO,
        RejectReason.TRUNCATED,
        RejectReason.UNKNOWN_SCHEMA_ID,
        RejectReason.BAD_SCHEMA,
    ]


def test_a_hundred_megabyte_message_is_too_large(original: bytes) -> None:
    alerts, (reject,) = decode(original + bytes(100 << 20), original)
    assert reject.reason is RejectReason.TOO_LARGE
    assert alerts.packet_index.tolist() == [1]


def test_a_container_without_records_is_rejected_as_no_record(original: bytes) -> None:
    container = ocf.read_container(original)
    assert container.schema is not None
    header = ocf.container_header(json.dumps(container.schema.definition).encode(), bytes(16))
    for data in (header, header + ocf.encode_block(0, b"", bytes(16))):
        _, (reject,) = decode(data)
        assert reject.reason is RejectReason.NO_RECORD


def test_a_false_record_count_does_not_create_millions_of_alerts(nullable: bytes) -> None:
    schema = fastavro.reader(io.BytesIO(nullable)).writer_schema
    header = ocf.container_header(
        json.dumps({k: v for k, v in schema.items() if not k.startswith("__")}).encode(), bytes(16)
    )
    alerts, rejects = decode(header + ocf.encode_block(1 << 40, b"\x02" * (9 << 17), bytes(16)))
    assert len(alerts) == 0
    assert len(rejects) == 10_001
    assert rejects[0].reason is RejectReason.TOO_LARGE


def test_an_endless_history_is_too_large(nullable: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_module, "MAX_POINTS", 500)
    rows = [{"jd": 2460000.5}] * 501
    kept, (reject,) = decode(
        rewritten(nullable, lambda record: record.update(prv_candidates=rows[1:])),
        rewritten(nullable, lambda record: record.update(prv_candidates=rows)),
    )
    assert kept.packet_index.tolist() == [0]
    assert reject.reason is RejectReason.TOO_LARGE
    assert "history" in reject.detail


def test_a_wire_message_with_trailing_bytes_is_corrupt(
    lsst_packets: list[tuple[str, bytes]], lsst_schemas: Path
) -> None:
    registry = open_registry(str(lsst_schemas))
    data = next(data for _, data in lsst_packets if data[:5] == wire.frame(704, b"") and len(data) > 50_000)
    alerts, (left, cut, other) = Decoder(registry).decode(
        [packet(item) for item in (data, data + b"\x00", data[:-1], wire.frame(1000, data[5:]))]
    )
    assert len(alerts) == 1
    assert left.reason is RejectReason.CORRUPT
    assert cut.reason is RejectReason.TRUNCATED
    assert other.reason in (RejectReason.CORRUPT, RejectReason.TRUNCATED)


def test_an_unreachable_registry_rejects_nothing(original: bytes, lsst_packets: list[tuple[str, bytes]]) -> None:
    class Down:
        def get(self, schema_id: int) -> WriterSchema:
            raise RegistryUnavailable("down")

    with pytest.raises(RegistryUnavailable):
        Decoder(Down()).decode([packet(original), packet(lsst_packets[0][1])])
    assert len(Decoder(Down()).decode([packet(original)])[0]) == 1


def test_an_empty_list_of_packets_gives_an_empty_batch() -> None:
    alerts, rejects = decode()
    assert len(alerts) == len(rejects) == 0
    assert alerts.cutouts.shape == (0, len(CUTOUTS), SIZE, SIZE)
    assert alerts.metadata.shape == (0, len(COLUMNS))
    assert alerts.light_curves.offsets.tolist() == [0]


def test_only_the_requested_columns_are_returned(original: bytes) -> None:
    alerts, _ = decode(original, columns=["sso", "magpsf"], cutout_size=40)
    assert alerts.columns == ("sso", "magpsf")
    assert alerts.metadata.shape == (1, 2)
    assert alerts.cutouts.shape == (1, 3, 40, 40)
    assert len(alerts.light_curves.mjd) > 10
    with pytest.raises(ValueError, match="nonsense"):
        decode(columns=["magpsf", "nonsense"])


def test_a_batch_may_hold_several_surveys(original: bytes, shared_data: Path) -> None:
    lsst = sorted((shared_data / "lsst" / "ocf" / "lsst_v9_0").iterdir())[0].read_bytes()
    mixed, _ = decode(original, lsst, original)
    assert mixed.survey.tolist() == [Survey.ZTF, Survey.LSST, Survey.ZTF]
    for i, data in enumerate((original, lsst, original)):
        alone, _ = decode(data)
        assert mixed.identity(i) == alone.identity(0)
        np.testing.assert_equal(mixed.metadata[i], alone.metadata[0])
        begin, end = mixed.light_curves.offsets[i : i + 2]
        np.testing.assert_array_equal(mixed.light_curves.flux[begin:end], alone.light_curves.flux)


def test_a_decoder_is_thread_safe(ztf_packets: list[tuple[int, bytes]]) -> None:
    decoder = Decoder(open_registry(None))
    packets = [packet(data) for _, data in ztf_packets[::10]]
    batches: dict[int, AlertBatch] = {}

    def work(k: int) -> None:
        batches[k] = decoder.decode(packets)[0]

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(batches) == 4
    for batch in batches.values():
        np.testing.assert_array_equal(batch.alert_id, batches[0].alert_id)
        np.testing.assert_equal(batch.metadata, batches[0].metadata)
        assert batch.cutouts.tobytes() == batches[0].cutouts.tobytes()
