"""The service end to end: packets in, and the records that a read_committed reader finds in the output."""

from __future__ import annotations

import io
import math
import re
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import fastavro
import pytest

from broker_filter.cli import main
from broker_filter.kafka.transactions import TRUNCATED
from broker_filter.packets.rejects import RejectReason

from .conftest import MakePipeline, MakeTopic, Packets, StartService, alert, headers, inputs, service_config


@pytest.fixture(scope="session")
def d6_m7(shared_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of braai d6_m7, the survey's own network."""
    out = tmp_path_factory.mktemp("bundles") / "d6_m7"
    weights = next((shared_models / "braai").glob("*d6_m7*"))
    assert (
        main(
            ["models", "import", "braai", str(weights), "--normalisation", "row", "--name", "d6_m7", "--out", str(out)]
        )
        == 0
    )
    return out


def test_counters_by_topic_reason_and_outcome_are_zero_before_the_first_alert(
    start_service: StartService,
) -> None:
    config = service_config("127.0.0.1:1", "night", "me")  # no broker listens there, so nothing is read
    service = start_service(config | {"filters": [{"name": "rare", "where": "real > 0.999"}]})
    service.wait_until(lambda: service.get("/metrics")[0] == 200)

    text = service.get("/metrics")[1]
    counted = {}
    for name, label in (
        ("rejected_alerts", "reason"),
        ("published_records", "topic"),
        ("transactions", "outcome"),
        ("filter_passed_alerts", "filter"),
    ):
        found = re.findall(rf'^broker_filter_{name}_total{{{label}="(.*)"}} (\S+)$', text, re.MULTILINE)
        assert {value for _, value in found} == {"0.0"}
        counted[label] = {series for series, _ in found}
    assert counted == {
        "reason": set(RejectReason),
        "topic": {"me.scored", "me.rare", "me.dead-letter"},
        "outcome": {"committed", "aborted"},
        "filter": {"rare"},
    }
    assert "_created" not in text
    assert service.end() == 0


def test_scores_in_kafka_agree_with_the_survey_scores_while_a_flooded_topic_is_paused(
    make_pipeline: MakePipeline, packets: Packets, d6_m7: Path
) -> None:
    sent = packets[::4]
    pipeline = make_pipeline(sent, payload="full")
    flood = {"name": "flood", "where": "real >= 0", "max_rate": 0.5, "over_rate": "pause"}
    service = pipeline.start(models=[str(d6_m7)], filters=[flood])

    everything = pipeline.read("scored", "flood", expected=len(sent))
    records = [record for record in everything if record.topic().endswith(".scored")]

    results = {headers(record)["input"]: alert(record.value())["broker_filter"]["filters"] for record in records}
    assert all(one["name"] == "flood" and one["passed"] for [one] in results.values())
    published = {headers(record)["input"] for record in everything if record.topic().endswith(".flood")}
    assert {place for place, [one] in results.items() if not one["paused"]} == published
    assert len(published) < len(sent)
    service.wait_until(lambda: service.metric('filter_paused{filter="flood"}') == 1)
    assert service.metric('filter_passed_alerts_total{filter="flood"}') == len(sent)
    assert inputs(records) == Counter(f"{pipeline.topic}/{i % 2}/{i // 2}" for i in range(len(sent)))
    compared = 0
    for record in records:
        out = alert(record.value())
        candidate = out["candidate"]
        if candidate.get("drbversion") == "d6_m7" and candidate["candid"] != 472263571115115000:
            (scores,) = out["broker_filter"]["models"]
            assert math.isclose(scores["outputs"]["real"], candidate["drb"], abs_tol=1e-6)
            compared += 1
        assert record.key().decode() == out["objectId"]
        assert headers(record)["models"].startswith("d6_m7=")
    assert compared > 100
    assert service.end() == 0


BAD_PACKETS: dict[str, tuple[Callable[[bytes], bytes | None], RejectReason]] = {
    "truncated": (lambda packet: packet[: len(packet) // 2], RejectReason.TRUNCATED),
    "not Avro": (lambda _: b"GET / HTTP/1.1\r\n\r\n", RejectReason.NOT_AVRO),
    "unknown schema id": (lambda _: b"\0\0\0\x03\xe8" + bytes(100), RejectReason.UNKNOWN_SCHEMA_ID),
    "unknown survey": (lambda _: other_survey(), RejectReason.UNKNOWN_SURVEY),
    "missing cutout": (lambda packet: with_stamp(packet, None), RejectReason.MISSING_CUTOUT),
    "stamp that cannot be decompressed": (
        lambda packet: with_stamp(packet, b"\x1f\x8b\x08" + bytes(50)),
        RejectReason.BAD_CUTOUT,
    ),
    "all-NaN stamp": (lambda packet: with_stamp(packet, nan_stamp()), RejectReason.BLANK_CUTOUT),
    "empty": (lambda _: b"", RejectReason.EMPTY),
    "tombstone": (lambda _: None, RejectReason.EMPTY),
}


def other_survey() -> bytes:
    buffer = io.BytesIO()
    schema = {"type": "record", "name": "weather", "fields": [{"name": "seeing", "type": "double"}]}
    fastavro.writer(buffer, schema, [{"seeing": 1.4}])
    return buffer.getvalue()


def with_stamp(packet: bytes, stamp: bytes | None) -> bytes:
    """Return the packet with another science stamp, or with none."""
    reader = fastavro.reader(io.BytesIO(packet))
    (record,) = reader
    assert isinstance(record, dict)
    record["cutoutScience"] = stamp and {"fileName": "x.fits.gz", "stampData": stamp}
    buffer = io.BytesIO()
    assert isinstance(reader.writer_schema, dict)
    fastavro.writer(buffer, reader.writer_schema, [record])
    return buffer.getvalue()


def nan_stamp() -> bytes:
    import gzip

    import numpy as np
    from astropy.io import fits

    buffer = io.BytesIO()
    fits.PrimaryHDU(np.full((63, 63), np.nan, dtype=">f4")).writeto(buffer)
    return gzip.compress(buffer.getvalue())


@pytest.mark.kafka
def test_each_bad_packet_is_one_dead_letter_and_the_others_are_scored(
    make_pipeline: MakePipeline, packets: Packets
) -> None:
    good = packets[-50:]
    bad = {name: make(good[0]) for name, (make, _) in BAD_PACKETS.items()}
    pipeline = make_pipeline([*good, *bad.values()])
    service = pipeline.start()

    records = pipeline.read("scored", "dead-letter", expected=len(good) + len(bad))

    letters = [record for record in records if record.topic().endswith("dead-letter")]
    assert len(records) - len(letters) == len(good)
    expected = Counter((reason.value, bad[name] or b"") for name, (_, reason) in BAD_PACKETS.items())
    assert Counter((headers(letter)["reason"], letter.value() or b"") for letter in letters) == expected
    assert all(headers(letter)["detail"] and headers(letter)["input"] for letter in letters)
    service.wait_consumed(len(good) + len(bad))
    assert service.metric("scored_alerts_total") == len(good)
    assert service.metric("dead_letters_total") == len(bad)
    assert service.metric('rejected_alerts_total{reason="empty"}') == 2
    assert service.metric("unaccounted_alerts") == 0
    assert service.end() == 0


@pytest.mark.kafka
def test_message_of_100_mb_is_a_complete_dead_letter(make_pipeline: MakePipeline, packets: Packets) -> None:
    huge = bytes(range(256)) * (100_000_000 // 256)
    pipeline = make_pipeline([packets[-1], huge, packets[-2]])
    service = pipeline.start()

    records = pipeline.read("scored", "dead-letter", expected=3)

    (letter,) = [record for record in records if record.topic().endswith("dead-letter")]
    assert len(records) == 3
    assert headers(letter)["reason"] == "too_large"
    assert letter.value() == huge
    assert service.end() == 0


@pytest.mark.kafka
def test_record_larger_than_its_topic_allows_is_shortened_or_a_dead_letter(
    make_pipeline: MakePipeline, kafka_bootstrap: str, packets: Packets, make_topic: MakeTopic
) -> None:
    packet = packets[-1]
    letter_bytes = len(packet) + 5_000
    pipeline = make_pipeline([packet, b"no Avro" * letter_bytes], payload="full")
    for name, size in (("scored", 20_000), ("dead-letter", letter_bytes)):
        limit = {"max.message.bytes": str(size)}
        make_topic(kafka_bootstrap, name=f"{pipeline.prefix}.{name}", configuration=limit)
    service = pipeline.start()

    records = pipeline.read("scored", "dead-letter", expected=2)

    letters = {headers(record)["reason"]: record for record in records}
    assert letters["too_large"].value() == packet
    assert f"{pipeline.prefix}.scored accepts no record of" in headers(letters["too_large"])["detail"]
    cut = letters["not_avro"].value()
    assert (b"no Avro" * letter_bytes).startswith(cut)
    assert len(cut) > letter_bytes / 2
    assert headers(letters["not_avro"])[TRUNCATED] == str(7 * letter_bytes)
    service.wait_consumed(2)
    assert service.metric("unaccounted_alerts") == 0
    assert service.end() == 0


@pytest.mark.kafka
def test_no_record_is_larger_than_the_configured_limit_of_the_producer(
    make_pipeline: MakePipeline, packets: Packets
) -> None:
    huge = b"no Avro" * 100_000
    pipeline = make_pipeline([huge, packets[0]], partitions=1, kafka={"message.max.bytes": 200_000})
    service = pipeline.start()

    letter, scored = pipeline.read("scored", "dead-letter", expected=2)
    if letter.topic().endswith("scored"):
        letter, scored = scored, letter

    assert huge.startswith(letter.value())
    assert headers(letter)[TRUNCATED] == str(len(huge))
    assert scored.topic() == f"{pipeline.prefix}.scored"
    assert service.end() == 0


@pytest.mark.kafka
def test_positions_topic_that_deletes_old_records_is_refused(
    make_pipeline: MakePipeline, second_kafka_bootstrap: str, make_topic: MakeTopic
) -> None:
    pipeline = make_pipeline(target=second_kafka_bootstrap)
    positions = f"{pipeline.prefix}.positions"
    make_topic(second_kafka_bootstrap, name=positions, partitions=1)  # with the broker's default settings
    service = pipeline.start()

    assert service.wait_ended() == 1
    assert f"topic {positions} has cleanup.policy=delete" in service.log
    assert "set it to compact" in service.log


@pytest.mark.kafka
def test_sigterm_commits_alerts_in_flight_and_the_next_start_continues(
    make_pipeline: MakePipeline, packets: Packets
) -> None:
    sent = packets[:600]
    pipeline = make_pipeline(sent[:300])
    pipeline.config["transaction"] = {"linger_ms": 60_000, "max_alerts": 100_000, "max_ms": 60_000}
    first = pipeline.start()
    first.wait_until(lambda: first.metric("batch_alerts_sum") >= 100)
    assert first.metric("consumed_alerts_total") == 0  # nothing is committed yet
    assert first.end() == 0
    drained = pipeline.read("scored", expected=100)

    pipeline.send(sent[300:])
    second = pipeline.start()
    second.wait_until(lambda: second.metric("batch_alerts_sum") >= len(sent) - len(drained))
    assert second.end() == 0

    assert len(drained) >= 100
    everything = pipeline.read("scored", expected=len(sent))
    assert len(everything) == len(inputs(everything)) == len(sent)


@pytest.mark.kafka
def test_single_alert_is_committed_without_waiting_for_others(make_pipeline: MakePipeline, packets: Packets) -> None:
    pipeline = make_pipeline([packets[0]])
    service = pipeline.start(transaction={"max_alerts": 100_000, "max_ms": 600_000})
    service.wait_until(lambda: service.metric("scored_alerts_total") == 1)
    assert service.end() == 0


@pytest.mark.kafka
def test_duplicate_alerts_are_counted_and_dropped_if_configured(make_pipeline: MakePipeline, packets: Packets) -> None:
    some = packets[-30:]
    pipeline = make_pipeline([*some, *some[:10]], partitions=1)
    service = pipeline.start(duplicates="drop")

    service.wait_consumed(40)

    assert service.metric("duplicate_alerts_total") == 10
    assert service.metric("scored_alerts_total") == 30
    assert service.metric("unaccounted_alerts") == 0
    assert len(pipeline.read("scored", expected=30)) == 30
    assert service.end() == 0


@pytest.mark.kafka
def test_anomalies_are_published_with_score_reason_and_neighbours(
    make_pipeline: MakePipeline, packets: Packets, shared_data: Path, tmp_path: Path
) -> None:
    reference, archive = tmp_path / "ordinary.safetensors", shared_data / "ztf" / "ztf_alerts.tar"
    assert main(["reference", "build", str(archive), "--out", str(reference)]) == 0
    sent = packets[::2]
    pipeline = make_pipeline(sent)
    service = pipeline.start(models=["embedder"], anomalies={"reference": str(reference), "rate": 0.1})

    scored = [alert(record.value()) for record in pipeline.read("scored", expected=len(sent))]
    judged = [one["alert_id"] for one in scored if one["broker_filter"]["anomaly"]]
    flagged = {one["alert_id"] for one in scored if (one["broker_filter"]["anomaly"] or {}).get("flag")}
    records = pipeline.read("anomalies", expected=len(flagged))
    anomalies = [alert(record.value()) for record in records]

    assert 0.05 < len(flagged) / len(judged) < 0.2
    assert sorted(one["alert_id"] for one in anomalies) == sorted(flagged)
    for one in anomalies:
        anomaly, [model] = one["broker_filter"]["anomaly"], one["broker_filter"]["models"]
        assert anomaly["score"] > anomaly["threshold"]
        assert len(anomaly["reason"]["neighbours"]) == 5
        assert anomaly["reason"]["most_unlike"] in {"image", "light_curve", "metadata"}
        assert len(model["embedding"]) == 96
    service.wait_until(lambda: service.metric("judged_alerts_total") == len(judged))
    assert service.metric("anomalous_alerts_total") == len(flagged)
    assert service.metric("anomaly_rate") == pytest.approx(len(flagged) / len(judged))
    assert service.end() == 0


def test_service_works_with_the_embedded_broker_of_the_demonstration(
    make_pipeline: MakePipeline, packets: Packets, tmp_path: Path
) -> None:
    from broker_filter.local_kafka import embedded_broker

    with embedded_broker(tmp_path) as bootstrap:
        pipeline = make_pipeline(packets[:100], source=bootstrap)
        service = pipeline.start()
        assert len(pipeline.read("scored", expected=100)) == 100
        assert service.end() == 0


@pytest.mark.kafka
def test_topic_that_is_created_later_is_read_from_its_beginning(
    make_pipeline: MakePipeline,
    kafka_bootstrap: str,
    packets: Packets,
    make_topic: MakeTopic,
    unique_name: Callable[[str], str],
) -> None:
    topic = unique_name("ztf")
    pipeline = make_pipeline(topic=topic)
    pipeline.config["input"] |= {"start": "latest", "kafka": {"topic.metadata.refresh.interval.ms": 500}}
    service = pipeline.start()
    service.wait_for_log(f"waiting for a topic: Subscribed topic not available: {topic}")
    service.wait_until(lambda: f"not joined yet: Subscribed topic not available: {topic}" in service.get("/readyz")[1])

    make_topic(kafka_bootstrap, packets[:20], name=topic)

    assert len(pipeline.read("scored", expected=20)) == 20
    service.wait_ready()
    assert service.end() == 0


@pytest.mark.kafka
def test_missing_start_position_is_an_error(make_pipeline: MakePipeline, packets: Packets) -> None:
    pipeline = make_pipeline([packets[0]])
    del pipeline.config["input"]["start"]
    service = pipeline.start()

    assert service.wait_ended() == 1
    assert "set input.start to earliest, latest or a time" in service.log
    assert "Traceback" not in service.log


@pytest.mark.kafka
def test_output_topic_as_input_is_refused_for_every_address_of_the_cluster(
    make_pipeline: MakePipeline, kafka_bootstrap: str, make_topic: MakeTopic, unique_name: Callable[[str], str]
) -> None:
    pipeline = make_pipeline(target=f"{kafka_bootstrap},{kafka_bootstrap}")
    pipeline.config["output"]["prefix"] = prefix = unique_name("filter")
    pipeline.config["input"]["topics"] = [make_topic(kafka_bootstrap, name=f"{prefix}.scored")]
    service = pipeline.start()

    assert service.wait_ended() == 1
    assert f"{prefix}.scored would be read and written; choose another output.prefix" in service.log


@pytest.mark.kafka
def test_start_latest_reads_only_later_messages_even_after_a_kill_before_the_first_commit(
    make_pipeline: MakePipeline, packets: Packets
) -> None:
    old, new = [packets[a:b] for a, b in ((0, 10), (10, 30))]
    pipeline = make_pipeline(old)
    pipeline.config["input"] |= {"start": "latest", "kafka": {"session.timeout.ms": 6000}}
    first = pipeline.start()
    first.wait_for_log(f"reading {pipeline.topic}/1 from offset 5")
    first.end(signal.SIGKILL)
    pipeline.send(new)

    second = pipeline.start()

    records = pipeline.read("scored", expected=len(new))
    assert sorted(headers(record)["input"].rpartition("/")[2] for record in records) == sorted(
        str(5 + i // 2) for i in range(len(new))
    )
    assert second.end() == 0


@pytest.mark.kafka
def test_stage_without_progress_ends_the_process(make_pipeline: MakePipeline) -> None:
    # The stage `read` waits a tenth of a second for a first message, longer than this timeout; no other stage works.
    service = make_pipeline().start(stall_timeout_s=0.01)

    assert service.wait_ended() == 1
    assert "stage read is stuck" in service.log
    assert "most recent call first" in service.log


def test_user_signals_are_ignored_and_sigquit_drains_the_service(make_pipeline: MakePipeline, packets: Packets) -> None:
    packets = packets[:20]
    pipeline = make_pipeline(packets[:10])
    service = pipeline.start()
    service.wait_consumed(10)

    for ignored in (signal.SIGUSR1, signal.SIGUSR2):
        service.process.send_signal(ignored)
    pipeline.send(packets[10:])
    service.wait_consumed(20)

    assert service.end(signal.SIGQUIT) == 0
    assert "stopping: committing the messages in flight" in service.log
    assert len(pipeline.read("scored", expected=20)) == 20
