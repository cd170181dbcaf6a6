"""Reads a small compacted topic with one partition as a table: the latest committed value of each key."""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, ClassVar, Generic, TypeVar

from confluent_kafka import (
    OFFSET_BEGINNING,
    Consumer,
    IsolationLevel,
    KafkaError,
    KafkaException,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient, OffsetSpec

from broker_filter.kafka.client import (
    PROPAGATION_PAUSE_S,
    REQUEST_TIMEOUT_S,
    KafkaAwayError,
    KafkaSetupError,
    ThrottledErrorLog,
    explain,
    librdkafka_log,
)
from broker_filter.kafka.rights import REFUSED, Right

STABLE_TIMEOUT_S = 60.0
"""Must be longer than the transaction of a dead instance stays open: the coordinator aborts a transaction after 15 s,
and looks for such transactions every 10 s."""
READ_AT_A_TIME, POLL_S = 1000, 0.5
"""Largest number of records in one call, and the time in seconds that the call waits for them."""

log = logging.getLogger(__name__)

T = TypeVar("T")


class CompactedTopic(ABC, Generic[T]):
    """A reader of a compacted topic. Several threads may use it."""

    content: ClassVar[str]
    """What a value is, for messages."""

    def __init__(
        self, name: str, properties: Mapping[str, object], admin: AdminClient, error_log: ThrottledErrorLog
    ) -> None:
        """`name`: the topic. `properties` and `admin`: librdkafka properties and a client for the topic's cluster."""
        self.name = name
        self._admin = admin
        self._account = error_log.account
        self._partition = TopicPartition(name, 0, OFFSET_BEGINNING)
        self._values: dict[bytes, T] = {}
        self._reached = 0
        self._one_at_a_time = threading.Lock()
        reader = {
            "group.id": name,  # librdkafka requires a group, but the client never joins it
            "enable.auto.commit": False,
            "isolation.level": "read_committed",
            "enable.partition.eof": True,
            "auto.offset.reset": "earliest",
            "error_cb": error_log,
        }
        self._consumer = Consumer({**properties, **reader}, logger=librdkafka_log)
        self._consumer.assign([self._partition])

    @abstractmethod
    def parse(self, value: bytes) -> T:
        """Return a record's content. Raises ValueError, KeyError, TypeError or AttributeError if it is malformed."""
        ...

    def read(self) -> Mapping[bytes, T]:
        """Read to the present end of the topic, and return all values that were committed before this call, by key.

        Raises KafkaAwayError if an open transaction of another producer blocks the end for too long, and
        KafkaSetupError if the account has no right to read the topic.
        """
        return self._read(IsolationLevel.READ_UNCOMMITTED, STABLE_TIMEOUT_S)

    def glance(self) -> Mapping[bytes, T]:
        """Read as `read` does, but only to the first open transaction, without waiting until that transaction ends."""
        return self._read(IsolationLevel.READ_COMMITTED, REQUEST_TIMEOUT_S)

    def _read(self, isolation: IsolationLevel, timeout_s: float) -> Mapping[bytes, T]:
        with self._one_at_a_time:
            self._read_to_end(isolation, time.monotonic() + timeout_s)
            return self._values.copy()

    def _read_to_end(self, isolation: IsolationLevel, deadline: float) -> None:
        end = self._end(isolation, deadline)
        while self._reached < end:
            if time.monotonic() > deadline:
                raise KafkaAwayError(
                    f"topic {self.name} can be read to offset {self._reached} of {end} only: "
                    "a transaction on it does not end, or its brokers do not answer"
                )
            for message in self._consumer.consume(READ_AT_A_TIME, POLL_S):
                if message.error() is None:
                    self._note(message)
                elif message.error().code() == KafkaError._PARTITION_EOF:
                    # This is the last stable offset: an open transaction may hide records behind it.
                    self._reached = message.offset()
                elif message.error().code() == KafkaError.GROUP_AUTHORIZATION_FAILED:
                    pass  # librdkafka looks up the coordinator of the group, which is not used here
                elif self._account and message.error().code() in REFUSED:
                    raise KafkaSetupError(self._account.lacks(Right(("Read",), "topic", self.name)))
                elif not message.error().retriable():
                    log.warning("topic %s: %s", self.name, explain(message.error()))

    def _note(self, message: Any) -> None:
        if message.value() is None:  # a tombstone
            self._values.pop(message.key(), None)
            return
        try:
            self._values[message.key()] = self.parse(message.value())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            where = f"topic {self.name}: no {self.content} at offset {message.offset()}"
            raise KafkaSetupError(f"{where}: {error!r}") from None

    def _end(self, isolation: IsolationLevel, deadline: float) -> int:
        # With READ_UNCOMMITTED this is the high watermark, which is behind the markers of all ended transactions.
        request = {self._partition: OffsetSpec.latest()}
        while True:
            answer = self._admin.list_offsets(request, isolation_level=isolation, request_timeout=REQUEST_TIMEOUT_S)
            try:
                return int(answer[self._partition].result().offset)
            except KafkaException as error:  # a new partition, or one whose leader moves, has no leader for a moment
                if time.monotonic() > deadline:
                    raise KafkaAwayError(f"topic {self.name} cannot be read: {explain(error.args[0])}") from None
            time.sleep(PROPAGATION_PAUSE_S)
            # librdkafka may cache for ever that a new topic has no leader. This request refreshes its metadata.
            with suppress(KafkaException):
                self._admin.list_topics(self.name, timeout=REQUEST_TIMEOUT_S)
