"""Sends archived alerts to a Kafka topic, as a survey would: one message for each alert, at a chosen pace.

Damaged packets are sent too, and no alert is changed.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from broker_filter.kafka.client import RecordLimits, ThrottledErrorLog, admin_client, librdkafka_log
from broker_filter.packets.batch import AlertIdentity
from broker_filter.packets.decode import Decoder
from broker_filter.packets.packet import KafkaPosition, Packet
from broker_filter.packets.schemas.writer_schema import WriterSchema
from broker_filter.streaming.archives import MAX_PACKET_BYTES
from broker_filter.streaming.encoding import ContainerFraming, OutputSchema

PACKETS_AT_A_TIME = 64
"""Packets that are decoded together, to read the keys and times of their alerts."""
MAX_QUEUED_KBYTES = 65_536
"""Size of the producer's queue: some hundred alerts, so that an interrupt does not wait long for messages in flight."""
FLUSH_TIMEOUT_S = 10.0
"""Time for the last messages after an interrupt. Brokers that do not accept the messages in this time are down."""
POLL_S = 0.1
"""Longest time until a wait notices an interrupt."""
SECONDS_PER_DAY = 86_400

log = logging.getLogger(__name__)

Pace = Callable[[int, float | None], float]
"""Returns when a message is due, in seconds after the first. Arguments: index, and MJD of the exposure or None."""


def as_fast_as_possible() -> Pace:
    """Return a pace at which every message is due at once."""
    return lambda _i, _mjd: 0.0


def at_rate(per_second: float) -> Pace:
    """Return a pace of `per_second` messages per second at equal intervals."""
    return lambda i, _mjd: i / per_second


def at_speed(factor: float) -> Pace:
    """Return a pace that follows the exposure times of the alerts, `factor` times as fast.

    Messages keep their order: a message with an earlier or unknown time is due directly after its predecessor.
    """
    first: float | None = None
    latest = 0.0

    def due(_i: int, mjd: float | None) -> float:
        nonlocal first, latest
        if mjd is not None:
            first = mjd if first is None else first
            latest = max(latest, (mjd - first) * SECONDS_PER_DAY / factor)
        return latest

    return due


@dataclass(slots=True)
class Deliveries:
    """The numbers of messages of a replay, by outcome."""

    sent: int = 0
    """Messages that the brokers have accepted."""
    sent_bytes: int = 0
    """Sum of the sizes of the sent messages."""
    failed: int = 0
    """Messages that the brokers have refused or not accepted in time."""
    unsendable: int = 0
    """Packets that are empty or were too large to be read, so that no message can be made of them."""


@dataclass(frozen=True, slots=True)
class _Alert:
    """A message to send: one alert, or an unchanged packet if the packet was a message or cannot be read."""

    value: bytes
    identity: AlertIdentity | None
    packet: Packet

    @property
    def key(self) -> bytes | None:
        """The object id, so that the alerts of an object stay in order; None if it is unknown."""
        return self.identity.object_id.encode() if self.identity and self.identity.object_id else None

    @property
    def mjd(self) -> float | None:
        """The time of the exposure in MJD, or None if it is unknown."""
        return self.identity.mjd if self.identity else None


