"""What every Kafka client of the service needs: its properties, a reachable cluster, topics, errors in plain words.

Secrets are read here, when a client is made, and go nowhere but into its properties: properties are never logged.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from confluent_kafka import IsolationLevel, KafkaError, KafkaException, TopicCollection, TopicPartition
from confluent_kafka.admin import AdminClient, ConfigResource, NewTopic, OffsetSpec, ResourceType

from broker_filter.config import Input, KafkaValue, Output, Sasl, Secret, SecretFromEnvironment, SecretFromFile, Tls
from broker_filter.errors import USAGE, BrokerFilterError
from broker_filter.kafka.rights import REFUSED, Account, Right, not_among

RESERVED = {
    "bootstrap.servers": "say it as `bootstrap_servers`",
    "group.id": "say it as `group_id`",
    "transactional.id": "it is derived from prefix, group and partition, so that an earlier owner is fenced",
    "enable.idempotence": "transactions need it",
    "enable.auto.commit": "positions are stored with the output that they belong to",
    "enable.auto.offset.store": "positions are stored with the output that they belong to",
    "isolation.level": "a position is final only when it is committed",
    "partition.assignment.strategy": "partitions are handed over cooperatively",
    "auto.offset.reset": "say it as `start`",
}
"""Properties that exactly-once rests on, or that have a key of their own: why they cannot be passed through."""
CLASSIC_PROTOCOL = "classic"
"""The only `group.protocol` that is taken; librdkafka ignores the case of the value."""
NOT_CLASSIC = (
    f"only {CLASSIC_PROTOCOL!r} is supported: positions are committed in transactions, and the KIP-848 protocol "
    "accepts such a commit only with the member's exact epoch, which changes with every rebalance"
)

NO_TELEMETRY = {"enable.metrics.push": False}
"""Set for every client that an operator configures, unless the operator sets it: by default, librdkafka sends metrics
about itself to brokers that ask for them (KIP-714)."""
MAX_RESPONSE_BYTES = 256 * 2**20
"""librdkafka refuses larger answers, and would stay before a message above its own default of 100 MB for ever."""
MAX_RECORD_BYTES = 200_000_000
"""What is published at most, whatever a topic takes: every consumer must be able to read it."""
REQUEST_TIMEOUT_S = 10.0
CONNECT_TIMEOUT_S = 5.0
"""Of an attempt to reach a cluster; a signal is heeded after it."""
PROPAGATION_PAUSE_S = 0.1
"""Before asking again of a topic that was made just now."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 10.0
"""Between attempts: from a blink of the network to an outage of hours."""
REPEAT_INTERVAL_S = 30.0
"""The same complaint is logged no more often: an outage says so, and does not fill the disk."""
YESTERDAY_AND_TODAY = (1, 0)
"""Days ago. Yesterday's topics too, because a night's last alerts are sent, and a backlog read, after midnight."""
DEFAULT_MAX_MESSAGE_BYTES = 1_048_588
"""Kafka's own, for clusters that do not say."""
RECORD_OVERHEAD_BYTES = 512
"""What framing adds to key, value and headers in a batch of one record; generous."""

NO_TOPIC_ID = "A" * 22
"""Sixteen zero bytes: what is read from brokers that give topics no ids (Kafka before 2.8, the embedded broker)."""

log = logging.getLogger(__name__)
librdkafka_log = logging.getLogger("librdkafka")
# It repeats what `ThrottledErrorLog` says, at length and without advice: for `--verbose` only.
librdkafka_log.addFilter(lambda _: log.isEnabledFor(logging.DEBUG))


class KafkaSetupError(BrokerFilterError, RuntimeError):
    """Kafka, or the account that is used there, does not allow what the service needs. The message says what to do."""


class KafkaAwayError(KafkaSetupError):
    """Brokers have not answered in time. The same request may succeed later."""


