"""What all Kafka clients of the service share: properties, waiting for a cluster, topics, and readable errors.

Secrets are read here when a client is created. They are stored only in the properties of the client, which are never
logged.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta

from confluent_kafka import IsolationLevel, KafkaError, KafkaException, TopicCollection, TopicPartition
from confluent_kafka.admin import AdminClient, ConfigResource, NewTopic, OffsetSpec, ResourceType

from broker_filter.config import (
    Input,
    KafkaValue,
    Output,
    Sasl,
    SecretFromEnvironment,
    SecretFromFile,
    Tls,
    read_secret,
)
from broker_filter.errors import USAGE, BrokerFilterError
from broker_filter.kafka.rights import REFUSED, ClusterAccount, Right, not_among

RESERVED = {
    "bootstrap.servers": "use the key `bootstrap_servers`",
    "group.id": "use the key `group_id`",
    "transactional.id": "it is derived from prefix, group and partition, so that an earlier owner is fenced",
    "enable.idempotence": "transactions require it",
    "enable.auto.commit": "positions are stored with the output that they belong to",
    "enable.auto.offset.store": "positions are stored with the output that they belong to",
    "isolation.level": "a position is final only when it is committed",
    "partition.assignment.strategy": "partitions are reassigned cooperatively",
    "auto.offset.reset": "use the key `start`",
}
"""Properties that cannot be passed through, with the reason: exactly-once depends on them, or they have their own
key."""
CLASSIC_PROTOCOL = "classic"
"""The only supported `group.protocol`. librdkafka ignores the case of the value."""
NOT_CLASSIC = (
    f"only {CLASSIC_PROTOCOL!r} is supported: positions are committed in transactions, and the KIP-848 protocol "
    "accepts such a commit only with the member's exact epoch, which changes with every rebalance"
)

NO_TELEMETRY = {"enable.metrics.push": False}
"""Turns off client metrics (KIP-714), which librdkafka otherwise sends to brokers that ask for them. An operator can
turn them on with the key `kafka`."""
MAX_RESPONSE_BYTES = 256 * 2**20
"""Largest response that librdkafka accepts. With its default of 100 MB it would never get past a larger message."""
MAX_RECORD_BYTES = 200_000_000
"""Largest record that is published, whatever the topic's limit is: every consumer must be able to read the record."""
PATIENCE_S = 20.0
"""How long a command waits for an answer of the brokers; a wrong address gives no answer either."""
REQUEST_TIMEOUT_S = 10.0
CONNECT_TIMEOUT_S = 5.0
"""Timeout of one attempt to reach a cluster. The service reacts to a signal after the attempt."""
PROPAGATION_PAUSE_S = 0.1
"""Pause before a request about a new topic is repeated, until all brokers know the topic."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 10.0
"""First and longest pause between attempts: for a short network fault, and for an outage of hours."""
REPEAT_INTERVAL_S = 30.0
"""Shortest time between log lines about the same error, so that an outage does not fill the disk."""
YESTERDAY_AND_TODAY = (1, 0)
"""Number of days before now. Yesterday is included, because the last alerts of a night are sent after midnight."""
DEFAULT_MAX_MESSAGE_BYTES = 1_048_588
"""Kafka's default for `max.message.bytes`, used if the cluster does not report the value."""
RECORD_OVERHEAD_BYTES = 512
"""Upper bound of the framing bytes that a batch of one record adds to key, value and headers."""

NO_TOPIC_ID = "A" * 22
"""Sixteen zero bytes in base64: the topic id from brokers without topic ids (Kafka before 2.8, the embedded broker)."""

log = logging.getLogger(__name__)
librdkafka_log = logging.getLogger("librdkafka")
# librdkafka logs the same errors as `ThrottledErrorLog`, longer and without advice: they are shown with `--verbose`
# only.
librdkafka_log.addFilter(lambda _: log.isEnabledFor(logging.DEBUG))


class KafkaSetupError(BrokerFilterError, RuntimeError):
    """The cluster or the account does not allow what the service needs. The message says what to do."""


class KafkaAwayError(KafkaSetupError):
    """The brokers did not answer in time. The same request may succeed later."""


