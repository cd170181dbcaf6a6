"""The fields of a simulated alert agree with its pixels and its history."""

from __future__ import annotations

import gzip
import io
import json
from collections import Counter
from typing import Any

import fastavro
import numpy as np
import pytest
from astropy.io import fits

from broker_filter.simulate import BOGUS, LSST_RATES, RATES, REAL, SCHEMAS, SimulatedAlert, lsst, simulate_night, ztf
from broker_filter.simulate.instruments import LSST, ZTF
from broker_filter.simulate.night import Night, Observation

MIDDLE = ZTF.grid // 2


def records(night: list[SimulatedAlert]) -> list[dict[str, Any]]:
    return [next(fastavro.reader(io.BytesIO(alert.packet))) for alert in night]


def test_night_has_each_kind_at_its_requested_rate(ztf_observations: list[Observation]) -> None:
    seen = Counter(observation.kind for observation in ztf_observations)
    for kind, rate in RATES.items():
        expected = rate * len(ztf_observations)
        assert abs(seen[kind] - expected) < 4 * np.sqrt(expected) + 1, kind


def test_rates_select_the_kinds() -> None:
    assert {alert.kind for alert in simulate_night(10, 1, "ztf", {"ghost": 1.0})} == {"ghost"}
    with pytest.raises(ValueError, match="unknown kinds of alert: kilonova"):
        next(simulate_night(1, 1, "ztf", {"kilonova": 1.0}))


def test_nothing_below_five_sigma_is_published(ztf_observations: list[Observation]) -> None:
    faint = [o for o in ztf_observations if o.photometry.snr < 5]
    assert len(faint) <= len(ztf_observations) // 100  # an artefact may remain faint after many draws


def test_magnitude_matches_the_difference_image(ztf_observations: list[Observation]) -> None:
    box = slice(MIDDLE - 5, MIDDLE + 6)
    ratios = [
        np.nansum(observation.stamps.difference[box, box]) / observation.photometry.flux
        for observation in ztf_observations
        if observation.kind in REAL and observation.photometry.snr > 10
    ]
    assert len(ratios) > 50
    assert np.median(ratios) == pytest.approx(1, abs=0.05)


def test_fading_sources_are_published_as_positive_stamps_marked_negative(ztf_night: list[SimulatedAlert]) -> None:
    signs = Counter(record["candidate"]["isdiffpos"] for record in records(ztf_night))
    assert min(signs["t"], signs["f"]) > 0.15 * len(ztf_night)


def test_only_asteroids_match_a_known_body(ztf_night: list[SimulatedAlert]) -> None:
    for alert, record in zip(ztf_night, records(ztf_night), strict=True):
        known = record["candidate"]["ssdistnr"] >= 0
        assert not known or alert.kind == "asteroid"


def test_one_time_events_have_only_upper_limits_as_history(ztf_night: list[SimulatedAlert]) -> None:
    for alert, record in zip(ztf_night, records(ztf_night), strict=True):
        if alert.kind == "asteroid" or alert.kind in BOGUS:
            assert all(visit["magpsf"] is None for visit in record["prv_candidates"] or [])
            assert record["candidate"]["ndethist"] == 1


def test_supernovae_are_invisible_before_they_explode() -> None:
    supernovae = records(list(simulate_night(60, 2, "ztf", {"supernova": 1.0})))
    limits_first = 0
    for record in supernovae:
        visits = record["prv_candidates"] or []
        detected = [visit["jd"] for visit in visits if visit["magpsf"] is not None]
        if detected:
            assert record["candidate"]["jdstarthist"] == min(detected)
            limits_first += visits[0]["magpsf"] is None
    assert limits_first > 10