class PropertyError(BrokerFilterError, ValueError):
    """The configuration asks for a property that the service must set itself, or names a secret that is not there."""

    exit_status = USAGE


def read_secret(secret: Secret, environment: Mapping[str, str] = os.environ) -> str:
    """The secret's text, without the newline that a file ends with, and a variable that was made of one.

    Raises PropertyError where there is none.
    """
    if isinstance(secret, SecretFromEnvironment):
        text = environment.get(secret.env)
        if text is None:
            raise PropertyError(
                f"environment variable {secret.env}, which holds a secret of the configuration, is not set"
            )
        return text.removesuffix("\n")
    try:
        return secret.file.read_text().removesuffix("\n")
    except OSError as error:
        raise PropertyError(f"the file of a secret cannot be read: {error}") from None


def client_properties(section: Input | Output) -> dict[str, object]:
    """librdkafka's properties for the section's cluster, secrets included: for a client's constructor only.

    Raises PropertyError.
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
    """The output as it is connected to: where it has no brokers of its own, as the input is."""
    if output.bootstrap_servers is not None:
        return output
    connection: dict[str, object] = {"bootstrap_servers": source.bootstrap_servers}
    if output.sasl is None and output.tls is None:
        connection |= {"sasl": source.sasl, "tls": source.tls}
    return output.model_copy(update=connection)


def refused_properties(properties: Mapping[str, object]) -> dict[str, str]:
    """Those of the properties that cannot be passed through, each with the reason."""
    refused = {
        name: f"the service sets this property itself: {why}" for name, why in RESERVED.items() if name in properties
    }
    if str(properties.get("group.protocol", CLASSIC_PROTOCOL)).lower() != CLASSIC_PROTOCOL:
        refused["group.protocol"] = NOT_CLASSIC
    return refused


def plain_properties(
    properties: Mapping[str, KafkaValue], environment: Mapping[str, str] = os.environ
) -> dict[str, str | int | float | bool]:
    """The properties with the text of each secret in the place of its name. Raises PropertyError."""
    return {
        name: read_secret(value, environment) if isinstance(value, SecretFromEnvironment | SecretFromFile) else value
        for name, value in properties.items()
    }


def security_properties(sasl: Sasl | None, tls: Tls | None) -> dict[str, KafkaValue]:
    """librdkafka's properties for the sections `sasl` and `tls`; secrets are still named."""
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
    """Errors of one cluster in plain words, each at most once in `REPEAT_INTERVAL_S`; may be called from any thread.

    An `error_cb` of librdkafka: there alone it says that a password is wrong.
    """

    def __init__(
        self, cluster: str, clock: Callable[[], float] = time.monotonic, account: Account | None = None
    ) -> None:
        """`cluster`: what it is called in messages, as `input brokers survey:9092`. `account`: the service's account
        there, where messages shall say what to grant."""
        self.cluster = cluster
        self.account = account
        self._clock = clock
        self._logged: dict[object, float] = {}
        self.latest = ""

    def note(self, error: KafkaError) -> bool:
        """Keeps the latest reason; that all brokers are down is none, it follows one."""
        if error.code() == KafkaError._ALL_BROKERS_DOWN:
            return False
        self.latest = explain(error)
        return True

    def __call__(self, error: KafkaError) -> None:
        """Notes and logs what a client reports."""
        if self.note(error):
            self.say(error.code(), "%s: %s", self.cluster, self.latest)

    def say(self, subject: object, message: str, *arguments: object) -> None:
        """Logs a warning, unless one of the same subject was logged just now."""
        now = self._clock()
        if now - self._logged.get(subject, -REPEAT_INTERVAL_S) >= REPEAT_INTERVAL_S:
            self._logged[subject] = now
            log.warning(message, *arguments)