class PropertyError(BrokerFilterError, ValueError):
    """The configuration sets a property that the service must set itself."""

    exit_status = USAGE


def client_properties(section: Input | Output) -> dict[str, object]:
    """Return librdkafka's properties for the section's cluster. They include secrets: pass them to a client only.

    Raises PropertyError if a reserved property is set, and SecretError if a secret is missing.
    """
    key = type(section).__name__.lower()
    given = plain_properties(section.kafka)
    for name, reason in refused_properties(given).items():
        raise PropertyError(f"{key}.kafka.{name}: {reason}")
    properties: dict[str, object] = {
        "bootstrap.servers": section.bootstrap_servers,
        "receive.message.max.bytes": MAX_RESPONSE_BYTES,
        **NO_TELEMETRY,
        **plain_properties(security_properties(section.sasl, section.tls)),
    }
    return properties | given


def output_section(source: Input, output: Output) -> Output:
    """Return the output section with its effective connection: that of the input if the output has no brokers."""
    if output.bootstrap_servers is not None:
        return output
    connection: dict[str, object] = {"bootstrap_servers": source.bootstrap_servers}
    if output.sasl is None and output.tls is None:
        connection |= {"sasl": source.sasl, "tls": source.tls}
    return output.model_copy(update=connection)


def refused_properties(properties: Mapping[str, object]) -> dict[str, str]:
    """Return the properties that cannot be passed through, with the reason for each."""
    refused = {
        name: f"the service sets this property itself: {why}" for name, why in RESERVED.items() if name in properties
    }
    if str(properties.get("group.protocol", CLASSIC_PROTOCOL)).lower() != CLASSIC_PROTOCOL:
        refused["group.protocol"] = NOT_CLASSIC
    return refused


def plain_properties(
    properties: Mapping[str, KafkaValue], environment: Mapping[str, str] = os.environ
) -> dict[str, str | int | float | bool]:
    """Return the properties with the text of the secrets. Raises SecretError if a secret is missing."""
    return {
        name: read_secret(value, environment) if isinstance(value, SecretFromEnvironment | SecretFromFile) else value
        for name, value in properties.items()
    }


def security_properties(sasl: Sasl | None, tls: Tls | None) -> dict[str, KafkaValue]:
    """Return librdkafka's properties for the sections `sasl` and `tls`; secrets are still references."""
    properties: dict[str, KafkaValue] = {
        "security.protocol": ("SASL_" if sasl else "") + ("SSL" if tls else "PLAINTEXT"),
    }
    if sasl:
        properties |= {
            "sasl.mechanism": sasl.mechanism,
            "sasl.username": sasl.username,
            "sasl.password": sasl.password,
        }
    if tls:
        files = {
            "ssl.ca.location": tls.ca,
            "ssl.certificate.location": tls.certificate,
            "ssl.key.location": tls.key,
        }
        properties |= {name: str(path) for name, path in files.items() if path}
        if tls.key_password:
            properties["ssl.key.password"] = tls.key_password
    return properties


class ThrottledErrorLog:
    """Logs the errors of one cluster, each at most once in `REPEAT_INTERVAL_S`. Any thread may call it.

    It is used as `error_cb` of librdkafka, because librdkafka reports a wrong password only there.
    """

    def __init__(
        self, cluster: str, clock: Callable[[], float] = time.monotonic, account: ClusterAccount | None = None
    ) -> None:
        """`cluster`: name of the cluster in messages, such as `input brokers survey:9092`.

        `account`: the service's account on the cluster, if messages shall say which right to grant.
        """
        self.cluster = cluster
        self.account = account
        self._clock = clock
        self._logged: dict[object, float] = {}
        self.latest = ""

    def note(self, error: KafkaError) -> bool:
        """Store the error's message in `latest`, and return whether it did.

        "All brokers are down" is ignored, because it follows another error that says the reason.
        """
        if error.code() == KafkaError._ALL_BROKERS_DOWN:
            return False
        self.latest = explain(error)
        return True

    def __call__(self, error: KafkaError) -> None:
        """Store and log an error that a client reports."""
        if self.note(error):
            self.say(error.code(), "%s: %s", self.cluster, self.latest)

    def say(self, subject: object, message: str, *arguments: object) -> None:
        """Log a warning, unless a warning about the same `subject` was logged in the last `REPEAT_INTERVAL_S`."""
        now = self._clock()
        if now - self._logged.get(subject, -REPEAT_INTERVAL_S) >= REPEAT_INTERVAL_S:
            self._logged[subject] = now
            log.warning(message, *arguments)


