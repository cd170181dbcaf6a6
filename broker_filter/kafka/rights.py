"""Rights on a Kafka cluster: messages that name a missing right, and the command that grants it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from confluent_kafka import KafkaError
from confluent_kafka.admin import AclOperation

from broker_filter.config import Input, Output

REFUSED = (
    KafkaError.TOPIC_AUTHORIZATION_FAILED,
    KafkaError.GROUP_AUTHORIZATION_FAILED,
    KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED,
    KafkaError.CLUSTER_AUTHORIZATION_FAILED,
)
"""Error codes with which a broker refuses a request because of its access rules."""


@dataclass(frozen=True, slots=True)
class Right:
    """Operations on one resource or, if `prefixed`, on all resources whose names begin with `name`."""

    operations: tuple[str, ...]
    """Names of operations as in kafka-acls.sh."""
    resource: Literal["topic", "group", "transactional-id"]
    name: str
    prefixed: bool = False

    def __str__(self) -> str:
        of = f"every {self.resource} that begins with" if self.prefixed else self.resource
        return f"{' and '.join(self.operations)} on {of} {self.name}"


@dataclass(frozen=True, slots=True)
class ClusterAccount:
    """The service's account on a cluster: `principal` is its name in the cluster's access rules."""

    servers: str
    principal: str

    def lacks(self, right: Right) -> str:
        """Return a sentence that says that the right is missing and how to grant it."""
        return f"{self.principal} lacks {right}; grant it with: {self.command(right)}"

    def command(self, right: Right) -> str:
        """Return the command with which an administrator of the cluster grants the right."""
        operations = " ".join(f"--operation {operation}" for operation in right.operations)
        pattern = " --resource-pattern-type prefixed" if right.prefixed else ""
        return (
            f"kafka-acls.sh --bootstrap-server {self.servers} --command-config admin.properties --add "
            f"--allow-principal {self.principal} {operations} --{right.resource} {right.name}{pattern}"
        )


def account_of(section: Input | Output) -> ClusterAccount:
    """Return the account of a section's clients.

    Without a SASL user name the principal is unknown: `User:PRINCIPAL`.
    """
    user = section.sasl.username if section.sasl else section.kafka.get("sasl.username")
    return ClusterAccount(str(section.bootstrap_servers), f"User:{user}" if isinstance(user, str) else "User:PRINCIPAL")


def not_among(wanted: Sequence[str], allowed: Collection[AclOperation] | None) -> tuple[str, ...]:
    """Return the operations in `wanted` that are not allowed; none if the cluster does not report what is allowed."""
    names = {operation.name.replace("_", "").lower() for operation in allowed or ()}
    return tuple(operation for operation in wanted if names and operation.lower() not in names)