def test_forced_photometry_agrees_with_the_detections(ztf_night: list[SimulatedAlert]) -> None:
    compared = 0
    for record in records(ztf_night):
        forced = {visit["jd"]: visit["forcediffimflux"] for visit in record["fp_hists"] or []}
        for visit in record["prv_candidates"] or []:
            if visit["magpsf"] is not None and visit["jd"] in forced:
                sign = 1 if visit["isdiffpos"] == "t" else -1
                flux = sign * 10 ** (0.4 * (ZTF.zero_point - visit["magpsf"]))
                assert flux == pytest.approx(forced[visit["jd"]], rel=1e-4)
                compared += 1
    assert compared > 500


def test_stamps_end_at_the_edge_of_the_detector(ztf_observations: list[Observation]) -> None:
    cut_short = 0
    for observation in ztf_observations:
        stamp = next(fastavro.reader(io.BytesIO(ztf.encode(observation))))["cutoutScience"]["stampData"]
        expected = tuple(
            min(at, 31) + 1 + min(size - 1 - at, 31)
            for at, size in ((observation.y, ZTF.detector[1]), (observation.x, ZTF.detector[0]))
        )
        assert fits.getdata(io.BytesIO(gzip.decompress(stamp))).shape == expected
        cut_short += expected != (63, 63)
    assert cut_short >= 3


def test_some_stamps_have_blocks_of_nan(ztf_observations: list[Observation]) -> None:
    holed = [o for o in ztf_observations if np.isnan(o.stamps.science).any()]
    assert 5 < len(holed) < 60
    for observation in holed:
        science, template, difference = (np.isnan(image) for image in observation.stamps)
        assert (science == template).all()
        assert (science == difference).all()
        assert not science[MIDDLE - 2 : MIDDLE + 3, MIDDLE - 2 : MIDDLE + 3].any()


def lsst_records(kind: str, n: int, seed: int = 4) -> list[tuple[dict[str, Any], Observation]]:
    schema = fastavro.parse_schema(json.loads((SCHEMAS / lsst.SCHEMA_FILE).read_text()))
    observations = list(Night(LSST, seed, {kind: 1.0}).observations(n))
    bodies = (io.BytesIO(lsst.encode_body(observation)) for observation in observations)
    return [
        (fastavro.schemaless_reader(body, schema)["diaSource"], observation)
        for body, observation in zip(bodies, observations, strict=True)
    ]


def test_lsst_night_has_each_kind_at_its_requested_rate() -> None:
    seen = Counter(alert.kind for alert in simulate_night(200, 1, "lsst"))
    assert set(LSST_RATES) == set(REAL) | set(BOGUS)
    for kind, rate in LSST_RATES.items():
        assert abs(seen[kind] - 200 * rate) < 4 * np.sqrt(200 * rate) + 1, kind


def test_chromatic_refraction_and_residuals_leave_both_signs() -> None:
    for kind in ("refraction", "residual"):
        assert np.mean([source["isDipole"] for source, _ in lsst_records(kind, 12)]) > 0.4, kind


def test_noise_peaks_are_faint_and_have_no_template() -> None:
    for source, _ in lsst_records("noise", 12):
        assert 4.8 < source["snr"] < 9
        assert source["templateFlux"] < 5 * source["psfFluxErr"] + 0.5 * abs(source["scienceFlux"])


def test_saturated_stars_bleed_along_columns() -> None:
    for source, observation in lsst_records("bleed_trail", 4):
        assert source["pixelFlags_saturated"]
        gain = observation.exposure.conditions.gain
        full = observation.stamps.science >= 0.99 * LSST.saturation * LSST.gain / gain
        assert full.sum(axis=0).max() > 1.5 * full.sum(axis=1).max()


def test_difference_is_zero_where_the_template_ends() -> None:
    for source, observation in lsst_records("template_edge", 4):
        empty = observation.stamps.difference == 0
        assert 0.2 < empty.mean() < 0.6
        assert source["pixelFlags_nodata"]


def test_satellite_trails_are_long_and_extended() -> None:
    for source, _ in lsst_records("satellite", 4):
        assert source["bboxSize"] > 60
