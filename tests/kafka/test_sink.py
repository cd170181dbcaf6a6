"""The account of each packet: a packet without an outcome or without its output is an error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from broker_filter.kafka.sink import UnaccountedError, divide
from broker_filter.kafka.source import Delivery
from broker_filter.kafka.transactions import Claim
from broker_filter.packets.batch import AlertBatch, Survey
from broker_filter.packets.rejects import Reject, RejectReason
from broker_filter.streaming.account import account_packets, exposure_times
from broker_filter.streaming.encoding import OutputRecord
from broker_filter.streaming.routing import Routed
from broker_filter.streaming.scored import ScoredBatch

MakeAlerts = Callable[..., AlertBatch]
MakeScored = Callable[..., ScoredBatch]


@pytest.fixture
def scored(make_alerts: MakeAlerts, make_scored: MakeScored) -> ScoredBatch:
    """Four packets: scored, a duplicate, rejected because no model takes it, and scored."""
    batch = make_scored(make_alerts([1, 2, 3, 4]), {"default": [0.1, 0.2, np.nan, 0.4]})
    reject = Reject(batch.packets[2], 2, RejectReason.NO_MODEL_FOR_SURVEY, "none")
    return replace(batch, duplicate=np.array([False, True, False, False]), rejects=[reject])


class NoWriter:
    """Stands in for a writer, which these tests never call."""

    fenced = False


def claim(partition: int) -> Claim:
    return Claim("ztf", partition, NoWriter(), 0)  # type: ignore[arg-type]


def routed(packet_index: list[int]) -> Routed:
    record = OutputRecord("me.scored", None, b"", [])
    return replace(ROUTED, records=[record] * len(packet_index), packet_index=packet_index)


ROUTED = Routed()


def test_every_packet_has_its_account(scored: ScoredBatch) -> None:
    accounts = account_packets(scored)
    assert [account.scored for account in accounts] == [1, 0, 0, 1]
    assert [account.duplicates for account in accounts] == [0, 1, 0, 0]
    assert [dict(account.rejected) for account in accounts] == [{}, {}, {RejectReason.NO_MODEL_FOR_SURVEY: 1}, {}]
    assert [account.consumed for account in accounts] == [1, 1, 1, 1]


def test_output_is_divided_by_claim_without_packets_whose_claim_has_ended(scored: ScoredBatch) -> None:
    first, second, lost = claim(0), claim(1), claim(2)
    lost.ended = True
    delivery = Delivery(list(scored.packets), [7, 3, 9, 9], [first, second, lost, first])

    works = {work.claim: work for work in divide(delivery, scored, routed([0, 1, 2, 3, 3]))}

    assert set(works) == {first, second}
    assert (works[first].start, works[first].end) == (7, 10)
    assert (works[second].start, works[second].end) == (3, 4)
    assert [i for i, _ in works[first].records] == [0, 1, 1]
    assert works[first].packets == [scored.packets[0], scored.packets[3]]


@pytest.mark.parametrize("missing", [0, 2])
def test_packet_whose_output_is_missing_is_an_error(scored: ScoredBatch, missing: int) -> None:
    delivery = Delivery(list(scored.packets), [0, 1, 2, 3], [claim(0)] * 4)
    published = [k for k in range(4) if k != missing]
    with pytest.raises(UnaccountedError, match=str(scored.packets[missing].position)):
        divide(delivery, scored, routed(published))


def test_packet_without_an_outcome_is_an_error(scored: ScoredBatch) -> None:
    delivery = Delivery(list(scored.packets), [0, 1, 2, 3], [claim(0)] * 4)
    with pytest.raises(UnaccountedError, match="ztf/0/2"):
        divide(delivery, replace(scored, rejects=[]), routed([0, 1, 2, 3]))


def test_one_dead_letter_is_enough_for_all_rejected_alerts_of_a_packet(scored: ScoredBatch) -> None:
    delivery = Delivery(list(scored.packets), [0, 1, 2, 3], [claim(0)] * 4)
    more = [Reject(scored.packets[2], 2, RejectReason.CORRUPT, "damaged", record=k) for k in range(1, 100)]
    (work,) = divide(delivery, replace(scored, rejects=[*scored.rejects, *more]), routed([0, 1, 2, 3]))
    assert work.accounts[2].rejected.total() == work.accounts[2].consumed == 100
    assert [k for k, _ in work.records] == [0, 1, 2, 3]


def test_exposure_times_are_utc_although_rubin_publishes_tai(make_alerts: MakeAlerts) -> None:
    ztf, lsst = (exposure_times(make_alerts([1], survey=survey))[0] for survey in (Survey.ZTF, Survey.LSST))
    assert ztf == pytest.approx((61096.25 - 40587) * 86400)
    assert ztf - lsst == pytest.approx(37.0)
