"""Dead letters that are scored again: what their headers say, and that no alert of a message is published twice."""

from __future__ import annotations

import io
from collections.abc import Sequence

import fastavro
import pytest

from broker_filter.config import Runtime
from broker_filter.packets.packet import KafkaPosition, Packet, Redriven
from broker_filter.scoring.scorer import Scorer, open_scorer
from broker_filter.simulate import simulate_night
from broker_filter.streaming.dead_letters import LetterError, leave_out_published, letter_headers, read_letter
from broker_filter.streaming.duplicates import DuplicateWindow
from broker_filter.streaming.encoding import ContainerFraming, Encoder, OutputRecord
from broker_filter.streaming.filtering import score_packets
from broker_filter.streaming.routing import Router

AT = KafkaPosition("cluster", "ztf", 0, 7)
LETTER = KafkaPosition("ours", "me.dead-letter", 2, 0)


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    return open_scorer(["default"], Runtime(device="cpu"))


def message(*, damaged: Sequence[int]) -> bytes:
    """Return a container of five alerts; those with the indices `damaged` have a cutout that cannot be read."""
    records = []
    for i, one in enumerate(simulate_night(5, seed=3, survey="ztf")):
        reader = fastavro.reader(io.BytesIO(one.packet))
        (record,) = reader
        assert isinstance(record, dict)
        if i in damaged:
            record["cutoutScience"]["stampData"] = b"damaged"
        records.append(record)
        schema = reader.writer_schema
    assert schema
    written = io.BytesIO()
    fastavro.writer(written, schema, records)
    return written.getvalue()


def route(packet: Packet, scorer: Scorer) -> list[OutputRecord]:
    """Score a packet as `redrive` does, and return its output records."""
    router = Router("me", models=[("default", "1")], encoder=Encoder("scores"), framing=ContainerFraming())
    scored = score_packets([packet], scorer.decoder(), scorer, DuplicateWindow(10))
    return router.route(leave_out_published(scored)).records


def published(records: Sequence[OutputRecord]) -> list[int]:
    """Return the indices in their message of the alerts in `me.scored`."""
    return [int(dict(record.headers).get("record", b"0")) for record in records if record.topic == "me.scored"]


def test_only_alerts_of_a_message_that_were_rejected_are_scored_again(scorer: Scorer) -> None:
    records = route(Packet(message(damaged=[1, 3]), AT), scorer)
    assert published(records) == [0, 2, 4]
    first = records[-1]
    assert dict(first.headers)["scored"] == b"0,2,4"
    assert "tries" not in dict(first.headers)

    letter = read_letter(Packet(first.value, LETTER), dict(first.headers))
    assert (letter.reason, letter.reasons, letter.tries) == ("bad_cutout", {"bad_cutout"}, 0)
    (again,) = route(letter.packet, scorer)
    same = {name: value for name, value in first.headers if name != "tries"}
    assert dict(again.headers) == {**same, "tries": b"1"}
    assert again.value == first.value

    # With a program that can read one of the two alerts, only this alert is published.
    letter = read_letter(Packet(message(damaged=[3]), LETTER), dict(again.headers))
    alert, last = route(letter.packet, scorer)
    assert published([alert]) == [1]
    assert dict(alert.headers)["redriven"] == b"2"
    assert dict(alert.headers)["input"] == str(AT).encode()
    (decoded,) = fastavro.reader(io.BytesIO(alert.value))
    assert isinstance(decoded, dict)
    assert decoded["broker_filter"]["redriven"] == 2
    assert dict(last.headers) | {"scored": b"0-2,4", "tries": b"2"} == dict(last.headers)

    letter = read_letter(Packet(message(damaged=[]), LETTER), dict(last.headers))
    (alert,) = route(letter.packet, scorer)
    assert published([alert]) == [3]


def test_letter_of_an_older_version_repeats_no_alert_before_the_first_rejected_one(scorer: Scorer) -> None:
    headers = {
        "input": str(AT).encode(),
        "reason": b"bad_cutout",
        "record": b"3",
        "rejected": b"bad_cutout=1,corrupt=1",
    }
    letter = read_letter(Packet(message(damaged=[]), LETTER), headers)
    assert letter.reasons == {"bad_cutout", "corrupt"}
    assert published(route(letter.packet, scorer)) == [3, 4]


def test_message_whose_alerts_were_all_published_has_no_output(scorer: Scorer) -> None:
    packet = Packet(message(damaged=[4]), LETTER, redriven=Redriven(str(AT), 1, (range(5),)))
    assert route(packet, scorer) == []


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"input": b"a/b/0/1"},
        {"reason": b"corrupt"},
        {"input": b"a/b/0/1", "reason": b"corrupt", "tries": b"-1"},
        {"input": b"a/b/0/1", "reason": b"corrupt", "tries": b"99999999999999999999"},
        {"input": b"a/b/0/1", "reason": b"corrupt", "scored": b"0-2,x"},
        {"input": b"a/b/0/1", "reason": b"corrupt", "scored": b",".join([b"0-1000000"] * 3)},
    ],
)
def test_message_without_the_headers_of_a_dead_letter_is_refused(headers: dict[str, bytes | None]) -> None:
    with pytest.raises(LetterError):
        read_letter(Packet(b"bytes", LETTER), headers)


def test_headers_of_a_letter_join_what_was_published_before_and_now() -> None:
    packet = Packet(b"", LETTER, redriven=Redriven("a/b/0/1", 3, (range(2), range(5, 6))))
    assert letter_headers(packet, [2, 7]) == [("scored", b"0-2,5,7"), ("tries", b"3")]
    assert letter_headers(Packet(b"", AT)) == [("scored", b"")]
