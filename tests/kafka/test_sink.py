"""Batches are divided into the work of claims: a packet without an outcome or without its output is an error."""

from __future__ import annotations

from dataclasses import replace

import pytest

from broker_filter.kafka.sink import UnaccountedError, divide
from broker_filter.kafka.source import Delivery
from broker_filter.kafka.transactions import Claim
from broker_filter.packets.rejects import Reject, RejectReason
from broker_filter.streaming.encoding import OutputRecord
from broker_filter.streaming.routing import Routed
from broker_filter.streaming.scored import ScoredBatch


class NoWriter:
    """Stands in for a writer, which these tests never call."""

    fenced = False


def claim(partition: int) -> Claim:
    return Claim("ztf", partition, NoWriter(), 0)  # type: ignore[arg-type]


def routed(packet_index: list[int]) -> Routed:
    record = OutputRecord("me.scored", None, b"", [])
    return replace(ROUTED, records=[record] * len(packet_index), packet_index=packet_index)


ROUTED = Routed()


def test_output_is_divided_by_claim_without_packets_whose_claim_has_ended(four_packets: ScoredBatch) -> None:
    first, second, lost = claim(0), claim(1), claim(2)
    lost.ended = True
    delivery = Delivery(list(four_packets.packets), [7, 3, 9, 9], [first, second, lost, first])

    works = {work.claim: work for work in divide(delivery, four_packets, routed([0, 1, 2, 3, 3]))}

    assert set(works) == {first, second}
    assert (works[first].start, works[first].end) == (7, 10)
    assert (works[second].start, works[second].end) == (3, 4)
    assert [i for i, _ in works[first].records] == [0, 1, 1]
    assert works[first].packets == [four_packets.packets[0], four_packets.packets[3]]


@pytest.mark.parametrize("missing", [0, 2])
def test_packet_whose_output_is_missing_is_an_error(four_packets: ScoredBatch, missing: int) -> None:
    delivery = Delivery(list(four_packets.packets), [0, 1, 2, 3], [claim(0)] * 4)
    published = [k for k in range(4) if k != missing]
    with pytest.raises(UnaccountedError, match=str(four_packets.packets[missing].position)):
        divide(delivery, four_packets, routed(published))


def test_packet_without_an_outcome_is_an_error(four_packets: ScoredBatch) -> None:
    delivery = Delivery(list(four_packets.packets), [0, 1, 2, 3], [claim(0)] * 4)
    with pytest.raises(UnaccountedError, match="ztf/0/2"):
        divide(delivery, replace(four_packets, rejects=[]), routed([0, 1, 2, 3]))


def test_one_dead_letter_is_enough_for_all_rejected_alerts_of_a_packet(four_packets: ScoredBatch) -> None:
    delivery = Delivery(list(four_packets.packets), [0, 1, 2, 3], [claim(0)] * 4)
    more = [Reject(four_packets.packets[2], 2, RejectReason.CORRUPT, "damaged", record=k) for k in range(1, 100)]
    (work,) = divide(delivery, replace(four_packets, rejects=[*four_packets.rejects, *more]), routed([0, 1, 2, 3]))
    assert work.accounts[2].rejected.total() == work.accounts[2].consumed == 100
    assert [k for k, _ in work.records] == [0, 1, 2, 3]