@contextmanager
def answered(error_log: ThrottledErrorLog) -> Iterator[None]:
    """Raise KafkaSetupError for an error that the cluster answers with."""
    try:
        yield
    except KafkaException as error:
        raise KafkaSetupError(f"{error_log.cluster}: {explain(error.args[0])}") from None


def explain(error: KafkaError) -> str:
    """Return the text of an error, with advice for the operator if there is any."""
    advice = {
        KafkaError._AUTHENTICATION: "authentication failed, check `sasl` (mechanism, username, password)",
        KafkaError._SSL: "no TLS connection, check `tls`",
        KafkaError._RESOLVE: "unknown host name, check `bootstrap_servers`",
        KafkaError._TRANSPORT: "cannot be reached",
        **dict.fromkeys(REFUSED, "a right is missing, which `broker-filter config check --connect` names"),
    }.get(error.code())
    return f"{advice} ({error.str()})" if advice else str(error.str())


def pauses() -> Iterator[float]:
    """Yield, without end, the seconds to wait after each failed attempt."""
    pause = FIRST_PAUSE_S
    while True:
        yield pause
        pause = min(2 * pause, LONGEST_PAUSE_S)


@dataclass(frozen=True, slots=True)
class Cluster:
    """A cluster that has answered."""

    id: str
    """The cluster's id, or the addresses of its brokers if it has no id."""
    topics: Mapping[str, int]
    """Number of partitions by topic."""


def wait_for_cluster(
    properties: Mapping[str, object], error_log: ThrottledErrorLog, stop: threading.Event, patience_s: float = math.inf
) -> Cluster | None:
    """Ask the cluster for its id and topics until it answers. Returns None once `stop` is set.

    Raises KafkaSetupError if the cluster does not answer within `patience_s` seconds.
    """
    deadline = time.monotonic() + patience_s
    admin = admin_client(properties, error_log)
    for pause in pauses():
        try:
            return ask_cluster(admin, properties, error_log)
        except KafkaSetupError as error:
            if time.monotonic() + pause > deadline:
                silence = f"no answer within {patience_s:.0f} s: is the address right, and do the brokers run?"
                raise KafkaSetupError(f"{error}; {silence}") from None
            log.warning("%s; trying again in %.1f s", error, pause)
        if stop.wait(pause):
            break
    return None


def reach_cluster(properties: Mapping[str, object], error_log: ThrottledErrorLog) -> Cluster:
    """Ask the cluster for its id and topics. Raises KafkaSetupError if it does not answer within PATIENCE_S."""
    cluster = wait_for_cluster(properties, error_log, threading.Event(), PATIENCE_S)
    assert cluster, "only a stop event ends the waiting"
    return cluster


def ask_cluster(admin: AdminClient, properties: Mapping[str, object], error_log: ThrottledErrorLog) -> Cluster:
    """Ask the cluster once for its id and topics. Raises KafkaSetupError if it does not answer."""
    try:
        metadata = admin.list_topics(timeout=CONNECT_TIMEOUT_S)
    except KafkaException as error:
        admin.poll(0)  # calls error_cb, which gets the reason; the request only reports a timeout
        raise KafkaSetupError(f"{error_log.cluster}: {error_log.latest or explain(error.args[0])}") from None
    topics = {name: len(topic.partitions) for name, topic in metadata.topics.items()}
    return Cluster(metadata.cluster_id or str(properties["bootstrap.servers"]), topics)


def admin_client(properties: Mapping[str, object], error_log: ThrottledErrorLog) -> AdminClient:
    """Return a client that manages topics and their configuration."""
    return AdminClient({**properties, "error_cb": error_log.note}, logger=librdkafka_log)


