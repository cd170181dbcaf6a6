"""The account of a batch: each alert of its packets is scored, rejected or a duplicate, and is counted exactly once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from broker_filter.packets.batch import PLANES, AlertBatch, Plane, Survey
from broker_filter.packets.rejects import RejectReason
from broker_filter.packets.surveys import rows_of_unknown_version
from broker_filter.streaming.scored import LeftOut, ScoredBatch

MJD_OF_UNIX_EPOCH = 40_587.0
SECONDS_PER_DAY = 86_400.0
TAI_MINUS_UTC_S = 37.0
"""Since 2017-01-01 (IERS Bulletin C 52)."""
REJECTED_AFTER_DECODING = frozenset({RejectReason.NO_MODEL_FOR_SURVEY, RejectReason.SCHEMA_REFUSED})
"""Reasons of rejects that are rows of the decoded batch. `Account.consumed` counts these rows already."""


class AlertSchema(NamedTuple):
    """The schema that an alert was written with. `fingerprint`: the CRC-64-AVRO of the schema, 16 hex digits."""

    survey: Survey
    version: str
    fingerprint: str


@dataclass(slots=True)
class Account:
    """The outcome of the alerts of one or more packets. A packet without a readable alert counts as one reject."""

    consumed: int = 0
    """Alerts that decoding delivered, and rejects of decoding."""
    scored: int = 0
    """Alerts that at least one model scored, without duplicates."""
    duplicates: int = 0
    """Scored alerts whose id was seen before within the window."""
    judged: int = 0
    """Scored alerts that passed the cut of the reference and were compared with it."""
    anomalous: int = 0
    """Judged alerts that were flagged as anomalies."""
    unjudged: Counter[Survey] = field(default_factory=Counter)
    """Scored alerts, by survey, that passed the cut but could not be judged: the reference has too few alerts of their
    survey."""
    unknown_version: Counter[Survey] = field(default_factory=Counter)
    """Decoded alerts, by survey, whose schema version the program does not know."""
    schemas: Counter[AlertSchema] = field(default_factory=Counter)
    """Decoded alerts by the schema that they were written with."""
    fallbacks: Counter[Plane] = field(default_factory=Counter)
    """Scored alerts, by plane, for which a model used a fallback: the survey publishes the plane, but it is absent or
    unusable in at least one cutout of the alert."""
    passed: Counter[str] = field(default_factory=Counter)
    """Scored alerts, without duplicates, that passed a filter, by the name of the filter."""
    rejected: Counter[RejectReason] = field(default_factory=Counter)
    left_out: Counter[LeftOut] = field(default_factory=Counter)
    """Records of the shadow topic that were left out, by reason. Their alerts are scored all the same."""
    sent: list[float] = field(default_factory=list)
    """Unix seconds at which the producer sent each packet that has a timestamp."""
    exposed: list[float] = field(default_factory=list)
    """Unix seconds of the exposure of each scored alert."""

    def add(self, other: Account) -> None:
        """Add the counts of another account. The times are not kept: an archive may hold any number of them."""
        self.consumed += other.consumed
        self.scored += other.scored
        self.duplicates += other.duplicates
        self.judged += other.judged
        self.anomalous += other.anomalous
        self.unjudged.update(other.unjudged)
        self.unknown_version.update(other.unknown_version)
        self.schemas.update(other.schemas)
        self.fallbacks.update(other.fallbacks)
        self.passed.update(other.passed)
        self.rejected.update(other.rejected)
        self.left_out.update(other.left_out)


def account_batch(scored: ScoredBatch) -> Account:
    """Return the counts of all packets of a batch."""
    total = Account()
    for account in account_packets(scored):
        total.add(account)
    return total


def account_packets(scored: ScoredBatch) -> list[Account]:
    """Return the account of each packet of a batch, in the order of the packets.

    `consumed` is counted from what decoding delivered, the other counts from what scoring made of it. The two may only
    differ through a fault of the program, which the metric `broker_filter_unaccounted_alerts` shows.
    """
    accounts = [Account() for _ in scored.packets]
    exposed = exposure_times(scored.alerts).tolist()
    packet_index, duplicate = scored.alerts.packet_index.tolist(), scored.duplicate.tolist()
    for k, schema in zip(packet_index, _alert_schemas(scored.alerts), strict=True):
        accounts[k].consumed += 1
        accounts[k].schemas[schema] += 1
    for i in rows_of_unknown_version(scored.alerts):
        accounts[packet_index[i]].unknown_version[Survey(int(scored.alerts.survey[i]))] += 1
    for i in scored.scored.tolist():
        account = accounts[packet_index[i]]
        account.exposed.append(exposed[i])
        if duplicate[i]:
            account.duplicates += 1
        else:
            account.scored += 1
    for plane in PLANES:
        lost = scored.alerts.lost_planes(plane)
        for i in np.flatnonzero(lost & scored.scores.taken & ~scored.duplicate).tolist():
            accounts[packet_index[i]].fallbacks[plane] += 1
    if scored.anomalies:
        for i in np.flatnonzero(scored.anomalies.judged & scored.scores.taken & ~scored.duplicate).tolist():
            accounts[packet_index[i]].judged += 1
            accounts[packet_index[i]].anomalous += bool(scored.anomalies.flag[i])
        unjudged = scored.anomalies.unjudged
        for i in unjudged[~scored.duplicate[unjudged]].tolist():
            accounts[packet_index[i]].unjudged[Survey(int(scored.alerts.survey[i]))] += 1
    for one in scored.filters:
        for i in np.flatnonzero(one.passed & scored.scores.taken & ~scored.duplicate).tolist():
            accounts[packet_index[i]].passed[one.name] += 1
    for reject in scored.rejects:
        account = accounts[reject.packet_index]
        account.rejected[reject.reason] += 1
        account.consumed += reject.reason not in REJECTED_AFTER_DECODING
    for packet, account in zip(scored.packets, accounts, strict=True):
        if packet.timestamp_ms is not None:
            account.sent.append(packet.timestamp_ms / 1000)
    return accounts


def _alert_schemas(alerts: AlertBatch) -> Iterator[AlertSchema]:
    """Yield the schema that each alert was written with."""
    surveys = {int(survey): survey for survey in Survey}
    for survey, version, record in zip(alerts.survey.tolist(), alerts.schema_version, alerts.records, strict=True):
        yield AlertSchema(surveys[survey], version, record.schema.fingerprint)


def exposure_times(alerts: AlertBatch) -> NDArray[np.float64]:
    """Return the times of the exposures of N alerts in Unix seconds, float64[N]."""
    seconds = (alerts.mjd - MJD_OF_UNIX_EPOCH) * SECONDS_PER_DAY
    return np.where(alerts.survey == Survey.LSST, seconds - TAI_MINUS_UTC_S, seconds)
