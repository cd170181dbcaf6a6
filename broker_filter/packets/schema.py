"""A writer's Avro schema: what a packet's bytes were written by. Parsed once, compared by identity of its source bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, eq=False)
class WriterSchema:
    """An Avro schema with its names resolved lazily by who walks it.

    `definition`: the JSON as Python values, as the writer published it. `fingerprint`: CRC-64-AVRO of its parsing canonical
    form, 16 hex digits. `registry_id`: the Confluent schema id, None for a schema embedded in a container file.
    Compared and hashed by identity: the caches in `ocf` and `registry` hand out one object per schema.
    """

    definition: dict[str, Any]
    fingerprint: str
    registry_id: int | None = None
