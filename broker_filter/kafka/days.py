"""Chooses the topics to read: those of today and yesterday, and those of earlier days that hold unread messages.

A separate thread asks the brokers about all topics at once, so that reading never waits for an answer. If the brokers
do not answer, the service goes on with the same topics and asks again. The ids of the topics are looked up too, because
librdkafka may continue at the old offset without an error if a topic is deleted and created again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta

from confluent_kafka import KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec

from broker_filter.config import Input
from broker_filter.kafka.checkpoint import Checkpoint
from broker_filter.kafka.client import (
    REQUEST_TIMEOUT_S,
    Cluster,
    KafkaAwayError,
    KafkaSetupError,
    ThrottledErrorLog,
    list_offsets,
    pauses,
    topic_ids,
    topic_names,
)
from broker_filter.kafka.rights import REFUSED

LOOK_INTERVAL_S = 10.0
"""Pause between two searches for topics that are new, were created again, or hold new messages of an earlier day."""
FIRST_LOOK_S = 60.0
"""Time limit of the first search with its repetitions: a cluster that has just started may have no group coordinator
yet."""
RETRY_PAUSE_S = 2.0
"""Pause before the brokers are asked again after a failed search."""
HORIZON_DAYS = 3660
"""Topics of earlier days are recognised by name for ten years back, which is longer than the topic of a day is kept."""
END_TIMEOUT_S = 1.0
"""Time to wait at the end for a search in flight. After it, the thread ends with the process."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Found:
    """The result of one search for topics."""

    current: list[str] = field(default_factory=list)
    """The topics of today and yesterday, whether or not they exist."""
    earlier: list[str] = field(default_factory=list)
    """The topics of earlier days to read, the oldest first."""
    dates: Mapping[str, Mapping[str, date]] = field(default_factory=dict)
    """By template (a name with strftime directives), the day of each topic that exists."""
    begun: frozenset[str] = frozenset()
    """The existing topics of templates in which the group has a position."""
    ids: Mapping[str, str | None] = field(default_factory=dict)
    """The ids of the existing topics to read. An id is None if the cluster has no topic ids."""

    @property
    def topics(self) -> list[str]:
        """The topics to subscribe to."""
        return [*self.current, *self.earlier]


