"""The fields of a simulated alert agree with its pixels and its history."""

from __future__ import annotations

import gzip
import io
from collections import Counter
from typing import Any

import fastavro
import numpy as np
import pytest
from astropy.io import fits

from broker_filter.simulate import BOGUS, RATES, REAL, SimulatedAlert, simulate_night, ztf
from broker_filter.simulate.instruments import ZTF
from broker_filter.simulate.night import Observation

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