def topic_ids(admin: AdminClient, topics: Collection[str]) -> dict[str, str | None]:
    """Return the ids of topics, with None for each id if the cluster has none. Sends one request.

    Raises KafkaException if the request fails or a topic does not exist.
    """
    if not topics:
        return {}
    answer = admin.describe_topics(TopicCollection(list(topics)), request_timeout=REQUEST_TIMEOUT_S)
    ids = {topic: str(found.result().topic_id) for topic, found in answer.items()}
    return {topic: None if id_ == NO_TOPIC_ID else id_ for topic, id_ in ids.items()}


def list_offsets(
    admin: AdminClient, partitions: Collection[tuple[str, int]], spec: OffsetSpec, *, committed: bool = False
) -> dict[tuple[str, int], int]:
    """Return the offset that `spec` selects in each partition, or -1 if no offset matches. One request to each broker.

    `committed`: the latest offset is the last stable offset (before the first open transaction), and not the end of the
    log. Raises KafkaException.
    """
    if not partitions:
        return {}
    isolation = IsolationLevel.READ_COMMITTED if committed else IsolationLevel.READ_UNCOMMITTED
    request = {TopicPartition(*partition): spec for partition in partitions}
    answer = admin.list_offsets(request, isolation_level=isolation, request_timeout=REQUEST_TIMEOUT_S)
    return {(p.topic, p.partition): int(found.result().offset) for p, found in answer.items()}


def ensure_topics(admin: AdminClient, wanted: Sequence[NewTopic], account: ClusterAccount | None = None) -> None:
    """Create the topics that do not exist. Raises KafkaSetupError if the cluster does not allow it.

    `account`: the service's account, which the message about a missing right names.
    """
    present = admin.list_topics(timeout=REQUEST_TIMEOUT_S).topics
    absent = [topic for topic in wanted if topic.topic not in present]
    if not absent:
        return
    for name, created in admin.create_topics(absent, request_timeout=REQUEST_TIMEOUT_S).items():
        try:
            created.result()
        except KafkaException as error:
            if error.args[0].code() == KafkaError.TOPIC_ALREADY_EXISTS:  # another instance was faster
                continue
            if account and error.args[0].code() in REFUSED:
                raise KafkaSetupError(
                    f"topic {name} does not exist, or the account has no right to see it, and it cannot be created: "
                    f"{account.lacks(Right(('Describe', 'Create'), 'topic', name))}"
                ) from None
            raise KafkaSetupError(
                f"topic {name} does not exist and cannot be created here ({error.args[0].str()}): create it"
            ) from None
        log.info("created topic %s", name)


def topic_property(
    admin: AdminClient, topics: Collection[str], name: str, account: ClusterAccount | None = None
) -> dict[str, str]:
    """Return the property `name` of existing topics, by topic. A topic is left out if the cluster does not report it.

    Waits for new topics, because it takes a moment until every broker knows a topic. With an `account`, raises
    KafkaSetupError if the account has no right to read the configuration.
    """
    values: dict[str, str] = {}
    asked, deadline = set(topics), time.monotonic() + REQUEST_TIMEOUT_S
    while asked:
        resources = [ConfigResource(ResourceType.TOPIC, topic) for topic in asked]
        for resource, answer in admin.describe_configs(resources, request_timeout=REQUEST_TIMEOUT_S).items():
            try:
                values[resource.name] = answer.result()[name].value
            except KafkaException as error:
                if error.args[0].code() == KafkaError.UNKNOWN_TOPIC_OR_PART and time.monotonic() < deadline:
                    continue
                if account and error.args[0].code() in REFUSED:
                    lacks = account.lacks(Right(("DescribeConfigs",), "topic", resource.name))
                    raise KafkaSetupError(f"{name} of topic {resource.name} must be known: {lacks}") from None
                log.warning("%s of topic %s is not known: %s", name, resource.name, explain(error.args[0]))
            except KeyError:
                log.warning("%s of topic %s is not known: the cluster does not report it", name, resource.name)
            asked.discard(resource.name)
        if asked:
            time.sleep(PROPAGATION_PAUSE_S)
    return values


