"""Why an input cannot be scored: a closed list. Rejects are data; decoding a bad packet never raises."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from broker_filter.packets.batch import AlertIdentity
from broker_filter.packets.packet import Packet


class RejectReason(StrEnum):
    """The closed list of reasons, as they appear in dead-letter headers, metrics and output rows."""

    EMPTY = "empty"
    """No bytes at all (a Kafka tombstone included)."""
    TOO_LARGE = "too_large"
    """More bytes than `max_packet_bytes`, also decompressed, or more alerts or history than a packet may have."""
    NOT_AVRO = "not_avro"
    """Neither an Avro object container file nor Confluent wire format."""
    BAD_SCHEMA = "bad_schema"
    """The embedded schema cannot be parsed, or is beyond the bounds on schemas."""
    UNKNOWN_SCHEMA_ID = "unknown_schema_id"
    """The schema registry does not know the wire format's schema id, or no registry is configured."""
    UNSUPPORTED_CODEC = "unsupported_codec"
    """A container codec other than null, deflate, snappy, zstandard, bzip2 and xz."""
    TRUNCATED = "truncated"
    """The bytes end before the record does."""
    CORRUPT = "corrupt"
    """The bytes do not decode by their own schema (wrong sync marker, impossible length or union branch)."""
    NO_RECORD = "no_record"
    """A valid container without any alert in it."""
    UNKNOWN_SURVEY = "unknown_survey"
    """Well-formed, but not an alert of a survey that is known here."""
    MISSING_FIELD = "missing_field"
    """The alert's id, position or time is absent or null."""
    MISSING_CUTOUT = "missing_cutout"
    """A cutout is absent, null or empty."""
    BAD_CUTOUT = "bad_cutout"
    """A cutout does not inflate, is no FITS image of two dimensions, or is beyond the bounds on stamps."""
    BLANK_CUTOUT = "blank_cutout"
    """A cutout without a single finite pixel."""
    NO_MODEL_FOR_SURVEY = "no_model_for_survey"
    """No configured model was trained for the alert's survey, and none was told to take it also."""
    SCHEMA_REFUSED = "schema_refused"
    """The output's schema registry does not take the schema of the record that the scored alert would become."""


MAX_DETAIL_CHARACTERS = 1_000
"""Of a reject's detail, which may quote what a packet says."""


@dataclass(frozen=True, slots=True)
class Reject:
    """An input that cannot be scored.

    `detail` says what is wrong, and is cut to MAX_DETAIL_CHARACTERS. `record` counts within the packet; `alert` is what
    could still be read of it; `schema` is the fingerprint of its writer's schema, None where that could not be read.
    """

    packet: Packet
    reason: RejectReason
    detail: str
    record: int = 0
    alert: AlertIdentity | None = None
    schema: str | None = None

    def __post_init__(self) -> None:
        if len(self.detail) > MAX_DETAIL_CHARACTERS:
            object.__setattr__(self, "detail", f"{self.detail[:MAX_DETAIL_CHARACTERS]}...")
