"""What is said and what happens where a broker's access rules lack a right that the service needs."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from confluent_kafka.admin import (
    AclBinding,
    AclBindingFilter,
    AclOperation,
    AclPermissionType,
    AdminClient,
    ResourcePatternType,
    ResourceType,
)

from broker_filter.local_kafka import KafkaCluster

from .conftest import MakeTopic, ReadCommitted, RunningService, StartService, headers, service_config

USER, PASSWORD = "alice", "the password of alice"
ACCESS_RULES = {
    "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
    "super.users": "User:ANONYMOUS;User:admin",  # ANONYMOUS: the nodes among themselves
    "listener.security.protocol.map": "CLIENT:SASL_PLAINTEXT,INTERNAL:PLAINTEXT,CONTROLLER:PLAINTEXT",
    "sasl.enabled.mechanisms": "PLAIN",
    "listener.name.client.plain.sasl.jaas.config": (
        f'org.apache.kafka.common.security.plain.PlainLoginModule required user_admin="admin" user_{USER}="{PASSWORD}";'
    ),
}
ENVIRONMENT = {**os.environ, "PASSWORD": PASSWORD}
SOON_S = 15.0
"""The end of a service that drains nothing. Kubernetes kills after 30 s."""

Packets = list[tuple[int, bytes]]
Rule = tuple[str, str, str]
"""Operation, kind of resource, name (`x*` stands for all names that begin with x)."""

pytestmark = [pytest.mark.kafka, pytest.mark.shared]


@pytest.fixture(scope="module")
def guarded(start_cluster: Callable[..., KafkaCluster]) -> KafkaCluster:
    """One node of Apache Kafka on which nothing is allowed that is not granted."""
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
    """The rules of a cluster for one user."""

    def __init__(self, properties: dict[str, str]) -> None:
        self._admin = AdminClient(properties)

    def allow(self, *rules: Rule) -> None:
        bindings = [AclBinding(*self._fields(rule)) for rule in rules]
        for answer in self._admin.create_acls(bindings).values():
            answer.result()
        time.sleep(0.5)  # until the authorizer has them, too

    def remove(self, *rules: Rule) -> None:
        for answer in self._admin.delete_acls([AclBindingFilter(*self._fields(rule)) for rule in rules]).values():
            assert answer.result()
        time.sleep(0.5)

    def run(self, command: str) -> None:
        """Does what a kafka-acls.sh command does that a message recommends."""
        words = shlex.split(command)
        assert words[0] == "kafka-acls.sh"
        given = {words[i]: words[i + 1] for i in range(1, len(words) - 1) if words[i].startswith("--")}
        assert given["--allow-principal"] == f"User:{USER}"
        (kind,) = {"--topic", "--group", "--transactional-id"}.intersection(given)
        star = "*" if given.get("--resource-pattern-type") == "prefixed" else ""
        operations = [words[i + 1] for i, word in enumerate(words) if word == "--operation"]
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
    """The rights that deploy/README.md grants; `topic` is None where the input is on another cluster."""
    source = [("Read", "topic", topic), ("Describe", "topic", topic), ("Read", "group", group)] if topic else []
    elsewhere = [] if topic else [("Read", "topic", f"{prefix}.positions")]
    output = [(operation, "topic", f"{prefix}.*") for operation in ("Write", "Describe", "Create", "DescribeConfigs")]
    return [*source, *elsewhere, *output, ("Write", "transactional-id", f"{prefix}/*")]


def config_of(guarded: KafkaCluster, plain: str | None, topic: str, prefix: str) -> dict[str, Any]:
    """A service within the guarded cluster, or from a `plain` one into it."""
    sasl = {"sasl": {"mechanism": "PLAIN", "username": USER, "password": {"env": "PASSWORD"}}}
    if plain:
        return service_config(plain, topic, prefix, bootstrap_servers=guarded.bootstrap_servers, **sasl)
    config = service_config(guarded.bootstrap_servers, topic, prefix)
    config["input"] |= sasl
    return config


def end_soon(service: RunningService) -> int:
    """The exit status after SIGTERM, which must not take as long as a drain may."""
    began = time.monotonic()
    status = service.end()
    assert time.monotonic() - began < SOON_S, service.log
    return status


@contextmanager
def withdrawn(grants: Grants, *rules: Rule) -> Iterator[None]:
    grants.remove(*rules)
    yield


@pytest.fixture(params=["one cluster", "two clusters"])
def plain(request: pytest.FixtureRequest) -> str | None:
    """The input's brokers, where they are not the output's."""
    return None if request.param == "one cluster" else str(request.getfixturevalue("kafka_bootstrap"))


def test_missing_write_is_said_until_it_is_granted_and_holds_up_no_end(
    guarded: KafkaCluster,
    plain: str | None,
    admin_properties: dict[str, str],
    grants: Grants,
    ztf_packets: Packets,
    make_topic: MakeTopic,
    start_service: StartService,
    read_committed: ReadCommitted,
    unique_name: Callable[[str], str],
) -> None:
    packets = [packet for _, packet in ztf_packets[:20]]
    input_properties = {"bootstrap.servers": plain} if plain else admin_properties
    topic, prefix = make_topic(input_properties, packets), unique_name("filter")
    rules = documented(None if plain else topic, prefix, prefix)
    grants.allow(*(rule for rule in rules if rule != ("Write", "topic", f"{prefix}.*")))
    grants.allow(("Write", "topic", f"{prefix}.positions"))
    config = config_of(guarded, plain, topic, prefix)

    service = start_service(config, ENVIRONMENT)
    service.wait_until(lambda: "kafka-acls.sh" in service.get("/readyz")[1])
    for _ in range(15):  # through several attempts
        status, reason = service.get("/readyz")
        assert status == 503
        assert f"User:{USER} lacks Write on topic {prefix}.scored" in reason
        time.sleep(1)
    assert service.metric('transactions_total{outcome="aborted"}') > 0
    assert "fenced" not in service.log
    assert len(service.log.splitlines()) < 40
    assert end_soon(service) == 1
    assert "is read again at the next start: User:alice lacks Write on topic" in service.log
    assert "Traceback" not in service.log
    assert "most recent call" not in service.log

    service = start_service(config, ENVIRONMENT)
    service.wait_until(lambda: "kafka-acls.sh" in service.get("/readyz")[1])
    for sentence in service.get("/readyz")[1].split("; "):
        if "grant it with: " in sentence:
            grants.run(sentence.partition("grant it with: ")[2])
    grants.allow(("Write", "topic", f"{prefix}.*"))
    service.wait_until(lambda: service.metric("consumed_alerts_total") == len(packets))
    service.wait_ready()
    assert service.end() == 0
    records = read_committed(admin_properties, [f"{prefix}.scored"], len(packets))
    assert len({headers(record)["input"] for record in records}) == len(records) == len(packets)