class Replayer:
    """Sends packets to an existing topic.

    `properties`: librdkafka properties, including `bootstrap.servers`. `stop` ends the replay early; messages in flight
    are waited for. `advance` is called with the number of messages that the brokers have accepted since its last call.
    """

    def __init__(
        self,
        properties: Mapping[str, object],
        topic: str,
        decoder: Decoder,
        stop: threading.Event,
        advance: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.deliveries = Deliveries()
        self._topic = topic
        self._decoder = decoder
        self._stop = stop
        self._advance = advance
        self._error_log = ThrottledErrorLog(f"brokers {properties['bootstrap.servers']}")
        limits = RecordLimits(admin_client(properties, self._error_log), [topic], dead_letter=topic)
        self._producer = Producer(
            {
                "enable.idempotence": True,  # retried messages arrive once and in order
                "message.timeout.ms": 0,  # the producer waits until an outage of the brokers is over
                "message.max.bytes": limits.smallest,  # a broker refuses a whole batch if it is too large
                "queue.buffering.max.kbytes": MAX_QUEUED_KBYTES,
                "linger.ms": 5,
                **properties,
                "error_cb": self._error_log,
            },
            logger=librdkafka_log,
        )

    def replay(self, packets: Iterable[Packet], pace: Pace) -> None:
        """Send every alert of `packets` in order and count it in `deliveries`.

        Returns when the brokers have accepted all.

        Raises RegistryUnavailable if a schema cannot be read from the registry, and KafkaException if the producer
        fails.
        """
        started = time.monotonic()
        for i, alert in enumerate(self._alerts(packets)):
            self._wait_until(started + pace(i, alert.mjd))
            if self._stop.is_set():
                break
            self._send(alert)
        while self._producer.flush(POLL_S) and not self._stop.is_set():
            pass
        if left := self._producer.flush(FLUSH_TIMEOUT_S):
            self.deliveries.failed += left
            log.warning("the brokers have not accepted the last %d messages: %s", left, self._error_log.latest)

    def _alerts(self, packets: Iterable[Packet]) -> Iterator[_Alert]:
        for alerts, rejects in self._decoder.decode_stream(packets, PACKETS_AT_A_TIME):
            batch = alerts.packets
            rejected = {reject.packet_index: reject for reject in rejects}
            rows: list[list[int]] = [[] for _ in batch]
            for row, packet_index in enumerate(alerts.packet_index):
                rows[packet_index].append(row)
            for packet_index, (packet, own) in enumerate(zip(batch, rows, strict=True)):
                reject = rejected.get(packet_index)
                if not 0 < len(packet.data) <= MAX_PACKET_BYTES:  # a larger packet was not read to its end
                    log.warning("%s: not sent: %s", packet.position, "too large" if packet.data else "empty")
                    self.deliveries.unsendable += 1
                elif reject or len(own) == 1 or isinstance(packet.position, KafkaPosition):
                    read = alerts.identity(own[0]) if own else None
                    yield _Alert(packet.data, read or (reject.alert if reject else None), packet)
                else:
                    for row in own:
                        record = alerts.records[row]
                        value = ContainerFraming().frame(_schema(record.schema), [record.body], self._topic)
                        yield _Alert(value, alerts.identity(row), packet)

    def _wait_until(self, due: float) -> None:
        self._producer.poll(0)
        while (delay := due - time.monotonic()) > 0 and not self._stop.is_set():
            self._producer.poll(min(delay, POLL_S))

    def _send(self, alert: _Alert) -> None:
        while not self._stop.is_set():
            try:
                self._producer.produce(
                    self._topic,
                    alert.value,
                    alert.key,
                    timestamp=time.time_ns() // 1_000_000,  # of the first attempt, not of a retry
                    on_delivery=lambda error, message: self._delivered(error, message, alert.packet),
                )
            except BufferError:
                self._producer.poll(POLL_S)
            except KafkaException as error:
                if error.args[0].fatal():
                    raise
                self._refused(error.args[0], alert.packet)
                return
            else:
                return

    def _delivered(self, error: KafkaError | None, message: Message, packet: Packet) -> None:
        if error is not None:
            self._refused(error, packet)
            return
        self.deliveries.sent += 1
        self.deliveries.sent_bytes += len(message)
        self._advance(1)

    def _refused(self, error: KafkaError, packet: Packet) -> None:
        self.deliveries.failed += 1
        self._error_log.say(error.code(), "%s: refused: %s", packet.position, error.str())


@lru_cache(maxsize=64)
def _schema(schema: WriterSchema) -> OutputSchema:
    return OutputSchema.of(schema.definition)