def missing_on_topics(admin: AdminClient, wanted: Mapping[str, Sequence[str]]) -> list[Right]:
    """Return the missing rights. `wanted`: operations, named as in kafka-acls.sh, by topic.

    A topic that does not exist is ignored, and so is a topic whose rights the cluster does not report.
    """
    missing = []
    question = TopicCollection(list(wanted))
    answers = admin.describe_topics(question, include_authorized_operations=True, request_timeout=REQUEST_TIMEOUT_S)
    for topic, answer in answers.items():
        try:
            allowed = answer.result().authorized_operations
        except KafkaException as error:
            if error.args[0].code() in REFUSED:
                missing.append(Right(tuple(dict.fromkeys((*wanted[topic], "Describe"))), "topic", topic))
            elif error.args[0].code() != KafkaError.UNKNOWN_TOPIC_OR_PART:
                log.warning("the rights on topic %s are not known: %s", topic, explain(error.args[0]))
        else:
            if not allowed:
                log.warning("the cluster does not report the rights on topic %s", topic)
            if lacking := not_among(wanted[topic], allowed):
                missing.append(Right(lacking, "topic", topic))
    return missing


def require_compaction(admin: AdminClient, topic: str, account: ClusterAccount | None = None) -> None:
    """Raise KafkaSetupError if the topic's cleanup policy is not `compact`."""
    for policy in topic_property(admin, [topic], "cleanup.policy", account).values():
        if policy != "compact":
            raise KafkaSetupError(
                f"topic {topic} has cleanup.policy={policy}: the positions in it would expire, and alerts would be "
                "lost or repeated; set it to compact"
            )


class RecordLimits:
    """The largest record of each topic. Kafka's default is assumed if the cluster does not report the limit."""

    def __init__(
        self,
        admin: AdminClient,
        topics: Sequence[str],
        dead_letter: str,
        largest: int = MAX_RECORD_BYTES,
        account: ClusterAccount | None = None,
        positions: Sequence[str] = (),
    ) -> None:
        """`dead_letter`: the topic for records that are too large for their own topic.

        `largest`: the largest record in bytes that the producer sends to any topic. `positions`: further topics that
        are written, with small records.

        `account`: the service's account. With it, KafkaSetupError is raised if the account cannot read the limits,
        because a limit that is only assumed could reject alerts.
        """
        self.dead_letter = dead_letter
        self._account = account
        self._written = [*topics, *positions]
        self._admin = admin
        self._largest = largest
        self._limits = dict.fromkeys(topics, DEFAULT_MAX_MESSAGE_BYTES)
        self._changing = threading.Lock()
        self.refresh()

    def refresh(self) -> None:
        """Read the limits of the topics again."""
        self._read(self._limits)

    def add(self, topics: Collection[str]) -> None:
        """Read the limits of topics that will be written too. Other threads may use the limits meanwhile.

        Raises KafkaSetupError if the account cannot read the limits.
        """
        self._read(topics)
        self._written = list(dict.fromkeys([*self._written, *topics]))

    def _read(self, topics: Collection[str]) -> None:
        known = topic_property(self._admin, topics, "max.message.bytes", self._account)
        limits = {topic: self._limits.get(topic, DEFAULT_MAX_MESSAGE_BYTES) for topic in topics}
        limits |= {topic: int(size) for topic, size in known.items()}
        with self._changing:
            self._limits = self._limits | limits
        for topic in limits.keys() - known.keys():
            log.warning("topic %s gets records of at most %d bytes", topic, limits[topic])

    def unwritable(self) -> list[Right]:
        """Return the missing rights to write to the topics, as far as the cluster reports them."""
        return missing_on_topics(self._admin, dict.fromkeys(self._written, ("Write",)))

    def of(self, topic: str) -> int:
        """Return the largest allowed sum of key, value and headers of a record for `topic`, in bytes."""
        return min(self._limits[topic], self._largest) - RECORD_OVERHEAD_BYTES

    @property
    def smallest(self) -> int:
        """The size in bytes of a batch of records that every topic accepts."""
        return min(self._largest, *self._limits.values())


def topic_names(templates: Sequence[str], now: datetime, days_ago: Sequence[int] = YESTERDAY_AND_TODAY) -> list[str]:
    """Return the topic names of some days. `days_ago`: numbers of days before `now` (UTC)."""
    days = [now - timedelta(days=n) for n in days_ago]
    return list(dict.fromkeys(day.strftime(template) for template in templates for day in days))
