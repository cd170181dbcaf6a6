"""Checks, before a service runs, that its clusters can be reached and that the account has every right it needs.

The check creates missing topics, as the service does at its start, but writes no record. It joins no group, so it does
not disturb a running service.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime

from confluent_kafka import KafkaException, Producer
from confluent_kafka.admin import AdminClient

from broker_filter.config import Input, Output, Service
from broker_filter.kafka.client import (
    CONNECT_TIMEOUT_S,
    PROPAGATION_PAUSE_S,
    REQUEST_TIMEOUT_S,
    Cluster,
    KafkaSetupError,
    ThrottledErrorLog,
    admin_client,
    ask_cluster,
    client_properties,
    ensure_topics,
    explain,
    librdkafka_log,
    missing_on_topics,
    output_section,
    topic_names,
)
from broker_filter.kafka.connect import OUTPUT_RIGHTS, output_topics
from broker_filter.kafka.rights import REFUSED, Right, account_of, not_among

POSITIONS_RIGHTS = ("Read", *OUTPUT_RIGHTS)
LAST_DAYS = range(8)
"""Numbers of days before now whose topics are checked. A survey keeps a topic for about a week, and creates the topic
of a day with the first alert of that day."""

log = logging.getLogger(__name__)


def problems(service: Service) -> Iterator[str]:
    """Yield a sentence for each problem that would keep the service from working; nothing if every check succeeds.

    Raises PropertyError or SecretError if the configuration of a client cannot be used.
    """
    source, output = service.input, output_section(service.input, service.output)
    input_end = _End(source, f"input brokers {source.bootstrap_servers}")
    output_end = _End(output, f"output brokers {output.bootstrap_servers}")
    yield from (end.trouble for end in (input_end, output_end) if end.trouble)
    if input_end.cluster:
        for right in (*input_end.missing_on_input(source), *input_end.missing_on_group(source.group_id)):
            yield f"{input_end.name}: {input_end.account.lacks(right)}"
    if input_end.cluster and output_end.cluster:
        separate_clusters = input_end.cluster.id != output_end.cluster.id
        for problem in output_end.problems_of_output(service, separate_clusters=separate_clusters):
            yield f"{output_end.name}: {problem}"


class _End:
    """One of the two clusters, checked with the service's account."""

    def __init__(self, section: Input | Output, name: str) -> None:
        """`name`: the name of the cluster in messages."""
        self.name = name
        self.account = account_of(section)
        self._properties = client_properties(section)
        error_log = ThrottledErrorLog(name)
        self._admin: AdminClient = admin_client(self._properties, error_log)
        self.cluster: Cluster | None = None
        self.trouble = ""
        """Why `cluster` is None; empty otherwise."""
        try:
            self.cluster = ask_cluster(self._admin, self._properties, error_log)
        except KafkaSetupError as error:
            self.trouble = str(error)

    def missing_on_input(self, source: Input) -> Iterator[Right]:
        """Yield the missing rights on the input topics. For a template, one right covers the topics of all days."""
        for template in source.topics:
            names = topic_names([template], datetime.now(UTC), LAST_DAYS)
            missing = missing_on_topics(self._admin, dict.fromkeys(names, ("Read", "Describe")))
            if missing and len(names) > 1:
                operations = tuple(dict.fromkeys(operation for right in missing for operation in right.operations))
                yield Right(operations, "topic", template.partition("%")[0], prefixed=True)
            else:
                yield from missing
            if not missing and self.cluster and not self.cluster.topics.keys() & names:
                log.warning(
                    "no topic %s exists yet: the right to read it can be checked only after it was created", template
                )

    def missing_on_group(self, group: str) -> list[Right]:
        """Return the missing right to join the group; an empty list if the account has it."""
        deadline = time.monotonic() + REQUEST_TIMEOUT_S
        while True:
            answer = self._admin.describe_consumer_groups(
                [group], include_authorized_operations=True, request_timeout=REQUEST_TIMEOUT_S
            )[group]
            try:
                lacking = not_among(("Read",), answer.result().authorized_operations)
            except KafkaException as error:
                code = error.args[0].code()
                if code not in REFUSED and time.monotonic() < deadline:  # the first group creates the coordinator
                    time.sleep(PROPAGATION_PAUSE_S)
                    continue
                if code not in REFUSED:
                    raise KafkaSetupError(f"{self.name}: group {group}: {explain(error.args[0])}") from None
                lacking = ("Read",)
            return [Right(lacking, "group", group)] if lacking else []

    def problems_of_output(self, service: Service, *, separate_clusters: bool) -> Iterator[str]:
        """Yield the problems of the output.

        These are topics that cannot be created, and missing rights on topics and transactions.
        """
        wanted: dict[str, Sequence[str]] = {}
        for topic in output_topics(service.output, service.output_topics, separate_clusters=separate_clusters):
            try:
                ensure_topics(self._admin, [topic], self.account)
            except KafkaSetupError as error:
                yield str(error)
            else:
                wanted[topic.topic] = OUTPUT_RIGHTS if topic.topic in service.output_topics else POSITIONS_RIGHTS
        yield from map(self.account.lacks, self._missing(wanted))
        prefix = f"{service.output.prefix}/"
        own = {"transactional.id": f"{prefix}{service.input.group_id}/preflight"}
        producer = Producer({**self._properties, **own}, logger=librdkafka_log)
        try:
            producer.init_transactions(CONNECT_TIMEOUT_S)
        except KafkaException as error:
            if error.args[0].code() in REFUSED:
                yield self.account.lacks(Right(("Write",), "transactional-id", prefix, prefixed=True))
            else:
                yield f"transactions do not work: {explain(error.args[0])}"

    def _missing(self, wanted: Mapping[str, Sequence[str]]) -> list[Right]:
        # It takes a moment until every broker knows a new topic.
        deadline = time.monotonic() + REQUEST_TIMEOUT_S
        while wanted.keys() - self._admin.list_topics(timeout=REQUEST_TIMEOUT_S).topics.keys():
            if time.monotonic() > deadline:
                break
            time.sleep(PROPAGATION_PAUSE_S)
        return missing_on_topics(self._admin, wanted)
