"""The scores and filters of the plugin for AMPEL, without AMPEL; `make plugins` runs its units in AMPEL itself."""

from __future__ import annotations

import io

import fastavro
import pytest

from broker_filter import BrokerFilterError, Packet, Scorer
from broker_filter.plugins.ampel import EXTRA, NoScoresError, PacketScorer, ScoreFilter
from broker_filter.simulate import simulate_night
from broker_filter.streaming.expressions import ExpressionError


@pytest.fixture(scope="module")
def packets() -> list[bytes]:
    return [alert.packet for alert in simulate_night(12, seed=7)]


@pytest.fixture(scope="module")
def scorer() -> PacketScorer:
    return PacketScorer(["default"], ["magpsf", "object_id", "drb"])


def with_null(packet: bytes, field: str) -> bytes:
    """The packet with an empty stamp in place of a cutout."""
    reader = fastavro.reader(io.BytesIO(packet))
    (record,) = reader
    record[field]["stampData"] = b""
    out = io.BytesIO()
    fastavro.writer(out, reader.writer_schema, [record])
    return out.getvalue()


def test_each_packet_has_one_entry_in_order(packets: list[bytes], scorer: PacketScorer) -> None:
    given = [*packets[:3], b"", with_null(packets[3], "cutoutScience"), b"no alert", *packets[4:]]
    entries = scorer.score(given)
    reasons = {3: "empty", 4: "missing_cutout", 5: "not_avro"}
    assert {i: entry["reject"]["reason"] for i, entry in enumerate(entries) if "reject" in entry} == reasons
    assert all(entries[i]["scores"] == {} for i in reasons)
    model = Scorer.open(["default"])
    alerts, _ = model.decoder().decode([Packet(packet) for packet in given])
    found = [entry["scores"]["default"]["real"] for entry in entries if "reject" not in entry]
    assert found == model.score(alerts).columns()["default.real"].tolist()
    assert [e["fields"]["object_id"] for e in entries if "reject" not in e] == list(alerts.object_id)
    assert entries[0]["versions"] == {"default": model.models[0].version}


def test_scores_do_not_depend_on_the_batch(packets: list[bytes], scorer: PacketScorer) -> None:
    alone = [scorer.score([packet])[0] for packet in packets]
    together = scorer.score(packets)
    for one, other in zip(alone, together, strict=True):
        assert one["scores"]["default"]["real"] == pytest.approx(other["scores"]["default"]["real"], abs=1e-6)
    assert [one["fields"] for one in alone] == [other["fields"] for other in together]
    assert scorer.score([]) == []
    assert [entry["reject"]["reason"] for entry in scorer.score([b"", b""])] == ["empty", "empty"]


def test_only_the_first_alert_of_a_packet_counts(packets: list[bytes], scorer: PacketScorer) -> None:
    reader = fastavro.reader(io.BytesIO(packets[0]))
    records = [*reader, *fastavro.reader(io.BytesIO(packets[1]))]
    both = io.BytesIO()
    fastavro.writer(both, reader.writer_schema, records)
    entries = scorer.score([both.getvalue(), packets[2]])
    assert [entry["fields"]["object_id"] for entry in entries] == [
        records[0]["objectId"],
        next(fastavro.reader(io.BytesIO(packets[2])))["objectId"],
    ]


def test_entries_are_plain_values(packets: list[bytes], scorer: PacketScorer) -> None:
    entry = scorer.score(packets[:1])[0]
    assert type(entry["scores"]["default"]["real"]) is float
    assert type(entry["fields"]["magpsf"]) is float
    assert type(entry["fields"]["object_id"]) is str


def extra(real: float | None = 0.9, **fields: object) -> dict[str, object]:
    return {EXTRA: {"scores": {"default": {"real": real}}, "fields": fields}}


def test_a_filter_reads_scores_and_fields() -> None:
    chosen = ScoreFilter('default.real > 0.5 and magpsf < 19 and object_id == "ZTF1"')
    assert chosen.fields == ["magpsf", "object_id"]
    assert chosen.passes(extra(magpsf=18.0, object_id="ZTF1"))
    assert not chosen.passes(extra(0.4, magpsf=18.0, object_id="ZTF1"))
    assert not chosen.passes(extra(magpsf=19.5, object_id="ZTF1"))
    assert not chosen.passes(extra(magpsf=18.0, object_id="ZTF2"))


def test_a_missing_value_never_passes() -> None:
    for text in ("default.real > 0.5", "not default.real > 0.5", "magpsf < 19", "not magpsf < 19"):
        assert not ScoreFilter(text).passes(extra(None, magpsf=None))
    assert ScoreFilter("isnull(default.real) and isnull(magpsf)").passes(extra(None, magpsf=None))


def test_a_rejected_packet_never_passes(scorer: PacketScorer) -> None:
    (entry,) = scorer.score([b""])
    for text in ("default.real > 0", "isnull(default.real)", "other.label > 0"):
        assert not ScoreFilter(text).passes({EXTRA: entry})


@pytest.mark.parametrize("given", [None, {}, {"name": "ZTF1"}, {EXTRA: None}, {EXTRA: {}}, {EXTRA: [1]}])
def test_an_alert_of_another_supplier_is_one_clear_error(given: dict[str, object] | None) -> None:
    with pytest.raises(NoScoresError, match="take the alerts from ScoringAlertSupplier"):
        ScoreFilter("default.real > 0.5").passes(given)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("other.real > 0.5", "no such model or label: add it to `models`"),
        ("default.bogus > 0.5", "no such model or label: add it to `models`"),
        ("drb > 0.5", "no such field: add it to `fields`"),
    ],
)
def test_what_the_supplier_does_not_provide_is_named(text: str, reason: str) -> None:
    with pytest.raises(NoScoresError, match=reason):
        ScoreFilter(text).passes(extra())


def test_a_wrong_configuration_is_refused_before_the_first_alert() -> None:
    with pytest.raises(BrokerFilterError, match="absent: not a bundle"):
        PacketScorer(["absent"])
    with pytest.raises(ValueError, match="magpsff"):
        PacketScorer(["default"], ["magpsff"])
    with pytest.raises(ExpressionError):
        ScoreFilter("default.real > ")
