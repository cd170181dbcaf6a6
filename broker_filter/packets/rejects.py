"""Inputs that cannot be scored, with one reason each from a closed list. A bad packet never raises an exception."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from broker_filter.packets.batch import AlertIdentity
from broker_filter.packets.packet import Packet


class RejectReason(StrEnum):
    """The reasons for a rejection. Dead-letter headers, metrics and output rows contain these values."""

    EMPTY = "empty"
    """The message has no bytes. A Kafka tombstone is such a message."""
    TOO_LARGE = "too_large"
    """The packet has more bytes, before or after decompression, or more alerts or rows of history than allowed."""
    NOT_AVRO = "not_avro"
    """The bytes are neither an Avro object container file nor Confluent wire format."""
    BAD_SCHEMA = "bad_schema"
    """The writer's schema cannot be parsed, or exceeds the bounds on schemas."""
    UNKNOWN_SCHEMA_ID = "unknown_schema_id"
    """The schema registry does not know the schema id of the message, or no registry is configured."""
    UNSUPPORTED_CODEC = "unsupported_codec"
    """The codec of the Avro container is not null, deflate, snappy, zstandard, bzip2 or xz."""
    TRUNCATED = "truncated"
    """The bytes end before the end of the record."""
    CORRUPT = "corrupt"
    """The bytes do not match their own schema (wrong sync marker, impossible length or union branch)."""
    NO_RECORD = "no_record"
    """The container is valid but contains no alert."""
    UNKNOWN_SURVEY = "unknown_survey"
    """The record is valid Avro, but not an alert of ZTF or LSST."""
    MISSING_FIELD = "missing_field"
    """The id, position or time of the alert is absent or null."""
    MISSING_CUTOUT = "missing_cutout"
    """A cutout is absent, null or empty."""
    BAD_CUTOUT = "bad_cutout"
    """A cutout cannot be decompressed, is not a two-dimensional FITS image, or exceeds the bounds on stamps."""
    BLANK_CUTOUT = "blank_cutout"
    """A cutout has no finite pixel."""
    NO_MODEL_FOR_SURVEY = "no_model_for_survey"
    """No configured model was trained for the survey of the alert or is configured to accept it."""
    SCHEMA_REFUSED = "schema_refused"
    """The schema registry of the output refused the schema of the output record."""


MAX_DETAIL_CHARACTERS = 1_000
"""The maximum length of a reject's detail. It is bounded because the detail may quote untrusted input."""


@dataclass(frozen=True, slots=True)
class Reject:
    """An input that cannot be scored.

    `packet_index`: the index of the packet in its batch. `detail`: what is wrong, truncated to MAX_DETAIL_CHARACTERS.
    `record`: the index of the alert within its packet. `alert`: the ids, time and position as far as they could be
    read; None if no record could be read. `schema`: the fingerprint of the writer's schema; None if it could not be
    read.

    >>> from broker_filter import Decoder, Packet
    >>> _, [reject] = Decoder().decode([Packet(b"")])
    >>> print(reject.reason, reject.packet_index)
    empty 0
    """

    packet: Packet
    packet_index: int
    reason: RejectReason
    detail: str
    record: int = 0
    alert: AlertIdentity | None = None
    schema: str | None = None

    def __post_init__(self) -> None:
        if len(self.detail) > MAX_DETAIL_CHARACTERS:
            object.__setattr__(self, "detail", f"{self.detail[:MAX_DETAIL_CHARACTERS]}...")
