"""The account of a batch counts each alert, and each alert that was scored with a fallback."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from broker_filter.metrics import Metrics
from broker_filter.packets.batch import AlertBatch, Survey
from broker_filter.packets.rejects import RejectReason
from broker_filter.streaming.account import account_batch, account_packets, exposure_times
from broker_filter.streaming.scored import ScoredBatch

ZTF, LSST = Survey.ZTF, Survey.LSST
CUTOUTS_USABLE = {"all": [True, True, True], "one": [False, True, False], "none": [False, False, False]}


def alerts_with_planes(
    make_alerts: Callable[..., AlertBatch], survey: list[Survey], variance: list[str], psf: list[str]
) -> AlertBatch:
    """Return alerts whose `variance` and `psf` planes are usable in all cutouts, one or none of them."""
    n = len(survey)
    usable = np.array([[CUTOUTS_USABLE[name] for name in names] for names in (variance, psf)]).transpose(1, 2, 0)
    planes = np.zeros((n, 3, 1, 1), np.float32)
    alerts = make_alerts(list(range(n)), survey=survey)
    return replace(alerts, variance=planes, psf=planes, usable_planes=usable)


def test_alerts_without_usable_planes_are_counted_where_their_survey_publishes_them(
    make_alerts: Callable[..., AlertBatch], make_scored: Callable[..., ScoredBatch]
) -> None:
    alerts = alerts_with_planes(
        make_alerts, [ZTF, LSST, LSST, LSST, LSST], ["none", "all", "one", "none", "none"], ["none"] * 2 + ["all"] * 3
    )
    scored = make_scored(alerts, {"rubin": [0.5, 0.5, 0.5, 0.5, np.nan]})
    assert account_batch(scored).fallbacks == {"variance": 2, "psf": 1}
    assert [account.fallbacks for account in account_packets(scored)] == [
        Counter(),
        Counter({"psf": 1}),
        Counter({"variance": 1}),
        Counter({"variance": 1}),
        Counter(),
    ]
    metrics = Metrics()
    metrics.commit([account_batch(scored)], Counter(), "dead-letter")
    exposed = metrics.exposition().decode()
    assert 'broker_filter_plane_fallback_alerts_total{plane="variance"} 2.0' in exposed
    assert 'broker_filter_plane_fallback_alerts_total{plane="psf"} 1.0' in exposed


def test_a_plane_that_was_not_decoded_and_a_duplicate_are_not_counted(
    make_alerts: Callable[..., AlertBatch], make_scored: Callable[..., ScoredBatch]
) -> None:
    alerts = alerts_with_planes(make_alerts, [LSST, LSST], ["none", "none"], ["none", "none"])
    scored = make_scored(replace(alerts, variance=None), {"rubin": [0.5, 0.5]})
    duplicate = replace(scored, duplicate=np.array([False, True]))
    assert account_batch(duplicate).fallbacks == {"psf": 1}
    assert account_batch(make_scored(make_alerts([1, 2], survey=LSST), {"rubin": [0.5, 0.5]})).fallbacks == {}


def test_every_packet_has_its_account(four_packets: ScoredBatch) -> None:
    accounts = account_packets(four_packets)
    assert [account.scored for account in accounts] == [1, 0, 0, 1]
    assert [account.duplicates for account in accounts] == [0, 1, 0, 0]
    assert [dict(account.rejected) for account in accounts] == [{}, {}, {RejectReason.NO_MODEL_FOR_SURVEY: 1}, {}]
    assert [account.consumed for account in accounts] == [1, 1, 1, 1]


def test_exposure_times_are_utc_although_rubin_publishes_tai(make_alerts: Callable[..., AlertBatch]) -> None:
    ztf, lsst = (exposure_times(make_alerts([1], survey=survey))[0] for survey in (Survey.ZTF, Survey.LSST))
    assert ztf == pytest.approx((61096.25 - 40587) * 86400)
    assert ztf - lsst == pytest.approx(37.0)
