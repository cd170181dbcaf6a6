"""A client of the service's output topics with confluent-kafka and fastavro only, as a user would write one."""

from __future__ import annotations

import gzip
import io
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import fastavro
from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, Message, TopicPartition

from broker_filter.demo.error import DemoError
from broker_filter.simulate.instruments import AB_ZERO_POINT_NJY
from broker_filter.simulate.ztf import JD_MINUS_MJD

LARGEST_ANSWER = 512 * 2**20
"""Bytes: the embedded broker answers with all messages of a partition and ignores the client's limit."""
SILENCE_S = 20.0
"""If the broker sends neither a message nor the end of a partition for so long, it no longer works."""

ZTF_BANDS = {1: "g", 2: "r", 3: "i"}

ID_WIDTH = 12
"""Characters of an object id of ZTF."""

Alert = dict[str, Any]
Survey = Literal["ztf", "lsst"]


@dataclass(slots=True)
class Results:
    """All published results. An alert is the survey's record with the field `broker_filter` added."""

    scored: list[Alert] = field(default_factory=list)
    filtered: dict[str, list[int]] = field(default_factory=dict)  # alert ids by filter
    anomalies: list[Alert] = field(default_factory=list)
    anomaly_packets: list[bytes] = field(default_factory=list)  # the records of `anomalies`, each a packet itself
    rejected: Counter[str] = field(default_factory=Counter)  # by reason
    inputs: Counter[bytes] = field(default_factory=Counter)  # number of results for each input position


def read_results(bootstrap: str, prefix: str, filters: list[str]) -> Results:
    """Read the committed records of all output topics.

    Raises DemoError if the broker does not answer or reports an error.
    """
    results = Results(filtered={name: [] for name in filters})
    for message in _read_topic(bootstrap, f"{prefix}.scored"):
        results.inputs[_headers(message)["input"]] += 1
        results.scored.extend(_alerts(message))
    for message in _read_topic(bootstrap, f"{prefix}.dead-letter"):
        headers = _headers(message)
        results.inputs[headers["input"]] += 1
        results.rejected[headers["reason"].decode()] += 1
    for name, alert_ids in results.filtered.items():
        for message in _read_topic(bootstrap, f"{prefix}.{name}"):
            alert_ids.extend(alert_id(alert) for alert in _alerts(message))
    for message in _read_topic(bootstrap, f"{prefix}.anomalies"):
        results.anomalies.extend(_alerts(message))
        results.anomaly_packets.append(message.value() or b"")
    return results


def real(alert: Alert) -> float:
    """Return the probability that an alert is real, by the default model; NaN if this model does not score it."""
    scores = (model["outputs"]["real"] for model in alert["broker_filter"]["models"] if model["model"] == "default")
    return float(next(scores, math.nan))


def survey_of(alert: Alert) -> Survey:
    """Return the survey of an alert."""
    return "lsst" if "diaSource" in alert else "ztf"


def alert_id(alert: Alert) -> int:
    """Return the candid, or the diaSourceId."""
    return int(alert["candid"] if survey_of(alert) == "ztf" else alert["diaSourceId"])


def object_id(alert: Alert) -> str:
    """Return the objectId, the diaObjectId, or the ssObjectId of a body of the solar system."""
    if survey_of(alert) == "ztf":
        return str(alert["objectId"])
    return str(alert["diaSource"]["diaObjectId"] or alert["diaSource"]["ssObjectId"])


def short(name: str) -> str:
    """Return an object id that fits beside the other facts of an alert: of the long ids of LSST, the last digits."""
    return name if len(name) <= ID_WIDTH else f"…{name[1 - ID_WIDTH :]}"


def band(alert: Alert) -> str:
    """Return the filter through which the alert was observed."""
    return ZTF_BANDS[alert["candidate"]["fid"]] if survey_of(alert) == "ztf" else str(alert["diaSource"]["band"])


def magnitude(alert: Alert) -> float:
    """Return the AB magnitude of the difference."""
    if survey_of(alert) == "ztf":
        return float(alert["candidate"]["magpsf"])
    return AB_ZERO_POINT_NJY - 2.5 * math.log10(abs(alert["diaSource"]["psfFlux"]))


def julian_date(alert: Alert) -> float:
    """Return the Julian date of the exposure: in UTC for ZTF, in TAI for LSST, as in the packets."""
    if survey_of(alert) == "ztf":
        return float(alert["candidate"]["jd"])
    return float(alert["diaSource"]["midpointMjdTai"]) + JD_MINUS_MJD


def detections(alert: Alert) -> int:
    """Return how often the object was detected, with this alert."""
    if survey_of(alert) == "ztf":
        return int(alert["candidate"]["ndethist"])
    return 1 + len(alert["prvDiaSources"] or ())


def stamp(alert: Alert, cutout: str) -> bytes:
    """Return the FITS file of a cutout: `Science`, `Template` or `Difference`."""
    data = alert[f"cutout{cutout}"]
    return gzip.decompress(data["stampData"]) if survey_of(alert) == "ztf" else bytes(data)


def _alerts(message: Message) -> Iterator[Alert]:
    yield from fastavro.reader(io.BytesIO(message.value()))  # type: ignore[misc]


def _headers(message: Message) -> dict[str, bytes]:
    return dict(message.headers() or [])


def _read_topic(bootstrap: str, topic: str) -> Iterator[Message]:
    consumer = Consumer(
        {
            "bootstrap.servers": bootstrap,
            "group.id": "demo-client",
            "isolation.level": "read_committed",
            "enable.auto.commit": False,
            "enable.partition.eof": True,
            "receive.message.max.bytes": LARGEST_ANSWER,
        }
    )
    try:
        partitions = consumer.list_topics(topic, timeout=SILENCE_S).topics[topic].partitions
        consumer.assign([TopicPartition(topic, partition, OFFSET_BEGINNING) for partition in partitions])
        unread = set(partitions)
        while unread:
            message = consumer.poll(SILENCE_S)
            if message is None:
                raise DemoError(f"{topic}: the broker at {bootstrap} has sent nothing for {SILENCE_S:.0f} s")
            if (error := message.error()) is None:
                yield message
            elif error.code() == KafkaError._PARTITION_EOF:
                unread.discard(message.partition())
            else:
                raise KafkaException(error)
    except KafkaException as error:
        raise DemoError(
            f"{topic}: the broker at {bootstrap} cannot be read: {error.args[0].str()}; run the demonstration again"
        ) from None
    finally:
        consumer.close()
