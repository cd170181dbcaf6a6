"""Missing rights on a cluster: the service reports each one, and continues when the right is granted."""

from __future__ import annotations

import os
import re
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from confluent_kafka import Producer
from confluent_kafka.admin import (
    AclBinding,
    AclBindingFilter,
    AclOperation,
    AclPermissionType,
    AdminClient,
    NewTopic,
    ResourcePatternType,
    ResourceType,
)

from broker_filter.cli import main
from broker_filter.local_kafka import KafkaCluster

from ..conftest import CHECKOUT
from .conftest import MakePipeline, Packets, Pipeline, RunningService, inputs

USER, PASSWORD = "alice", "the password of alice"
ACCESS_RULES = {
    "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
    "super.users": "User:ANONYMOUS;User:admin",  # ANONYMOUS: connections between the nodes
    "listener.security.protocol.map": "CLIENT:SASL_PLAINTEXT,INTERNAL:PLAINTEXT,CONTROLLER:PLAINTEXT",
    "sasl.enabled.mechanisms": "PLAIN",
    "listener.name.client.plain.sasl.jaas.config": (
        f'org.apache.kafka.common.security.plain.PlainLoginModule required user_admin="admin" user_{USER}="{PASSWORD}";'
    ),
}
ENVIRONMENT = {**os.environ, "PASSWORD": PASSWORD}
KINDS = {"--topic", "--group", "--transactional-id"}
SOON_S = 15.0
"""Seconds in which a service that has nothing to drain must end; Kubernetes kills it after 30 s."""

Rule = tuple[str, str, str]
"""Operation, resource type and resource name (`x*` matches all names that begin with x)."""

pytestmark = pytest.mark.kafka


@pytest.fixture(scope="module")
def guarded(start_cluster: Callable[..., KafkaCluster]) -> KafkaCluster:
    """One node of Apache Kafka that allows only operations that are granted."""
    return start_cluster(overrides=ACCESS_RULES)


@pytest.fixture(scope="module")
def admin_properties(guarded: KafkaCluster) -> dict[str, str]:
    return {
        "bootstrap.servers": guarded.bootstrap_servers,
        "security.protocol": "SASL_PLAINTEXT",
        "sasl.mechanism": "PLAIN",
        "sasl.username": "admin",
        "sasl.password": "admin",
    }


class Grants:
    """The access rules of one user on a cluster."""

    def __init__(self, properties: dict[str, str]) -> None:
        self._admin = AdminClient(properties)

    def allow(self, *rules: Rule) -> None:
        bindings = [AclBinding(*self._fields(rule)) for rule in rules]
        for answer in self._admin.create_acls(bindings).values():
            answer.result()
        time.sleep(0.5)  # until the authorizer has loaded them

    def remove(self, *rules: Rule) -> None:
        for answer in self._admin.delete_acls([AclBindingFilter(*self._fields(rule)) for rule in rules]).values():
            assert answer.result()
        time.sleep(0.5)

    def run(self, command: str) -> None:
        """Apply a kafka-acls.sh command that a message of the service recommends."""
        words = shlex.split(command)
        assert words[0] == "kafka-acls.sh"
        given = dict(pairwise(words))
        assert given["--allow-principal"] == f"User:{USER}"
        (kind,) = KINDS.intersection(given)
        star = "*" if given.get("--resource-pattern-type") == "prefixed" else ""
        operations = [value for option, value in pairwise(words) if option == "--operation"]
        self.allow(*((operation, kind.removeprefix("--"), given[kind] + star) for operation in operations))

    @staticmethod
    def _fields(rule: Rule) -> tuple[Any, ...]:
        operation, kind, name = rule
        return (
            ResourceType[kind.upper().replace("-", "_")],
            name.removesuffix("*"),
            ResourcePatternType.PREFIXED if name.endswith("*") else ResourcePatternType.LITERAL,
            f"User:{USER}",
            "*",
            next(one for one in AclOperation if one.name.replace("_", "") == operation.upper()),
            AclPermissionType.ALLOW,
        )


@pytest.fixture
def grants(admin_properties: dict[str, str]) -> Grants:
    return Grants(admin_properties)


