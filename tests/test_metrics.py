"""Metrics in the text format of Prometheus."""

from __future__ import annotations

from collections import Counter

from prometheus_client.parser import text_string_to_metric_families

from broker_filter.metrics import MAX_VERSIONS, Metrics
from broker_filter.packets.batch import Survey
from broker_filter.packets.rejects import RejectReason
from broker_filter.streaming.account import Account, AlertSchema
from broker_filter.streaming.drift import Drift


def samples(metrics: Metrics) -> dict[tuple[str, ...], float]:
    """Return the values of all samples, by name and values of the labels."""
    families = text_string_to_metric_families(metrics.exposition().decode())
    return {(one.name, *one.labels.values()): one.value for family in families for one in family.samples}


def test_committed_transaction_counts_all_its_alerts_and_records() -> None:
    metrics = Metrics()
    accounts = [
        Account(consumed=1, scored=1, sent=[0.0], exposed=[0.0]),
        Account(consumed=2, duplicates=1, rejected=Counter({RejectReason.BAD_CUTOUT: 1})),
    ]
    metrics.commit(accounts, Counter({"me.scored": 2, "me.dead-letter": 1}), "me.dead-letter")
    metrics.abort()

    found = samples(metrics)
    assert found["broker_filter_consumed_alerts_total",] == 3
    assert found["broker_filter_scored_alerts_total",] == 1
    assert found["broker_filter_duplicate_alerts_total",] == 1
    assert found["broker_filter_rejected_alerts_total", "bad_cutout"] == 1
    assert found["broker_filter_unaccounted_alerts",] == 0
    assert found["broker_filter_published_records_total", "me.scored"] == 2
    assert found["broker_filter_dead_letters_total",] == 1
    assert found["broker_filter_transactions_total", "committed"] == 1
    assert found["broker_filter_transactions_total", "aborted"] == 1
    assert found["broker_filter_producer_latency_seconds_count",] == 1
    assert found["broker_filter_exposure_latency_seconds_count",] == 1


def test_series_known_before_the_first_event_start_at_zero() -> None:
    metrics = Metrics()
    metrics.expect(topics=["me.scored", "me.rare"], stages=["score"])
    found = samples(metrics)
    rejected = {labels[0]: value for (name, *labels), value in found.items() if name.endswith("rejected_alerts_total")}
    assert rejected == dict.fromkeys(RejectReason, 0)
    for topic in ("me.scored", "me.rare"):
        assert found["broker_filter_published_records_total", topic] == 0
    assert found["broker_filter_stage_seconds_count", "score"] == 0
    metrics.commit([Account()], Counter({"me.rare": 1}), "me.dead-letter")
    assert samples(metrics)["broker_filter_published_records_total", "me.rare"] == 1


def test_there_are_no_created_series() -> None:
    assert "_created" not in Metrics().exposition().decode()


def test_anomaly_rate_is_the_flagged_fraction_of_all_judged_alerts() -> None:
    metrics = Metrics()
    for judged, anomalous in ((6, 1), (4, 0), (0, 0)):
        accounts = [Account(consumed=6, scored=6, judged=judged, anomalous=anomalous)]
        metrics.commit(accounts, Counter(), "me.dead-letter")
    found = samples(metrics)
    assert found["broker_filter_judged_alerts_total",] == 10
    assert found["broker_filter_anomalous_alerts_total",] == 1
    assert found["broker_filter_anomaly_rate",] == 0.1


def test_alert_without_an_outcome_is_counted_as_unaccounted() -> None:
    metrics = Metrics()
    metrics.commit([Account(consumed=2, scored=1)], Counter(), "me.dead-letter")
    assert samples(metrics)["broker_filter_unaccounted_alerts",] == 1


def test_revoked_partition_has_no_lag_series() -> None:
    metrics = Metrics()
    metrics.set_partitions({("ztf", 0): 5, ("ztf", 1): 0})
    metrics.set_partitions({("ztf", 1): 7})
    found = samples(metrics)
    lags = {
        labels: value
        for (name, *labels), value in found.items()
        if name.endswith("consumer_lag_messages")
        for labels in [tuple(labels)]
    }
    assert set(lags.values()) == {7}
    assert found["broker_filter_assigned_partitions",] == 1


def test_schemas_are_counted_by_version_with_a_bounded_number_of_labels() -> None:
    metrics = Metrics()
    named = [AlertSchema(Survey.LSST, f"11.{minor}", f"{minor:016x}") for minor in range(MAX_VERSIONS + 5)]
    strange = [AlertSchema(Survey.ZTF, 'x"} 1\n' * 9, "a" * 16), AlertSchema(Survey.ZTF, "4.02", "b" * 16)]
    for writer in (*named, *named, *strange):
        metrics.commit([Account(consumed=1, scored=1, schemas=Counter({writer: 1}))], Counter(), "me.dead-letter")

    found = samples(metrics)
    assert found["broker_filter_decoded_alerts_total", "11.1", "lsst"] == 2
    assert found["broker_filter_decoded_alerts_total", "other", "lsst"] == 10
    assert found["broker_filter_decoded_alerts_total", "other", "ztf"] == 1
    assert found["broker_filter_decoded_alerts_total", "4.02", "ztf"] == 1
    assert found["broker_filter_writer_schemas", "lsst"] == MAX_VERSIONS + 5
    assert found["broker_filter_writer_schemas", "ztf"] == 2
    assert sum(sample[0] == "broker_filter_decoded_alerts_total" for sample in found) == MAX_VERSIONS + 3


def test_drift_is_absent_without_a_value() -> None:
    metrics = Metrics()
    metrics.set_drift({("ztf", "default"): 1200}, [Drift("ztf", "default", "magpsf", 0.3)])
    assert samples(metrics)["broker_filter_drift_psi", "default", "magpsf", "ztf"] == 0.3
    metrics.set_drift({("ztf", "default"): 900}, [])
    found = samples(metrics)
    assert found["broker_filter_drift_window_alerts", "default", "ztf"] == 900
    assert not any(sample[0] == "broker_filter_drift_psi" for sample in found)
