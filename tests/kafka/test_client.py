"""Properties, secrets and dated topics, and the log of errors that brokers report."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from confluent_kafka import KafkaError
from confluent_kafka.admin import NewTopic

from broker_filter.config import Input, Output, Sasl, SecretError, SecretFromEnvironment, SecretFromFile, Tls
from broker_filter.kafka.client import (
    RECORD_OVERHEAD_BYTES,
    REPEAT_INTERVAL_S,
    PropertyError,
    RecordLimits,
    ThrottledErrorLog,
    admin_client,
    client_properties,
    ensure_topics,
    output_section,
    topic_names,
)


def source(**options: object) -> Input:
    return Input(bootstrap_servers="survey:9092", group_id="g", topics=["t"], **options)  # type: ignore[arg-type]


def test_dated_topics_are_those_of_yesterday_and_today_in_utc() -> None:
    templates = ["ztf_%Y%m%d_programid1", "lsst-alerts-v11"]
    assert topic_names(templates, datetime(2026, 3, 1, 0, 0, 1, tzinfo=UTC)) == [
        "ztf_20260228_programid1",
        "ztf_20260301_programid1",
        "lsst-alerts-v11",
    ]


def test_secrets_come_from_files_and_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "password").write_text("from-file\n")
    monkeypatch.setenv("KEY_PASSWORD", "from-environment\n")  # as Kubernetes sets it from a file
    section = source(
        sasl=Sasl(username="alice", password=SecretFromFile(file=tmp_path / "password")),
        tls=Tls(key_password=SecretFromEnvironment(env="KEY_PASSWORD")),
        kafka={"sasl.oauthbearer.client.secret": SecretFromEnvironment(env="KEY_PASSWORD"), "client.id": "x"},
    )
    properties = client_properties(section)
    assert properties["security.protocol"] == "SASL_SSL"
    assert properties["sasl.mechanism"] == "SCRAM-SHA-512"
    assert properties["sasl.password"] == "from-file"
    assert properties["ssl.key.password"] == "from-environment"
    assert properties["sasl.oauthbearer.client.secret"] == "from-environment"
    assert properties["client.id"] == "x"
    assert "from-" not in repr(section)


def test_missing_secret_is_named(tmp_path: Path) -> None:
    with pytest.raises(SecretError, match="environment variable NO_SUCH_SECRET"):
        client_properties(source(sasl=Sasl(username="a", password=SecretFromEnvironment(env="NO_SUCH_SECRET"))))
    with pytest.raises(SecretError, match="no-such-file"):
        client_properties(source(sasl=Sasl(username="a", password=SecretFromFile(file=tmp_path / "no-such-file"))))


@pytest.mark.parametrize("name", ["isolation.level", "enable.auto.commit", "partition.assignment.strategy"])
def test_properties_that_exactly_once_needs_cannot_be_changed(name: str) -> None:
    with pytest.raises(PropertyError, match=rf"input\.kafka\.{name}: the service sets this property itself"):
        client_properties(source(kafka={name: "x"}))


def test_clients_send_no_metrics_to_brokers_unless_configured() -> None:
    assert client_properties(source())["enable.metrics.push"] is False
    assert client_properties(source(kafka={"enable.metrics.push": True}))["enable.metrics.push"] is True


def test_output_without_brokers_uses_the_connection_of_the_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "s")
    sasl = Sasl(username="alice", password=SecretFromEnvironment(env="SECRET"))
    here = output_section(source(sasl=sasl), Output(prefix="me"))
    elsewhere = output_section(source(sasl=sasl), Output(prefix="me", bootstrap_servers="ours:9092"))
    assert client_properties(here)["sasl.username"] == "alice"
    assert client_properties(here)["bootstrap.servers"] == "survey:9092"
    assert client_properties(elsewhere)["security.protocol"] == "PLAINTEXT"
    assert client_properties(elsewhere)["bootstrap.servers"] == "ours:9092"


@pytest.mark.kafka
def test_record_limit_of_a_new_topic_is_read(kafka_bootstrap: str, unique_name: Callable[[str], str]) -> None:
    admin = admin_client({"bootstrap.servers": kafka_bootstrap}, ThrottledErrorLog("test brokers"))
    for _ in range(5):  # a broker may not know a new topic yet
        topics = [unique_name("new") for _ in range(5)]
        ensure_topics(admin, [NewTopic(topic, 4, 1, config={"max.message.bytes": "32000000"}) for topic in topics])
        limits = RecordLimits(admin, topics, topics[-1])
        assert {limits.of(topic) for topic in topics} == {32_000_000 - RECORD_OVERHEAD_BYTES}


def test_an_error_is_logged_once_and_again_if_it_lasts(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    error_log = ThrottledErrorLog("input brokers survey:9092", clock=lambda: now)
    refused = KafkaError(KafkaError._AUTHENTICATION, "invalid credentials")
    with caplog.at_level(logging.WARNING):
        for _ in range(100):
            error_log(refused)
        assert caplog.messages == [
            "input brokers survey:9092: authentication failed, check `sasl` (mechanism, username, password) "
            "(invalid credentials)"
        ]
        now = REPEAT_INTERVAL_S
        error_log(refused)
        assert len(caplog.messages) == 2