def documented(topic: str | None, group: str, prefix: str) -> list[Rule]:
    """Return the rights that docs/how-to/connect.md grants; `topic` is None if the input is on another cluster."""
    return documented_rules(slice(0, 4) if topic else slice(2, 5), topic or "", group, prefix)


def documented_for_redrive(prefix: str) -> list[Rule]:
    """Return the rights that docs/how-to/connect.md grants for `redrive`, besides those of the service."""
    return documented_rules(slice(5, 7), "", "", prefix)


def documented_rules(part: slice, topic: str, group: str, prefix: str) -> list[Rule]:
    """Return the rights that a part of the commands in docs/how-to/connect.md grants."""
    text = (CHECKOUT / "docs" / "how-to" / "connect.md").read_text().replace("\\\n", "")
    commands = [line.split()[1:] for line in text.splitlines() if line.startswith("$acl ")]
    assert len(commands) == 7
    names = {"ztf_": topic, "me-filter": group, "me.": f"{prefix}.*", "me/": f"{prefix}/*"}
    names |= {f"me.{name}": f"{prefix}.{name}" for name in ("positions", "dead-letter", "redriven")}
    rules = []
    for words in commands[part]:
        given = dict(pairwise(words))
        (kind,) = KINDS.intersection(given)
        operations = [value for option, value in pairwise(words) if option == "--operation"]
        rules += [(operation, kind.removeprefix("--"), names[given[kind]]) for operation in operations]
    return rules


SASL = {"sasl": {"mechanism": "PLAIN", "username": USER, "password": {"env": "PASSWORD"}}}


@pytest.fixture
def make_guarded(make_pipeline: MakePipeline, admin_properties: dict[str, str]) -> MakePipeline:
    """Return a function that makes a pipeline within the guarded cluster, or from a `plain` cluster into it."""

    def make(plain: str | None, messages: Sequence[bytes] = (), topic: str | None = None) -> Pipeline:
        if plain:
            return make_pipeline(messages, topic=topic, source=plain, target=admin_properties, **SASL)
        pipeline = make_pipeline(messages, topic=topic, source=admin_properties)
        pipeline.config["input"] |= SASL
        return pipeline

    return make


def end_soon(service: RunningService) -> int:
    """Send SIGTERM and return the exit status; fail if the service needs longer than SOON_S."""
    began = time.monotonic()
    status = service.end()
    assert time.monotonic() - began < SOON_S, service.log
    return status


@pytest.fixture(params=["one cluster", "two clusters"])
def plain(request: pytest.FixtureRequest) -> str | None:
    """Brokers of the input if they are not those of the output; otherwise None."""
    return None if request.param == "one cluster" else str(request.getfixturevalue("kafka_bootstrap"))


@dataclass
class Unwritable:
    """A service that may write positions but no other output."""

    pipeline: Pipeline
    service: RunningService
    sent: int


@pytest.fixture
def unwritable(
    make_guarded: MakePipeline,
    packets: Packets,
    plain: str | None,
    grants: Grants,
) -> Unwritable:
    packets = packets[:20]
    pipeline = make_guarded(plain, packets)
    prefix = pipeline.prefix
    rules = documented(None if plain else pipeline.topic, prefix, prefix)
    grants.allow(*(rule for rule in rules if rule != ("Write", "topic", f"{prefix}.*")))
    grants.allow(("Write", "topic", f"{prefix}.positions"))
    service = pipeline.start(ENVIRONMENT)
    service.wait_until(lambda: "kafka-acls.sh" in service.get("/readyz")[1])
    return Unwritable(pipeline, service, len(packets))


def test_missing_write_right_is_reported_at_every_attempt_and_does_not_delay_the_end(unwritable: Unwritable) -> None:
    service, prefix = unwritable.service, unwritable.pipeline.prefix
    aborted = 'transactions_total{outcome="aborted"}'
    before = service.metric(aborted)

    def tried_again() -> bool:
        status, reason = service.get("/readyz")
        assert status == 503
        assert f"User:{USER} lacks Write on topic {prefix}.scored" in reason
        return service.metric(aborted) > before

    service.wait_until(tried_again)
    assert "fenced" not in service.log
    assert len(service.log.splitlines()) < 40
    if end_soon(service):  # the status is 0 if nothing is in flight, between two attempts
        assert service.process.returncode == 1
        assert "the next start reads them again: User:alice lacks Write on topic" in service.log
    assert "Traceback" not in service.log
    assert "most recent call" not in service.log