def explain(error: KafkaError) -> str:
    """What an error means for the person who runs the service."""
    advice = {
        KafkaError._AUTHENTICATION: "authentication failed, check `sasl` (mechanism, username, password)",
        KafkaError._SSL: "no TLS connection, check `tls`",
        KafkaError._RESOLVE: "the host's name is not known, check `bootstrap_servers`",
        KafkaError._TRANSPORT: "cannot be reached",
        **dict.fromkeys(REFUSED, "a right is missing, which `broker-filter config check --connect` names"),
    }.get(error.code())
    return f"{advice} ({error.str()})" if advice else str(error.str())


def pauses() -> Iterator[float]:
    """Seconds to wait after each failed attempt."""
    pause = FIRST_PAUSE_S
    while True:
        yield pause
        pause = min(2 * pause, LONGEST_PAUSE_S)


@dataclass(frozen=True, slots=True)
class Cluster:
    """A cluster that has answered: what it calls itself (its brokers' addresses where it has no id), and how many
    partitions each of its topics has."""

    id: str
    topics: Mapping[str, int]


def wait_for_cluster(
    properties: Mapping[str, object], error_log: ThrottledErrorLog, stop: threading.Event, patience_s: float = math.inf
) -> Cluster | None:
    """Asks the cluster who it is until it answers; None once `stop` is set.

    Raises KafkaSetupError where it has not answered within `patience_s` seconds.
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


def ask_cluster(admin: AdminClient, properties: Mapping[str, object], error_log: ThrottledErrorLog) -> Cluster:
    """Asks the cluster once who it is. Raises KafkaSetupError where it does not answer."""
    try:
        metadata = admin.list_topics(timeout=CONNECT_TIMEOUT_S)
    except KafkaException as error:
        admin.poll(0)  # serves error_cb, which knows more than the request that timed out
        raise KafkaSetupError(f"{error_log.cluster}: {error_log.latest or explain(error.args[0])}") from None
    topics = {name: len(topic.partitions) for name, topic in metadata.topics.items()}
    return Cluster(metadata.cluster_id or str(properties["bootstrap.servers"]), topics)


def admin_client(properties: Mapping[str, object], error_log: ThrottledErrorLog) -> AdminClient:
    """A client for topics and their configuration."""
    return AdminClient({**properties, "error_cb": error_log.note}, logger=librdkafka_log)


def topic_ids(admin: AdminClient, topics: Collection[str]) -> dict[str, str | None]:
    """The ids of topics, in one request; None where the cluster gives none. Raises KafkaException."""
    if not topics:
        return {}
    answer = admin.describe_topics(TopicCollection(list(topics)), request_timeout=REQUEST_TIMEOUT_S)
    ids = {topic: str(found.result().topic_id) for topic, found in answer.items()}
    return {topic: None if id_ == NO_TOPIC_ID else id_ for topic, id_ in ids.items()}


def list_offsets(
    admin: AdminClient, partitions: Collection[tuple[str, int]], spec: OffsetSpec, *, committed: bool = False
) -> dict[tuple[str, int], int]:
    """The offset that `spec` stands for in each partition, all in one request to each broker; -1 where there is none.

    `committed`: the latest offset is the end of what is committed, and not the end of the log. Raises KafkaException.
    """
    if not partitions:
        return {}
    isolation = IsolationLevel.READ_COMMITTED if committed else IsolationLevel.READ_UNCOMMITTED
    request = {TopicPartition(*partition): spec for partition in partitions}
    answer = admin.list_offsets(request, isolation_level=isolation, request_timeout=REQUEST_TIMEOUT_S)
    return {(p.topic, p.partition): int(found.result().offset) for p, found in answer.items()}


def ensure_topics(admin: AdminClient, wanted: Sequence[NewTopic], account: Account | None = None) -> None:
    """Creates the topics that are absent. Raises KafkaSetupError where the cluster does not allow it.

    `account`: who asks, for what is said of a missing right.
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
                    f"topic {name} cannot be seen or does not exist, and may not be created: "
                    f"{account.lacks(Right(('Describe', 'Create'), 'topic', name))}"
                ) from None
            raise KafkaSetupError(
                f"topic {name} does not exist and cannot be created here ({error.args[0].str()}): create it"
            ) from None
        log.info("created topic %s", name)


