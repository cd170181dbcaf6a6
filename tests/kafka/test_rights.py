"""Messages about missing rights name the account, the operations and the command that grants them."""

from __future__ import annotations

from typing import Any

import pytest
from confluent_kafka.admin import AclOperation

from broker_filter.config import Input
from broker_filter.kafka.rights import ClusterAccount, Right, account_of, not_among

LOGIN = {"mechanism": "PLAIN", "username": "me", "password": {"env": "PASSWORD"}}


@pytest.mark.parametrize(
    ("keys", "principal"),
    [
        ({"sasl": LOGIN}, "User:me"),
        ({"kafka": {"sasl.username": "other"}}, "User:other"),
        ({}, "User:PRINCIPAL"),
    ],
)
def test_an_account_has_the_user_name_of_its_clients(keys: dict[str, Any], principal: str) -> None:
    section = Input.model_validate({"bootstrap_servers": "ours:9092", "group_id": "me-filter", "topics": ["a"], **keys})
    assert account_of(section) == ClusterAccount("ours:9092", principal)


def test_a_missing_right_is_named_with_the_command_that_grants_it() -> None:
    right = Right(("Write", "Create"), "topic", "me.", prefixed=True)
    sentence = ClusterAccount("ours:9092", "User:me").lacks(right)
    assert sentence == (
        "User:me lacks Write and Create on every topic that begins with me.; grant it with: kafka-acls.sh "
        "--bootstrap-server ours:9092 --command-config admin.properties --add --allow-principal User:me "
        "--operation Write --operation Create --topic me. --resource-pattern-type prefixed"
    )
    assert "prefixed" not in ClusterAccount("ours:9092", "User:me").command(Right(("Read",), "group", "me-filter"))


def test_operations_that_a_cluster_does_not_allow_are_found() -> None:
    allowed = [AclOperation.READ, AclOperation.DESCRIBE_CONFIGS]
    assert not_among(("Read", "Write", "DescribeConfigs", "Create"), allowed) == ("Write", "Create")
    assert not_among(("Read", "Write"), None) == ()