def test_service_continues_when_the_missing_write_right_is_granted(unwritable: Unwritable, grants: Grants) -> None:
    service = unwritable.service
    for sentence in service.get("/readyz")[1].split("; "):
        if "grant it with: " in sentence:
            grants.run(sentence.partition("grant it with: ")[2])
    service.wait_consumed(unwritable.sent)
    service.wait_ready()
    assert service.end() == 0
    records = unwritable.pipeline.read("scored", expected=unwritable.sent)
    assert len(inputs(records)) == len(records) == unwritable.sent


IMPLIED = ("Describe", "Create")
"""Rights that are not missed: Read and Write include Describe, and Create is not needed if the topics exist."""


def test_check_names_each_missing_right_with_its_command_and_writes_no_record(
    make_guarded: MakePipeline,
    unique_name: Callable[[str], str],
    plain: str | None,
    grants: Grants,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pipeline, file = make_guarded(plain), tmp_path / "service.yaml"
    pipeline.config["input"]["group_id"] = group = unique_name("group")
    file.write_text(yaml.safe_dump(pipeline.config))
    monkeypatch.setenv("PASSWORD", PASSWORD)

    def check() -> list[str]:
        status = main(["config", "check", "--connect", str(file)])
        output, errors = capsys.readouterr()
        assert PASSWORD not in output + errors
        found = [line for line in errors.splitlines() if line.startswith("broker-filter: ")]
        assert status == (1 if found else 0)
        assert ("the service has every right" in output) == (not found)
        return found

    rules = documented(None if plain else pipeline.topic, group, pipeline.prefix)
    grants.allow(*rules)
    assert check() == []
    for rule in rules:
        operation, _, name = rule
        if operation in IMPLIED:
            continue
        grants.remove(rule)
        missing = check()
        assert missing
        for sentence in missing:
            lacks, _, command = sentence.partition("; grant it with: ")
            assert f"User:{USER} lacks {operation}" in lacks
            assert name.removesuffix("*") in lacks
            grants.run(command)
        assert check() == []
    assert pipeline.read("scored", "dead-letter", *(["positions"] if plain else []), expected=0) == []


def test_check_reports_an_unreachable_cluster_and_a_wrong_password(
    make_guarded: MakePipeline,
    guarded: KafkaCluster,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "service.yaml"
    file.write_text(yaml.safe_dump(make_guarded("127.0.0.1:1", topic="ztf").config))
    monkeypatch.setenv("PASSWORD", "another password")
    assert main(["config", "check", "--connect", str(file)]) == 1
    errors = capsys.readouterr().err
    assert "input brokers 127.0.0.1:1: " in errors
    assert f"output brokers {guarded.bootstrap_servers}: authentication failed, check `sasl`" in errors
    assert "another password" not in errors


@pytest.mark.parametrize(
    ("withheld", "right"),
    [
        (("Write", "transactional-id"), "Write on every transactional-id that begins with {prefix}/"),
        (("DescribeConfigs", "topic"), "DescribeConfigs on topic {prefix}."),
        (("Create", "topic"), "Describe and Create on topic {prefix}."),
    ],
)
def test_service_that_cannot_start_ends_and_names_the_right_to_grant(
    make_guarded: MakePipeline,
    plain: str | None,
    grants: Grants,
    withheld: tuple[str, str],
    right: str,
) -> None:
    pipeline = make_guarded(plain)
    prefix = pipeline.prefix
    rules = documented(None if plain else pipeline.topic, prefix, prefix)
    grants.allow(*(rule for rule in rules if rule[:2] != withheld))

    service = pipeline.start(ENVIRONMENT)
    assert service.wait_ended() == 1
    assert f"User:{USER} lacks {right.format(prefix=prefix)}" in service.log
    assert "grant it with: kafka-acls.sh" in service.log
    assert "Traceback" not in service.log


def test_reload_that_adds_a_topic_fails_until_each_right_on_it_is_granted(
    make_guarded: MakePipeline, packets: Packets, grants: Grants
) -> None:
    pipeline = make_guarded(None, packets[:10])
    prefix = pipeline.prefix
    rules = documented(pipeline.topic, prefix, prefix)
    for operation, kind, name in rules:
        names = [f"{prefix}.scored", f"{prefix}.dead-letter"] if name == f"{prefix}.*" else [name]
        grants.allow(*((operation, kind, one) for one in names))
    service = pipeline.start(ENVIRONMENT)
    service.wait_consumed(10)

    lacking: list[str] = []
    config = pipeline.config | {"filters": [{"name": "all", "where": "magpsf > 0"}]}
    while (service.reload(config) or service.metric("last_reload_failed")) and len(lacking) < 5:
        for sentence, command in re.findall("(lacks [^;]*); grant it with: ([^;]*)", service.get("/readyz")[1]):
            lacking.append(sentence)
            grants.run(command)
    assert "lacks Describe and Create on topic" in lacking[0]
    assert any("lacks Write" in sentence for sentence in lacking)
    assert all(f"on topic {prefix}.all" in sentence for sentence in lacking)
    pipeline.send(packets[10:20])
    service.wait_consumed(20)
    assert len(pipeline.read("all", expected=10)) == 10
    assert service.end() == 0


@pytest.mark.parametrize(
    "withheld",
    [("topic", ["Read"]), ("topic", ["Read", "Describe"]), ("group", ["Read"])],
    ids=["Read on the topic", "Read and Describe on the topic", "Read on the group"],
)
def test_missing_read_right_is_reported_until_it_is_granted(
    make_guarded: MakePipeline,
    packets: Packets,
    grants: Grants,
    withheld: tuple[str, list[str]],
) -> None:
    kind, operations = withheld
    pipeline = make_guarded(None, packets[:10])
    topic, prefix = pipeline.topic, pipeline.prefix
    rules = documented(topic, prefix, prefix)
    missing = [rule for rule in rules if rule[1] == kind and rule[2] in (topic, prefix) and rule[0] in operations]
    assert len(missing) == len(operations)
    grants.allow(*(rule for rule in rules if rule not in missing))

    service = pipeline.start(ENVIRONMENT)
    service.wait_until(lambda: f"User:{USER} lacks Read" in service.get("/readyz")[1])
    assert service.get("/readyz")[0] == 503
    assert f"on {kind} {missing[0][2]}; grant it with: kafka-acls.sh" in service.log
    grants.allow(*missing)
    service.wait_consumed(10)
    service.wait_ready()
    assert service.end() == 0


def test_commands_for_operators_need_the_documented_rights_and_name_missing_ones(
    make_guarded: MakePipeline,
    admin_properties: dict[str, str],
    plain: str | None,
    grants: Grants,
    packets: Packets,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PASSWORD", PASSWORD)
    pipeline = make_guarded(plain, packets[:4])
    prefix, file = pipeline.prefix, tmp_path / "service.yaml"
    grants.allow(*documented(None if plain else pipeline.topic, prefix, prefix))
    file.write_text(yaml.safe_dump(pipeline.config))

    assert main(["positions", "set", "--config", str(file), "--offset", "end", "--yes"]) == 0
    assert main(["positions", "show", "--config", str(file)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[1:6] == ["1", "2", "0", "2", "0"]

    topic = f"{prefix}.dead-letter"
    admin = AdminClient(admin_properties)
    admin.create_topics([NewTopic(topic, 1, -1)])[topic].result()
    producer = Producer(admin_properties)
    producer.produce(topic, packets[0], headers=[("input", b"a/b/0/7"), ("reason", b"corrupt"), ("scored", b"")])
    assert producer.flush(30) == 0
    granted = []
    for n_done in (1, 0):  # the first run has nothing to read in the topic that it fills
        while main(["redrive", "--config", str(file)]):
            command = capsys.readouterr().err.partition("grant it with: ")[2]
            grants.run(command)
            granted.append(("Read", "topic", dict(pairwise(shlex.split(command)))["--topic"]))
            assert len(granted) <= len(documented_for_redrive(prefix)), granted
        assert f"{n_done} dead letters scored again" in capsys.readouterr().out
    assert granted == documented_for_redrive(prefix)
