"""Simulated packets are valid packets of their survey, for its usual readers and for the Decoder."""

from __future__ import annotations

import gzip
import io
import json
from typing import Any

import fastavro
import numpy as np
import pytest
from astropy.io import fits
from numpy.typing import NDArray

from broker_filter.packets.batch import AlertBatch
from broker_filter.packets.decode import Decoder
from broker_filter.packets.packet import FilePosition, Packet
from broker_filter.packets.registry import open_registry
from broker_filter.simulate import SCHEMAS, SimulatedAlert, lsst, simulate_night
from broker_filter.simulate.night import Observation

STAMPS = ("Science", "Template", "Difference")


def read_ztf(alert: SimulatedAlert) -> dict[str, Any]:
    (record,) = fastavro.reader(io.BytesIO(alert.packet))
    return record


def read_lsst(alert: SimulatedAlert) -> dict[str, Any]:
    schema = fastavro.parse_schema(json.loads((SCHEMAS / "lsst.v10_0.alert.avsc").read_text()))
    assert alert.packet[:5] == b"\0\0\0\x03\xe8"  # the magic byte, and the schema id 1000 in big-endian order
    return fastavro.schemaless_reader(io.BytesIO(alert.packet[5:]), schema)


def pixels(stamp: bytes) -> NDArray[np.float32]:
    with fits.open(io.BytesIO(gzip.decompress(stamp) if stamp[:2] == b"\x1f\x8b" else stamp)) as hdus:
        hdus.verify("exception")
        return np.array(hdus[0].data)


def decode(alerts: list[SimulatedAlert], cutout_size: int) -> AlertBatch:
    packets = [Packet(alert.packet, FilePosition(f"{i}")) for i, alert in enumerate(alerts)]
    decoder = Decoder(open_registry(str(SCHEMAS)), cutout_size=cutout_size, columns=("magpsf", "ndethist"))
    batch, rejects = decoder.decode(packets)
    assert not rejects
    return batch


def test_decoder_reads_the_same_from_ztf_packets_as_fastavro_and_astropy(ztf_night: list[SimulatedAlert]) -> None:
    batch = decode(ztf_night, 63)
    for i, alert in enumerate(ztf_night):
        record = read_ztf(alert)
        assert batch.alert_id[i] == record["candid"] == alert.alert_id
        assert batch.object_id[i] == record["objectId"] == alert.object_id
        assert batch.schema_version[i] == record["schemavsn"] == "4.02"
        assert batch.ra[i] == record["candidate"]["ra"]
        assert batch.column("magpsf")[i] == record["candidate"]["magpsf"]
        points = len(record["prv_candidates"] or []) + len(record["fp_hists"] or []) + 1
        assert batch.light_curves.offsets[i + 1] - batch.light_curves.offsets[i] == points
        for channel, name in enumerate(STAMPS):
            expected = pixels(record[f"cutout{name}"]["stampData"])
            height, width = expected.shape
            np.testing.assert_array_equal(batch.cutouts[i, channel, :height, :width], expected)


def test_decoder_reads_the_same_from_lsst_packets_as_fastavro_and_astropy(lsst_night: list[SimulatedAlert]) -> None:
    batch = decode(lsst_night, 102)
    for i, alert in enumerate(lsst_night):
        record = read_lsst(alert)
        assert batch.alert_id[i] == record["diaSourceId"] == alert.alert_id
        assert batch.object_id[i] == alert.object_id
        assert batch.mjd[i] == record["diaSource"]["midpointMjdTai"]
        for channel, name in enumerate(STAMPS):
            expected = pixels(record[f"cutout{name}"])
            y, x, height, width = batch.cutout_box[i, channel]
            assert (height, width) == expected.shape
            np.testing.assert_array_equal(batch.cutouts[i, channel, y : y + height, x : x + width], expected)


def test_lsst_stamps_contain_variance_and_psf(lsst_night: list[SimulatedAlert]) -> None:
    with fits.open(io.BytesIO(read_lsst(lsst_night[0])["cutoutScience"])) as hdus:
        image, variance, psf = hdus
        assert [hdu.name for hdu in hdus] == ["PRIMARY", "UNCERT", "PSFIMAGE"]
        assert image.header["BUNIT"] == "nJy"
        assert variance.data.shape == image.data.shape
        assert np.nanmin(variance.data) > 0
        assert psf.data.sum() == pytest.approx(1, abs=0.02)
        assert np.unravel_index(psf.data.argmax(), psf.data.shape) == (20, 20)


def test_lsst_container_holds_the_same_record_as_the_message(lsst_observations: list[Observation]) -> None:
    (record,) = fastavro.reader(io.BytesIO(lsst.encode_container(lsst_observations[0])))
    assert record["diaSourceId"] == lsst.alert_id(lsst_observations[0])


@pytest.mark.shared
def test_ztf_schema_matches_that_of_the_survey(ztf_packets: list[tuple[int, bytes]]) -> None:
    ours = fastavro.parse_schema(json.loads((SCHEMAS / "ztf.v4_02.alert.avsc").read_text()))
    theirs = (fastavro.reader(io.BytesIO(packet)).writer_schema for _, packet in ztf_packets if b"fp_hists" in packet)
    canonical_forms = (fastavro.schema.to_parsing_canonical_form(schema) for schema in theirs)
    assert fastavro.schema.to_parsing_canonical_form(ours) in canonical_forms


@pytest.mark.shared
def test_lsst_schema_matches_that_of_the_survey(lsst_schemas: object) -> None:
    ours, theirs = (open_registry(str(place)).get(1000).definition for place in (SCHEMAS, lsst_schemas))
    ours, theirs = (fastavro.schema.to_parsing_canonical_form(fastavro.parse_schema(s)) for s in (ours, theirs))
    assert ours == theirs


@pytest.mark.parametrize("survey", ["ztf", "lsst"])
def test_same_seed_gives_same_bytes_for_any_number_of_alerts(survey: Any) -> None:
    short, long = list(simulate_night(5, 3, survey)), list(simulate_night(8, 3, survey))
    assert short == long[:5]
    assert short != list(simulate_night(5, 4, survey))


def test_packets_are_as_large_as_real_ones(ztf_night: list[SimulatedAlert], lsst_night: list[SimulatedAlert]) -> None:
    # Public ZTF packets have 50 to 75 kB, LSST packets about 110 kB with the smallest stamps.
    assert 50_000 < np.median([len(alert.packet) for alert in ztf_night]) < 75_000
    assert 95_000 < np.median([len(alert.packet) for alert in lsst_night]) < 140_000


def test_ids_are_unique(ztf_night: list[SimulatedAlert], lsst_night: list[SimulatedAlert]) -> None:
    for night in (ztf_night, lsst_night):
        assert len({alert.alert_id for alert in night}) == len({alert.object_id for alert in night}) == len(night)