class Days:
    """Searches repeatedly for the topics to subscribe to."""

    def __init__(
        self,
        section: Input,
        admin: AdminClient,
        cluster: Cluster,
        checkpoint: Checkpoint,
        error_log: ThrottledErrorLog,
        clock: Callable[[], datetime],
    ) -> None:
        """`admin`: a client for the input's cluster.

        `cluster`: its topics before reading began. `clock`: returns the time in UTC.
        """
        self._section = section
        self._admin = admin
        self._cluster = cluster
        self._checkpoint = checkpoint
        self._error_log = error_log
        self._clock = clock
        self._templates = [template for template in section.topics if "%" in template]
        self._found = Found()
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_looking, name="days", daemon=True)

    def start(self) -> None:
        """Search once, and start the thread that repeats the search.

        Raises KafkaException or KafkaSetupError if the brokers refuse the search or do not answer within
        `FIRST_LOOK_S`.
        """
        deadline = time.monotonic() + FIRST_LOOK_S
        for pause in pauses():
            try:
                self._found = self._look()
            except (KafkaException, KafkaAwayError) as error:
                if time.monotonic() + pause > deadline or not self._may_pass(error):
                    raise
                time.sleep(pause)
            else:
                break
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread that searches."""
        self._stop.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(END_TIMEOUT_S)

    @property
    def found(self) -> Found:
        """The result of the latest search; each search creates a new object. Never waits.

        If the day has changed, this starts a search in the background.
        """
        if self._found.current != topic_names(self._section.topics, self._clock()):
            self._wake.set()
        return self._found

    def follows(self, topic: str) -> bool:
        """Return whether the group has a position in another day's topic, so that `topic` is read from its start."""
        found, start = self._found, self._section.start
        for dates in found.dates.values():
            if topic in dates and not (isinstance(start, datetime) and dates[topic] <= start.date()):
                return any(other in dates for other in found.begun - {topic})
        return False

    def _may_pass(self, error: KafkaException | KafkaAwayError) -> bool:
        """Log why a search failed, and return whether another search may succeed."""
        if isinstance(error, KafkaAwayError):
            self._error_log.say("days", "%s", error)
            return True
        self._error_log(error.args[0])
        return not error.args[0].fatal() and error.args[0].code() not in REFUSED

    def _keep_looking(self) -> None:
        while not self._stop.is_set():
            self._wake.wait(LOOK_INTERVAL_S)
            self._wake.clear()
            if self._stop.is_set():
                return
            try:
                self._found = self._look()
            except KafkaException as error:
                self._error_log(error.args[0])
            except KafkaSetupError as error:
                self._error_log.say("days", "%s", error)
            except Exception:  # this thread must go on: without it, no topic would be found after midnight
                log.exception("the topics of earlier days could not be looked up")
            else:
                continue
            self._stop.wait(RETRY_PAUSE_S)

    def _look(self) -> Found:
        now, before = self._clock(), self._found
        current = topic_names(self._section.topics, now)
        existing = self._admin.list_topics(timeout=REQUEST_TIMEOUT_S).topics
        dates = {template: existing_days(template, now, existing) for template in self._templates}
        partitions = {
            topic: [(topic, number) for number in sorted(existing[topic].partitions)]
            for of_template in dates.values()
            for topic in of_template
        }
        keys = [key for of_topic in partitions.values() for key in of_topic]
        stored = dict(zip(keys, self._checkpoint.glance([TopicPartition(*key) for key in keys]), strict=True))
        begun = frozenset(topic for (topic, _), position in stored.items() if position is not None)

        wanted = self._wanted(dates, begun) - set(current)
        asked = [key for topic in wanted for key in partitions[topic]]
        low = list_offsets(self._admin, asked, OffsetSpec.earliest())
        high = list_offsets(self._admin, asked, OffsetSpec.latest())
        read = {key: position.offset if (position := stored[key]) else 0 for key in asked}
        unread = {key[0] for key in asked if max(low[key], read[key]) < high[key]}
        if current == before.current:  # a topic that is read to its end stays until midnight, to avoid a rebalance
            unread |= set(before.earlier).intersection(existing)
        days = {topic: day for of_template in dates.values() for topic, day in of_template.items()}
        earlier = sorted(unread, key=lambda topic: (days[topic], topic))
        return Found(current, earlier, dates, begun, topic_ids(self._admin, {*current, *earlier} & existing.keys()))

    def _wanted(self, dates: Mapping[str, Mapping[str, date]], begun: frozenset[str]) -> set[str]:
        """Return the topics to read if they hold unread messages.

        These are the topics since the configured day or since the first day in which the group has a position, and the
        topics that were created after reading began.
        """
        wanted = set()
        for of_template in dates.values():
            first = min((day for topic, day in of_template.items() if topic in begun), default=date.max)
            since = min(first, self._start_day())
            wanted |= {topic for topic, day in of_template.items() if day >= since or topic not in self._cluster.topics}
        return wanted

    def _start_day(self) -> date:
        """Return the first day that the configuration selects: the day before `input.start`.

        The last alerts of a night are sent after midnight, to the topic of the day before.
        """
        match self._section.start:
            case "earliest":
                return date.min
            case datetime() as moment:
                return moment.date() - timedelta(days=1)
            case _:
                return date.max


def existing_days(template: str, now: datetime, existing: Container[str]) -> dict[str, date]:
    """Return the days of the existing topics of a template, by topic, the latest day first."""
    days = (now - timedelta(days=n) for n in range(HORIZON_DAYS))
    return {topic: day.date() for day in days if (topic := day.strftime(template)) in existing}


def existing_topics(templates: Sequence[str], now: datetime, existing: Container[str]) -> list[str]:
    """Return the existing topics of all days of some names, which may be templates; for each name, the oldest first."""
    found = []
    for template in templates:
        of_template = existing_days(template, now, existing) if "%" in template else [template]
        found += [topic for topic in reversed(list(of_template)) if topic in existing]
    return list(dict.fromkeys(found))
