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
from broker_filter.packets.schemas.registry import open_registry
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


def lsst_images(record: dict[str, Any], name: str) -> list[NDArray[np.floating]]:
    """Return the pixels, the variance and the PSF of a cutout."""
    with fits.open(io.BytesIO(record[f"cutout{name}"])) as hdus:
        hdus.verify("exception")
        assert [hdu.name for hdu in hdus] == ["PRIMARY", "UNCERT", "PSFIMAGE"]
        assert hdus[0].header["BUNIT"] == "nJy"
        return [np.array(hdu.data) for hdu in hdus]


def test_lsst_stamps_contain_variance_and_psf(lsst_night: list[SimulatedAlert]) -> None:
    for alert in lsst_night:
        record = read_lsst(alert)
        for name in STAMPS:
            image, variance, psf = lsst_images(record, name)
            assert variance.shape == image.shape
            assert (np.isinf(variance) == np.isnan(image)).all()
            assert variance.min() > 0
            assert psf.dtype == np.dtype(">f8")
            assert psf.sum() == pytest.approx(1)
            assert np.unravel_index(psf.argmax(), psf.shape) == (psf.shape[0] // 2, psf.shape[1] // 2)
        science, template, difference = (lsst_images(record, name)[2] for name in STAMPS)
        np.testing.assert_array_equal(science, difference)  # as in the survey's packets
        assert science.shape == (41, 41)
        assert 37 <= min(template.shape) <= max(template.shape) <= 55


def test_lsst_planes_are_decoded(lsst_night: list[SimulatedAlert]) -> None:
    packets = [Packet(alert.packet, FilePosition(f"{i}")) for i, alert in enumerate(lsst_night)]
    decoder = Decoder(open_registry(str(SCHEMAS)), cutout_size=102, columns=(), planes=("variance", "psf"))
    batch, rejects = decoder.decode(packets)
    assert not rejects
    assert batch.usable_planes is not None
    assert batch.usable_planes.all()


def test_lsst_stamps_are_as_large_as_the_footprint(lsst_night: list[SimulatedAlert]) -> None:
    sizes = []
    for alert in lsst_night:
        record = read_lsst(alert)
        sizes.append(pixels(record["cutoutScience"]).shape[0])
        assert sizes[-1] == max(30, record["diaSource"]["bboxSize"])
    assert min(sizes) == 30
    assert max(sizes) > 40


def test_lsst_measurements_agree_with_the_pixels(lsst_night: list[SimulatedAlert]) -> None:
    compared = 0
    for alert in lsst_night:
        record = read_lsst(alert)
        source = record["diaSource"]
        image, variance, psf = lsst_images(record, "Difference")
        if np.isnan(image).any():
            continue
        compared += 1
        with fits.open(io.BytesIO(record["cutoutDifference"])) as hdus:
            x, y = (hdus[0].header[f"CRPIX{axis}"] - 1 for axis in (1, 2))
        up, right = np.indices(image.shape)
        inside = np.hypot(right - x, up - y) < 12
        assert source["apFlux"] == pytest.approx(image[inside].sum(dtype=float), rel=1e-3, abs=1)
        assert source["apFluxErr"] == pytest.approx(np.sqrt(variance[inside].sum(dtype=float)), rel=1e-3)
        assert source["isNegative"] == (source["psfFlux"] < 0)
        # The PSF is published at the centre of its image, and the source is at (x, y) of the stamp.
        frequency = np.fft.fftfreq(41)
        shift = np.exp(-2j * np.pi * ((frequency * (y - round(y)))[:, None] + frequency * (x - round(x))))
        moved = np.fft.ifft2(np.fft.fft2(psf) * shift).real
        box = slice(round(y) - 12, round(y) + 13), slice(round(x) - 12, round(x) + 13)
        core = moved[8:33, 8:33]
        flux = (image[box] * core).sum() / (core**2).sum()
        assert source["psfFlux"] == pytest.approx(flux, rel=0.1, abs=1.5 * source["psfFluxErr"])
        size, psf_size = (source[f"ixx{of}"] and (source[f"ixx{of}"] + source[f"iyy{of}"]) / 0.04 for of in ("", "PSF"))
        if size:
            expected = 1 - np.exp(-0.5 * (size - psf_size) ** 2 / psf_size)
            assert source["extendedness"] == pytest.approx(expected, abs=1e-3)
        assert source["shape_flag"] == (size is None) == (source["trailLength"] is None)
        assert source["isDipole"] == (source["dipoleLength"] is not None)
    assert compared > 80


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