def topic_property(
    admin: AdminClient, topics: Collection[str], name: str, account: Account | None = None
) -> dict[str, str]:
    """The property `name` of topics that are there, without those of which the cluster does not say it.

    Waits for topics that were made just now: it takes a moment until every broker has heard of them. With an
    `account`, raises KafkaSetupError where that may not ask.
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
                log.warning("%s of topic %s is not known: the cluster does not say it", name, resource.name)
            asked.discard(resource.name)
        if asked:
            time.sleep(PROPAGATION_PAUSE_S)
    return values


def missing_on_topics(admin: AdminClient, wanted: Mapping[str, Sequence[str]]) -> list[Right]:
    """Which of the operations (as kafka-acls.sh calls them) on topics are not allowed, as far as the cluster says it.

    A topic that does not exist lacks nothing.
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
                log.warning("the cluster does not say what is allowed on topic %s", topic)
            if lacking := not_among(wanted[topic], allowed):
                missing.append(Right(lacking, "topic", topic))
    return missing


def require_compaction(admin: AdminClient, topic: str, account: Account | None = None) -> None:
    """Raises KafkaSetupError where a topic forgets more than what later records replace."""
    for policy in topic_property(admin, [topic], "cleanup.policy", account).values():
        if policy != "compact":
            raise KafkaSetupError(
                f"topic {topic} has cleanup.policy={policy}: the positions in it would expire, and alerts be lost or "
                "repeated; set it to compact"
            )


class RecordLimits:
    """How large a record each topic takes. Kafka's default is assumed where the cluster does not say."""

    def __init__(
        self,
        admin: AdminClient,
        topics: Sequence[str],
        dead_letter: str,
        largest: int = MAX_RECORD_BYTES,
        account: Account | None = None,
        positions: Sequence[str] = (),
    ) -> None:
        """`dead_letter`: the one of the topics that takes what fits into no other. `largest`: what the producer sends
        at most, whatever a topic takes. `account`: who asks; then KafkaSetupError is raised where it may not, since an
        assumed limit would reject alerts. `positions`: topics that are written too, with small records."""
        self.dead_letter = dead_letter
        self._account = account
        self._written = [*topics, *positions]
        self._admin = admin
        self._largest = largest
        self._limits = dict.fromkeys(topics, DEFAULT_MAX_MESSAGE_BYTES)
        self.refresh()

    def refresh(self) -> None:
        """Reads the topics' configuration again."""
        known = topic_property(self._admin, self._limits, "max.message.bytes", self._account)
        self._limits |= {topic: int(size) for topic, size in known.items()}
        for topic in self._limits.keys() - known.keys():
            log.warning("topic %s gets records of at most %d bytes", topic, self._limits[topic])

    def unwritable(self) -> list[Right]:
        """The rights that are missing to write the topics, as far as the cluster says it."""
        return missing_on_topics(self._admin, dict.fromkeys(self._written, ("Write",)))

    def of(self, topic: str) -> int:
        """The largest sum of key, value and headers in bytes."""
        return min(self._limits[topic], self._largest) - RECORD_OVERHEAD_BYTES

    @property
    def smallest(self) -> int:
        """What a batch of records fits into, whichever topic it goes to."""
        return min(self._largest, *self._limits.values())


def topic_names(templates: Sequence[str], now: datetime, days_ago: Sequence[int] = YESTERDAY_AND_TODAY) -> list[str]:
    """The topics of some days: what strftime directives stand for so many days before `now` (UTC)."""
    days = [now - timedelta(days=n) for n in days_ago]
    return list(dict.fromkeys(day.strftime(template) for template in templates for day in days))
