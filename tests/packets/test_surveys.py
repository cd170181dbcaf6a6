"""Columns that are computed from other fields equal their published formulae on real packets."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import fastavro
import numpy as np
import pytest

from broker_filter.packets.decode import Decoder
from broker_filter.packets.packet import Packet
from broker_filter.packets.schemas.registry import open_registry
from broker_filter.streaming.archives import read_packets
from broker_filter.streaming.expressions import FIELDS, compile_filter
from tests.packets.test_light_curve_summary import record_of

APPARENT = ("apparent_mag", "apparent_mag_err")


def apparent_of_ztf(candidate: dict[str, Any]) -> tuple[float, float]:
    """Return magnitude and uncertainty by the formulae of Förster et al. 2021 (AJ 161, 242); NaN where undefined."""
    if candidate["distnr"] is None or not 0 <= candidate["distnr"] < 1.4:
        return math.nan, math.nan
    template, difference = (10 ** (-0.4 * candidate[name]) for name in ("magnr", "magpsf"))
    total = template + difference * (1 if candidate["isdiffpos"] in ("t", "1", True) else -1)
    if total <= 0:
        return math.nan, math.nan
    variance = (difference * candidate["sigmapsf"]) ** 2 - (template * candidate["sigmagnr"]) ** 2
    return -2.5 * math.log10(total), math.sqrt(variance) / total if variance >= 0 else math.nan


@pytest.mark.shared
def test_apparent_magnitudes_of_ztf_are_those_of_alerce(ztf_packets: list[tuple[int, bytes]]) -> None:
    packets = [data for _, data in ztf_packets[::12]]
    alerts, _ = Decoder(None, columns=APPARENT).decode([Packet(data) for data in packets])
    assert len(alerts) == len(packets)
    found = np.stack([alerts.column(name) for name in APPARENT], axis=1)
    wanted = [apparent_of_ztf(next(fastavro.reader(io.BytesIO(data)))["candidate"]) for data in packets]
    np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-9)
    known = np.isfinite(found).sum(axis=0)
    assert len(alerts) > known[0] > known[1] > 30


@pytest.mark.shared
def test_apparent_magnitudes_of_lsst_are_those_of_the_flux_in_the_science_image(
    shared_data: Path, lsst_schemas: Path
) -> None:
    columns = (*APPARENT, "scienceFlux", "scienceFluxErr")
    packets = read_packets([shared_data / "lsst" / "ocf"])
    alerts, _ = Decoder(open_registry(str(lsst_schemas)), columns=columns).decode(list(packets))
    magnitude, error, flux, flux_error = (alerts.column(name) for name in columns)
    known = flux > 0
    assert known.sum() > 20
    assert (np.isfinite(magnitude) == known).all()
    np.testing.assert_allclose(magnitude[known], 31.4 - 2.5 * np.log10(flux[known]))
    np.testing.assert_allclose(error[known], 2.5 / np.log(10) * flux_error[known] / flux[known])


@pytest.mark.shared
def test_designations_of_ztf_are_read_and_null_as_text_is_none(ztf_packets: list[tuple[int, bytes]]) -> None:
    packets = [data for _, data in ztf_packets[::12]]
    decoder = Decoder(None, columns=("designation", "ssdistnr", "sso"))
    alerts, _ = decoder.decode([Packet(data) for data in packets])
    candidates = [next(fastavro.reader(io.BytesIO(data)))["candidate"] for data in packets]
    assert alerts.designation is not None
    assert alerts.designation == [None if c["ssnamenr"] == "null" else c["ssnamenr"] for c in candidates]
    assert alerts.columns == ("ssdistnr", "sso")
    named = np.array([designation is not None for designation in alerts.designation])
    assert 10 < named.sum() < len(alerts)
    assert np.isnan(alerts.column("ssdistnr")[[c["ssdistnr"] == -999 for c in candidates]]).all()
    assert (alerts.column("sso") <= named).all()
    name = next(designation for designation in alerts.designation if designation)
    same = compile_filter(f'designation == "{name}"', FIELDS, ())
    assert same.columns == ["designation"]
    assert same.holds(alerts, {}).sum() == alerts.designation.count(name)
    assert (compile_filter("isnull(designation)", FIELDS, ()).holds(alerts, {}) == ~named).all()


def test_a_designation_that_was_not_decoded_is_an_error() -> None:
    decoder = Decoder(None, columns=("ssdistnr",))
    assert "candidate.ssnamenr" not in decoder.fields
    alerts, _ = decoder.decode([])
    assert alerts.designation is None
    with pytest.raises(KeyError, match="designation"):
        compile_filter('designation == "1"', FIELDS, ()).holds(alerts, {})


@pytest.mark.shared
def test_designations_of_lsst_are_those_of_the_associated_object(shared_data: Path, lsst_schemas: Path) -> None:
    packets = read_packets([shared_data / "lsst" / "more" / "ocf", *(shared_data / "lsst" / "ocf").iterdir()])
    decoder = Decoder(open_registry(str(lsst_schemas)), columns=("designation", "ssdistnr", "sso"))
    alerts, _ = decoder.decode(list(packets))
    assert alerts.designation is not None
    wanted: list[str | None] = []
    for record in (record_of(alerts, i) for i in range(len(alerts))):
        orbit = record.get("ssSource") or record.get("MPCORB") or {}
        wanted.append(orbit.get("designation") or (record.get("MPCORB") or {}).get("mpcDesignation"))
    assert alerts.designation == wanted
    assert any(wanted)
    assert (alerts.column("sso")[[designation is not None for designation in wanted]] == 1).all()
