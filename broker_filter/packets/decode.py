"""The Decoder turns packets into an AlertBatch and Rejects. It is the only decoder of alerts.

It splits each packet into records, walks each record once with a plan compiled for its schema, decodes the stamps into
their slots, and makes the columns of all alerts at once. It must never raise an exception because of a packet's bytes,
and never lose a packet: each packet becomes at least one alert or one reject. Only an unreachable schema registry
raises, because the packet is then not at fault.

A packet is untrusted input, so its cost is bounded: time, memory and output are at most proportional to
min(`GREATEST_RATIO` x its bytes, `max_packet_bytes`), plus a constant. `tests/packets/test_costs.py` measures this.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from broker_filter.packets.alert_rows import AlertRows
from broker_filter.packets.batch import (
    BANDS,
    CUTOUTS,
    PLANES,
    PSF_SIZE,
    SURVEYS_WITH_PLANES,
    UNKNOWN_BAND,
    AlertBatch,
    AlertIdentity,
    Plane,
    Record,
    Survey,
)
from broker_filter.packets.framing import foreign, wire
from broker_filter.packets.framing.ocf import (
    GREATEST_RATIO,
    MAGIC,
    MAX_CONTAINER_BYTES,
    Block,
    Container,
    Damage,
    read_container,
)
from broker_filter.packets.layout import (
    DESIGNATION_TEXT,
    N_POINT_COLUMNS,
    N_SPANS,
    OBJECT_NAME,
    RELIABILITY_VERSION,
    STAMP,
    VERSION,
    Fields,
    Layout,
    Plan,
)
from broker_filter.packets.packet import Packet
from broker_filter.packets.photometry import NO_ALERT, Points, detections_without_flux, light_curves
from broker_filter.packets.plan import field_paths
from broker_filter.packets.rejects import Reject, RejectReason
from broker_filter.packets.schemas.registry import SchemaRegistry, UnknownSchemaId, open_registry
from broker_filter.packets.schemas.writer_schema import BySchema, SchemaError, WriterSchema
from broker_filter.packets.stamps import PlaneSlots, StampError, decode_stamp, decode_stamps, inflated_bytes
from broker_filter.packets.surveys import (
    DEFAULT_COLUMNS,
    DESIGNATION,
    FORMATS,
    NO_DESIGNATION,
    broker_without_cutouts,
    catalogue_of,
    recognise,
    rows_of_unknown_version,
)
from broker_filter.packets.walk import MISSING_ID, Status, walk

DEFAULT_CUTOUT_SIZE = 63
"""The side of ZTF's cutouts, in pixels."""
MAX_RECORDS = 10_000
"""The maximum number of alerts in one packet. A Kafka message holds one alert and a block of an archive dozens. The
record count of a block is untrusted, so it must not create millions of rows."""
MAX_POINTS = 100_000
"""The maximum number of history rows in one packet. Ten years of LSST are some thousands."""
MAX_UNPACKING = 4
"""The maximum memory of all alerts of a packet, as a multiple of min(GREATEST_RATIO x its bytes, max_packet_bytes). It
counts the body, the schema, the cutout slots and the decompressed stamps of each alert. A ZTF alert takes three times
its bytes. The first alert of a packet is always decoded."""
RECORD_BYTES = 4096
"""The maximum memory of a record, in bytes, apart from its body, schema and cutouts; also for a rejected record."""
ROW_BYTES = 400
"""The maximum memory of a history row, in bytes, until the light curves are made."""
BATCH_BYTES_PER_PACKET = 512 << 10
"""The maximum mean memory per packet of a batch, in bytes; a batch that would exceed it is decoded in parts. A ZTF
alert takes 0.1 MB, an LSST alert 0.3 MB."""
_POINTS_PER_PACKET = 64
"""Initial capacity for history rows, per packet; it doubles when it is full, and the record is walked again."""
_PACKET_BYTES_PER_POINT = 400
"""The fewest bytes of a packet per history row, so that the initial capacity suffices for long histories: a row of LSST
takes 480 bytes, one of ZTF fewer, but ZTF's histories are short."""
READ_CUTOUTS = "read the survey's stream, or that of a broker that forwards the cutouts"
"""What to do about a stream without cutouts."""

_CAN_COME_FROM_WRONG_SCHEMA = frozenset(
    {
        RejectReason.TOO_LARGE,
        RejectReason.BAD_SCHEMA,
        RejectReason.TRUNCATED,
        RejectReason.CORRUPT,
        RejectReason.UNKNOWN_SURVEY,
        RejectReason.MISSING_FIELD,
        RejectReason.BAD_CUTOUT,
    }
)
"""Reasons for which a valid wire format alert can be rejected if it is decoded with another schema than its own."""

NO_ID = -1
"""Stands for "no schema id"; it is not a valid id."""

_MAX_WARNINGS = 100
"""The maximum number of warnings about schemas. Packets bring their own schemas, and must not fill the log."""
_MAX_VERSION = 40
"""The maximum number of characters of a schema version in the log. A packet's version is untrusted text."""

log = logging.getLogger(__name__)
_warned: set[tuple[str, str]] = set()
_T = TypeVar("_T", bound=np.generic)


class _Walked(NamedTuple):
    """A record after its walk, or a row of a table. `damage`: why it cannot be used; None if it can.

    `body`: the bytes that hold the record's stamps and texts: the record in Avro, or those of all rows of the table.
    """

    packet: int
    record: int
    plan: Plan
    body: memoryview
    start: int  # offset of `body` in its block; the spans that the walker writes count from the start of the block
    damage: Damage | None
    is_row: bool = False


class _Outputs:
    """The arrays that the walker writes: one row per record, and the history rows of all records in order."""

    def __init__(self, layouts: Sequence[Layout], packets: Sequence[Packet]) -> None:
        capacity = max(1, len(packets))
        n_points = max(capacity * _POINTS_PER_PACKET, sum([len(p.data) for p in packets]) // _PACKET_BYTES_PER_POINT)
        n_scalars = max(layout.n_scalars for layout in layouts)
        n_ids = max(layout.n_ids for layout in layouts)
        self.scalars: NDArray[np.float64] = np.empty((capacity, n_scalars))
        self.ids: NDArray[np.int64] = np.empty((capacity, n_ids), dtype=np.int64)
        self.spans: NDArray[np.int64] = np.empty((capacity, N_SPANS, 2), dtype=np.int64)
        self.points: NDArray[np.float64] = np.empty((n_points, N_POINT_COLUMNS))
        self.n_points: list[int] = []  # number of history rows of each record
        self.points_end = 0

    def walk(self, plan: Plan, body: memoryview, start: int, max_points: int = MAX_POINTS) -> tuple[Status, int]:
        """Walk the record at offset `start` of `body` and write the next row.

        Returns the status and the offset at which the record ended or the walk failed. Status.NO_ROOM: the history of
        the record has more than `max_points` rows.
        """
        row = len(self.n_points)
        if row == len(self.scalars):
            self.scalars, self.ids, self.spans = _doubled(self.scalars), _doubled(self.ids), _doubled(self.spans)
        while True:
            status, position, points_end = walk(
                plan.program, body, start, row, self.scalars, self.ids, self.spans, self.points, self.points_end
            )
            if points_end - self.points_end > max_points:
                status = Status.NO_ROOM
                break
            if status != Status.NO_ROOM:
                break
            self.points = _doubled(self.points)
        if status != Status.DONE:
            points_end = self.points_end
        self.n_points.append(points_end - self.points_end)
        self.points_end = points_end
        return Status.DONE if status == Status.DONE else Status(status), position

    def fields(self) -> Fields:
        """Return the rows that were written."""
        n = len(self.n_points)
        owners = np.repeat(np.arange(n), np.array(self.n_points, dtype=np.int64))
        return Fields(self.scalars[:n], self.ids[:n], self.spans[:n], self.points[: self.points_end], owners)

    def forget(self, n_rows: int) -> None:
        """Remove all rows after the first `n_rows`."""
        self.points_end -= sum(self.n_points[n_rows:])
        del self.n_points[n_rows:]


class Decoder:
    """Decodes packets into columns. Thread-safe.

    `registry`: where the schemas of packets in Confluent wire format (LSST) are found: the URL of a schema registry, a
    directory of `.avsc` files, or an opened registry; without a registry such packets are rejected. `cutout_size`: the
    side S of the cutouts, in pixels. `columns`: names of the metadata columns to decode; `designation` is the text of
    `AlertBatch.designation`. `planes`: the images that are decoded besides the cutouts (`variance`, `psf`; see
    AlertBatch). `max_packet_bytes`: a larger packet is rejected, also if it becomes larger by decompression.
    `require_cutouts`: whether an alert without a usable cutout is rejected; if False, the pixels of such a cutout are
    NaN and the height and width of its box are 0, for pages and pictures.

    Raises ValueError for an unknown metadata column or plane, and what `open_registry` raises for the registry.

    `Scorer.decoder` makes a decoder of everything that the models read. A decoder of other columns:

    >>> from broker_filter import Decoder, Packet
    >>> from broker_filter.simulate import simulate_night
    >>> decoder = Decoder(columns=["magpsf", "drb"])
    >>> packets = [Packet(alert.packet) for alert in simulate_night(3, seed=1)]
    >>> alerts, rejects = decoder.decode([*packets, Packet(b"no alert")])
    >>> alerts.cutouts.shape, alerts.column("magpsf").shape
    ((3, 3, 63, 63), (3,))
    >>> [str(reject.reason) for reject in rejects]
    ['not_avro']
    """

    def __init__(
        self,
        registry: SchemaRegistry | str | Path | None = None,
        *,
        cutout_size: int = DEFAULT_CUTOUT_SIZE,
        columns: Sequence[str] = DEFAULT_COLUMNS,
        planes: Collection[Plane] = (),
        max_packet_bytes: int = MAX_CONTAINER_BYTES,
        require_cutouts: bool = True,
    ) -> None:
        if registry is None or isinstance(registry, str | Path):
            registry = open_registry(registry)
        self._registry = registry
        self._cutout_size = cutout_size
        if unknown := set(planes) - set(PLANES):
            raise ValueError(f"unknown planes: {', '.join(sorted(unknown))}; the planes are {', '.join(PLANES)}")
        self._planes = frozenset(planes)
        n_pixels = cutout_size**2 * (1 + ("variance" in planes)) + PSF_SIZE**2 * ("psf" in planes)
        self._slot_bytes = len(CUTOUTS) * n_pixels * np.dtype(np.float32).itemsize
        self._columns = tuple(name for name in columns if name != DESIGNATION.name)
        self._designation = DESIGNATION.name in columns
        self._max_packet_bytes = max_packet_bytes
        self._require_cutouts = require_cutouts
        self._layouts = {known.survey: Layout(known, self._columns, designation=self._designation) for known in FORMATS}
        self._plan = BySchema(self._make_plan)
        # Only the decoding of stamps releases the GIL. If threads competed for the GIL in all other steps, they would
        # run in lockstep: all wait for the GIL, then all decode stamps. With this lock they alternate.
        self._turn = Lock()

    @property
    def fields(self) -> frozenset[str]:
        """The dotted paths of all fields that are read if a packet has them."""
        return frozenset().union(*(layout.fields for layout in self._layouts.values()))

    def decode(self, packets: Sequence[Packet]) -> tuple[AlertBatch, list[Reject]]:
        """Decode `packets`. Each packet becomes at least one alert of the batch or at least one reject.

        AlertRows are decoded from their columns. Their alerts have no bytes of their own in `records`.

        Raises RegistryUnavailable if a schema is needed and the registry does not answer; then nothing was decoded.
        """
        return self._decode(packets, math.inf)

    def decode_some(self, packets: Sequence[Packet]) -> tuple[AlertBatch, list[Reject]]:
        """Decode as `decode` does, but only those first packets that fit into memory together, at least one.

        The memory limit is BATCH_BYTES_PER_PACKET x len(packets). `packets` of the returned batch holds the packets
        that were decoded; pass the remaining packets to the next call.
        """
        return self._decode(packets, BATCH_BYTES_PER_PACKET * len(packets))

    def decode_stream(self, packets: Iterable[Packet], at_a_time: int) -> Iterator[tuple[AlertBatch, list[Reject]]]:
        """Decode a stream of packets in order, in batches of at most `at_a_time` packets, in constant memory.

        Raises RegistryUnavailable, as `decode` does.
        """
        waiting = iter(packets)
        return self.decode_batches(iter(lambda: list(islice(waiting, at_a_time)), []))

    def decode_batches(self, batches: Iterable[Sequence[Packet]]) -> Iterator[tuple[AlertBatch, list[Reject]]]:
        """Decode batches of packets or AlertRows in order, in constant memory. Raises as `decode` does."""
        for whole in batches:
            batch = whole
            while batch:
                alerts, rejects = self.decode_some(batch)
                yield alerts, rejects
                batch = batch[len(alerts.packets) :]

    def _decode(self, packets: Sequence[Packet], max_bytes: float) -> tuple[AlertBatch, list[Reject]]:
        if isinstance(packets, AlertRows):
            return self._decode_rows(packets, max_bytes)
        schemas = self._look_up(packets)
        alerts, rejects = self._decode_with(schemas, packets, max_bytes)
        # A wiped registry gives ids to other schemas, so the schemas in doubt are fetched again.
        doubted = {schema_id for reject in rejects if (schema_id := _doubted_id(reject)) in schemas}
        renewed = {i: self._registry.get(i, schema) for i in doubted if isinstance(schema := schemas[i], WriterSchema)}
        if any(schemas[schema_id] is not schema for schema_id, schema in renewed.items()):
            schemas |= renewed
            alerts, rejects = self._decode_with(schemas, packets, max_bytes)
        return alerts, [_with_origin(reject, schemas) for reject in rejects]

    def _look_up(self, packets: Sequence[Packet]) -> dict[int, WriterSchema | Damage]:
        """Return the schemas of all wire format packets by id; for a schema that cannot be used, the reason why.

        Schemas are looked up before any packet is decoded and without holding the lock: a registry may be slow, and
        other threads may have packets whose schemas are in memory.
        """
        limit = self._max_packet_bytes
        ids = {wire.unframe(p.data).schema_id for p in packets if wire.is_wire_message(p.data) and len(p.data) <= limit}
        schemas: dict[int, WriterSchema | Damage] = {}
        for schema_id in sorted(ids):
            try:
                schemas[schema_id] = self._registry.get(schema_id)
            except UnknownSchemaId as error:
                schemas[schema_id] = RejectReason.UNKNOWN_SCHEMA_ID, str(error)
            except SchemaError as error:
                schemas[schema_id] = RejectReason.BAD_SCHEMA, str(error)
        return schemas

    def _decode_with(
        self, schemas: Mapping[int, WriterSchema | Damage], packets: Sequence[Packet], max_bytes: float
    ) -> tuple[AlertBatch, list[Reject]]:
        outputs = _Outputs(list(self._layouts.values()), packets)
        walked: list[_Walked] = []
        rejects: list[Reject] = []
        with self._turn:
            n_bytes = 0
            for index, packet in enumerate(packets):
                n_rows, n_points = len(walked), outputs.points_end
                container, allowance = self._frame(packet.data, schemas), self._allowance(packet)
                damage, record = self._walk_container(index, allowance, container, outputs, walked)
                n_bytes += self._size(container, allowance, len(walked) - n_rows, outputs.points_end - n_points)
                if n_bytes > max_bytes and index:
                    del walked[n_rows:]
                    outputs.forget(n_rows)
                    packets = packets[:index]
                    break
                if damage is not None:
                    fingerprint = container.schema.fingerprint if container.schema else None
                    rejects.append(Reject(packet, index, *damage, record, schema=fingerprint))
            columns = _Columns(self._layouts, len(self._columns), outputs.fields(), walked)
        return self._batch(packets, walked, columns, rejects)

    def _decode_rows(self, rows: AlertRows, max_bytes: float) -> tuple[AlertBatch, list[Reject]]:
        """Decode the rows of a table, as `decode_some` does; `max_bytes` is the memory limit."""
        from broker_filter.packets.arrow import AlertColumns

        plan = self._plan(rows.schema)
        if not isinstance(plan, Plan):
            rejects = [Reject(packet, i, *plan, schema=rows.schema.fingerprint) for i, packet in enumerate(rows)]
            nothing = _Outputs(list(self._layouts.values()), ()).fields()
            return self._batch(rows, [], _Columns(self._layouts, len(self._columns), nothing, []), rejects)
        with self._turn:
            found = AlertColumns(rows.batch, plan)
            too_long, too_large = found.n_points > MAX_POINTS, found.n_bytes > self._max_packet_bytes
            n_points = np.where(too_long, 0, found.n_points)
            sizes = self._slot_bytes + RECORD_BYTES + found.n_bytes + ROW_BYTES * n_points
            rows = rows[: max(1, int(np.searchsorted(np.cumsum(sizes), max_bytes, "right")))]
            fields, content = found.read(~(too_long | too_large | found.uneven)[: len(rows)])
            damages: list[Damage | None] = [None] * len(rows)
            for reason, detail, damaged in (
                (RejectReason.CORRUPT, "the lists of a history differ in length", found.uneven),
                (
                    RejectReason.TOO_LARGE,
                    f"the packet's alerts have a history of more than {MAX_POINTS} rows",
                    too_long,
                ),
                (
                    RejectReason.TOO_LARGE,
                    f"the stamps of the row have more than {self._max_packet_bytes} bytes",
                    too_large,
                ),
            ):
                for row in np.flatnonzero(damaged[: len(rows)]).tolist():
                    damages[row] = reason, detail
            walked = [_Walked(row, 0, plan, content, 0, damage, True) for row, damage in enumerate(damages)]
            columns = _Columns(self._layouts, len(self._columns), fields, walked)
        return self._batch(rows, walked, columns, [])

    def _batch(
        self, packets: Sequence[Packet], walked: Sequence[_Walked], columns: _Columns, rejects: list[Reject]
    ) -> tuple[AlertBatch, list[Reject]]:
        """Decode the stamps, and return the batch of the sound records and the rejects.

        `packets`: all packets. `walked`, `columns`: their records. `rejects`: the packets with damage outside of their
        records.
        """
        with self._turn:
            sound = [row for row, item in enumerate(walked) if not (item.damage or columns.missing_field(row))]
            too_large = self._too_large(packets, walked, sound, columns)
            if too_large:
                sound = [row for row in sound if row not in too_large]

        cutouts = np.empty((len(sound), len(CUTOUTS), self._cutout_size, self._cutout_size), dtype=np.float32)
        boxes = np.empty((len(sound), len(CUTOUTS), 4), dtype=np.int16)
        planes = self._plane_slots(cutouts) if self._planes and columns.publish_planes(sound) else None
        bad_stamps = columns.decode_stamps(sound, cutouts, boxes, planes)
        if bad_stamps and not self._require_cutouts:
            for k, row in enumerate(sound):
                if row in bad_stamps:
                    columns.decode_usable_stamps(row, cutouts[k], boxes[k])
        elif bad_stamps:
            good = [k for k, row in enumerate(sound) if row not in bad_stamps]
            sound, cutouts, boxes = [sound[k] for k in good], cutouts[good], boxes[good]
            planes = planes and planes.select(good)
        if self._planes and planes is None:
            planes = self._absent_planes(cutouts)
        kept = set(sound)
        with self._turn:
            for row, item in enumerate(walked):
                if row in kept:
                    continue
                damage = item.damage or columns.missing_field(row) or too_large.get(row) or bad_stamps[row]
                fingerprint = item.plan.schema.fingerprint
                identity, packet = columns.identity(row), packets[item.packet]
                rejects.append(Reject(packet, item.packet, *damage, item.record, identity, fingerprint))
            alerts = columns.batch(packets, sound, cutouts, boxes, self._columns, planes)
            if self._designation:
                alerts = replace(alerts, designation=columns.designations(sound))
            return alerts, rejects

    def _plane_slots(self, cutouts: NDArray[np.float32]) -> PlaneSlots:
        """Return empty slots for the wanted planes of the alerts of `cutouts`."""
        n = len(cutouts)
        return PlaneSlots(
            np.empty_like(cutouts) if "variance" in self._planes else None,
            np.empty((n, len(CUTOUTS), PSF_SIZE, PSF_SIZE), np.float32) if "psf" in self._planes else None,
            np.zeros((n, len(CUTOUTS), len(PLANES)), np.bool_),
        )

    def _absent_planes(self, cutouts: NDArray[np.float32]) -> PlaneSlots:
        """Return the wanted planes of alerts whose surveys publish none: read-only views of a single NaN."""
        nan, n = np.float32(np.nan), len(cutouts)
        return PlaneSlots(
            np.broadcast_to(nan, cutouts.shape) if "variance" in self._planes else None,
            np.broadcast_to(nan, (n, len(CUTOUTS), PSF_SIZE, PSF_SIZE)) if "psf" in self._planes else None,
            np.zeros((n, len(CUTOUTS), len(PLANES)), np.bool_),
        )

    def _walk_container(
        self, index: int, allowance: int, container: Container, outputs: _Outputs, walked: list[_Walked]
    ) -> tuple[Damage | None, int]:
        """Walk the records of a packet and append them to `walked`.

        Returns the damage of the packet outside its walked records (None if there is none) and the number of records
        before that damage.
        """
        if container.schema is None:
            return container.error, 0
        record = 0
        damage: Damage | None
        points_left = max_points = min(MAX_POINTS, allowance // ROW_BYTES)
        for block in container.blocks:
            plan = self._plan(container.schema)
            if not isinstance(plan, Plan):
                return plan, 0
            start, end_record = 0, record + block.n_records
            while record < end_record:
                if record and record >= (max_records := min(MAX_RECORDS, allowance // RECORD_BYTES)):
                    return (RejectReason.TOO_LARGE, f"more than {max_records} alerts"), record
                status, end = outputs.walk(plan, block.body, start, points_left)
                if status is Status.NO_ROOM:
                    detail = f"the packet's alerts have a history of more than {max_points} rows"
                    damage = RejectReason.TOO_LARGE, detail
                else:
                    damage = _walk_damage(status, start, end, len(block.body), last=record == end_record - 1)
                walked.append(_Walked(index, record, plan, block.body[start:end], start, damage))
                if status is Status.NO_ROOM:
                    return None, record  # the rest of the packet is ignored
                if damage is not None:
                    break  # the start of the block's next record is unknown
                points_left -= outputs.n_points[-1]
                start, record = end, record + 1
            record = end_record
        return container.error or ((RejectReason.NO_RECORD, "the packet has no alert") if record == 0 else None), record

    def _allowance(self, packet: Packet) -> int:
        """Return the maximum memory of all alerts of a packet, in bytes."""
        return MAX_UNPACKING * self._most_bytes(packet.data)

    def _most_bytes(self, data: bytes) -> int:
        """Return the maximum size of a packet after decompression, in bytes."""
        return min(GREATEST_RATIO * len(data), self._max_packet_bytes)

    def _size(self, container: Container, allowance: int, n_records: int, n_points: int) -> int:
        """Return the maximum memory of a packet with this many walked records and history rows, in bytes."""
        if container.schema is None:
            return 0
        alerts = n_records * (self._slot_bytes + container.schema.n_bytes)
        if n_records > 1:
            alerts = min(alerts, allowance)
        bodies = sum([len(block.body) for block in container.blocks])
        return alerts + bodies + RECORD_BYTES * n_records + ROW_BYTES * n_points

    def _too_large(
        self, packets: Sequence[Packet], walked: Sequence[_Walked], sound: Sequence[int], columns: _Columns
    ) -> dict[int, Damage]:
        """Return the valid alerts that exceed the allowance of their packet, by row.

        `sound`: the rows of the valid alerts.
        """
        owners = [walked[row].packet for row in sound]
        if len(set(owners)) == len(owners):  # the usual case: one alert per packet
            return {}
        taken: dict[int, int] = {}
        too_large: dict[int, Damage] = {}
        for row, owner in zip(sound, owners, strict=True):
            item, allowance = walked[row], self._allowance(packets[owner])
            before = taken.get(owner, 0)
            stamps = columns.inflated_bytes(row)
            taken[owner] = before + self._slot_bytes + item.plan.schema.n_bytes + len(item.body) + stamps
            if before and taken[owner] > allowance:
                detail = f"the packet's alerts take more than {allowance} bytes in memory: put fewer into one packet"
                too_large[row] = RejectReason.TOO_LARGE, detail
        return too_large

    def _frame(self, data: bytes, schemas: Mapping[int, WriterSchema | Damage]) -> Container:
        """Return the still encoded records of a packet. `schemas`: the schemas of wire format packets by id."""
        if not data:
            return Container(None, (), (RejectReason.EMPTY, "the packet has no bytes"))
        is_container = data.startswith(MAGIC)
        if not is_container and (kind := foreign.describe(data)):
            return Container(None, (), (RejectReason.NOT_AVRO, kind))
        if len(data) > self._max_packet_bytes:
            return Container(
                None,
                (),
                (RejectReason.TOO_LARGE, f"the packet has {len(data)} bytes, more than {self._max_packet_bytes}"),
            )
        if is_container:
            return read_container(data, self._most_bytes(data))
        if not wire.is_wire_message(data):
            return Container(
                None, (), (RejectReason.NOT_AVRO, "neither an Avro container file nor Confluent wire format")
            )
        message = wire.unframe(data)
        schema = schemas[message.schema_id]
        if not isinstance(schema, WriterSchema):
            return Container(None, (), schema)
        return Container(schema, (Block(1, message.body),))

    def _make_plan(self, schema: WriterSchema) -> Plan | Damage:
        """Return the plan for a schema; if records of the schema cannot be decoded, the reason why."""
        paths = field_paths(schema)
        known = recognise(paths)
        name = schema.canonical["name"]
        if known is None and (broker := broker_without_cutouts(paths)):
            detail = f"the packet is an alert of LSST without cutouts: {broker}'s stream has none; {READ_CUTOUTS}"
            _warn_once(schema.fingerprint, "schema %r: every packet is rejected: %s", name, detail)
            return RejectReason.MISSING_CUTOUT, detail
        if known is None and catalogue_of(paths):
            detail = f"the row is a source or an object of an LSST catalogue, which has no cutouts; {READ_CUTOUTS}"
            return RejectReason.MISSING_CUTOUT, detail
        if known is None:
            return RejectReason.UNKNOWN_SURVEY, f"the fields of {name!r} are not those of a ZTF or LSST alert"
        try:
            return self._layouts[known.survey].plan(schema, paths)
        except SchemaError as error:
            return RejectReason.BAD_SCHEMA, str(error)


class _Columns:
    """The columns of all walked records, also of invalid ones. `batch` makes an AlertBatch of selected rows."""

    def __init__(
        self, layouts: Mapping[Survey, Layout], n_columns: int, fields: Fields, walked: Sequence[_Walked]
    ) -> None:
        n = len(walked)
        self._walked = walked
        starts = np.array([item.start for item in walked], dtype=np.int64)
        self._spans: NDArray[np.int64] = fields.spans - starts[:, None, None]
        self._span_lists: list[list[list[int]]] = self._spans.tolist()
        self._survey = np.array([item.plan.layout.format.survey for item in walked], dtype=np.uint8)
        self._alert_id = np.empty(n, dtype=np.int64)
        self._place = np.empty((n, 4))  # mjd, ra, dec, band
        self._metadata = np.empty((n, n_columns))
        self._object_id = [""] * n
        self._points: list[Points] = []
        points, owners = fields.points, fields.owners
        for survey, layout in layouts.items():
            rows = np.flatnonzero(self._survey == survey)
            if not len(rows):
                continue
            scalars, ids = fields.scalars[rows], fields.ids[rows]
            self._alert_id[rows] = layout.alert_ids(ids)
            for row, name in zip(rows.tolist(), layout.object_ids(ids), strict=True):
                self._object_id[row] = name or self._text(row, OBJECT_NAME)
            mine = self._survey[owners] == survey
            with np.errstate(all="ignore"):  # impossible values in a packet become inf or NaN
                for k, source in enumerate(layout.format.place):
                    self._place[rows, k] = layout.column(source, scalars, ids)
                histories = owners[mine], points[mine]
                pieces = layout.points(rows, scalars, ids, *histories)
                self._metadata[rows] = layout.metadata(rows, scalars, ids, *histories, pieces)
                self._points += pieces
        self._unplaced = (self._alert_id == MISSING_ID) | ~np.isfinite(self._place[:, :3]).all(axis=1)

    def missing_field(self, row: int) -> Damage | None:
        """Return the damage of a record that lacks its id, time or position; None if it has all of them."""
        if not self._unplaced[row]:
            return None
        names = ("id", "time", "right ascension", "declination")
        found = (self._alert_id[row] != MISSING_ID, *np.isfinite(self._place[row, :3]))
        missing = [name for name, there in zip(names, found, strict=True) if not there]
        return RejectReason.MISSING_FIELD, f"the alert has no {' and no '.join(missing)}"

    def publish_planes(self, rows: Sequence[int]) -> bool:
        """Return whether the survey of any of the records publishes planes."""
        return bool(np.isin(self._survey[rows], SURVEYS_WITH_PLANES).any())

    def decode_stamps(
        self,
        rows: Sequence[int],
        cutouts: NDArray[np.float32],
        boxes: NDArray[np.int16],
        planes: PlaneSlots | None,
    ) -> dict[int, Damage]:
        """Decode the stamps of N records into `cutouts` [N, 3, S, S], `boxes` [N, 3, 4] and `planes`.

        Returns the damage of each record that has an unusable stamp, by row.
        """
        formats = [self._walked[row].plan.layout.format for row in rows]
        failed = decode_stamps(
            [self._walked[row].body for row in rows],
            self._spans[rows, STAMP : STAMP + len(CUTOUTS)],
            np.array([each.stamps_centred for each in formats], dtype=np.bool_),
            cutouts,
            boxes,
            planes,
        )
        return {
            rows[k]: self._without_cutouts(rows[k]) or (error.reason, f"{formats[k].cutouts[c]}: {error.detail}")
            for k, (c, error) in failed.items()
        }

    def decode_usable_stamps(self, row: int, cutouts: NDArray[np.float32], boxes: NDArray[np.int16]) -> None:
        """Decode each usable stamp of a record into `cutouts` [3, S, S] and `boxes` [3, 4]; the others are NaN."""
        body, centred = self._walked[row].body, self._walked[row].plan.layout.format.stamps_centred
        for c, (begin, end) in enumerate(self._span_lists[row][STAMP : STAMP + len(CUTOUTS)]):
            try:
                boxes[c] = decode_stamp(body[begin:end] if begin >= 0 else b"", cutouts[c], centred=centred)
            except StampError:
                cutouts[c], boxes[c] = np.nan, 0

    def _without_cutouts(self, row: int) -> Damage | None:
        """Return the damage of a record that has none of the three cutouts; None if it has any."""
        if any(end > begin for begin, end in self._span_lists[row][STAMP : STAMP + len(CUTOUTS)]):
            return None
        plan = self._walked[row].plan
        alert = f"the packet is an alert of {plan.layout.format.survey.name} without cutouts"
        if plan.cutouts:
            return RejectReason.MISSING_CUTOUT, f"{alert}: {READ_CUTOUTS}"
        detail = f"{alert}: its schema has no field for them; {READ_CUTOUTS}"
        _warn_once(
            plan.schema.fingerprint,
            "schema %r: every packet is rejected: %s",
            plan.schema.canonical["name"],
            detail,
        )
        return RejectReason.MISSING_CUTOUT, detail

    def inflated_bytes(self, row: int) -> int:
        """Return the maximum total size of the decompressed stamps of a record, in bytes."""
        body = self._walked[row].body
        spans = self._span_lists[row][STAMP : STAMP + len(CUTOUTS)]
        return sum(inflated_bytes(body[begin:end]) for begin, end in spans if begin >= 0)

    def schema_version(self, row: int) -> str:
        """Return the version of the survey's schema.

        It is the version in the record if there is one (Fink's copies of LSST alerts hold "lsst.v10_0"), else the
        version of the schema that the packet was written with.
        """
        return self._text(row, VERSION).removeprefix("lsst.v").replace("_", ".") or self._walked[row].plan.version

    def identity(self, row: int) -> AlertIdentity:
        """Return the ids, time, position and band of an alert, as far as they could be read."""
        alert_id = int(self._alert_id[row])
        mjd, ra, dec, band = self._place[row].tolist()
        return AlertIdentity(
            alert_id=None if alert_id == MISSING_ID else alert_id,
            object_id=self._object_id[row] or None,
            survey=self._walked[row].plan.layout.format.survey,
            schema_version=self.schema_version(row),
            mjd=mjd if math.isfinite(mjd) else None,
            ra=ra if math.isfinite(ra) else None,
            dec=dec if math.isfinite(dec) else None,
            band=None if band == UNKNOWN_BAND else BANDS[int(band)],
        )

    def batch(
        self,
        packets: Sequence[Packet],
        kept: Sequence[int],
        cutouts: NDArray[np.float32],
        boxes: NDArray[np.int16],
        names: tuple[str, ...],
        planes: PlaneSlots | None,
    ) -> AlertBatch:
        """Return the batch of the N rows `kept`.

        `packets`: the packets of all rows. `cutouts`, `boxes`: those of the kept rows, float32[N, 3, S, S] and
        int16[N, 3, 4]. `names`: the metadata columns. `planes`: the decoded planes; None if no plane was wanted.
        """
        rows = np.array(kept, dtype=np.int64)
        alert_of_row = np.full(len(self._walked), NO_ALERT)
        alert_of_row[rows] = np.arange(len(rows))
        pieces = [points._replace(alert=alert_of_row[points.alert]) for points in self._points]
        walked = [self._walked[row] for row in kept]
        self._warn_of_lost_detections(detections_without_flux(pieces), walked)
        alerts = AlertBatch(
            packets=packets,
            packet_index=np.array([item.packet for item in walked], dtype=np.int32),
            record_index=np.array([item.record for item in walked], dtype=np.int32),
            records=[self._record(row) for row in kept],
            survey=self._survey[rows],
            schema_version=[self.schema_version(row) for row in kept],
            alert_id=self._alert_id[rows],
            object_id=[self._object_id[row] for row in kept],
            mjd=self._place[rows, 0],
            ra=self._place[rows, 1],
            dec=self._place[rows, 2],
            band=self._place[rows, 3].astype(np.uint8),
            cutouts=cutouts,
            cutout_box=boxes,
            columns=names,
            metadata=self._metadata[rows],
            light_curves=light_curves(len(rows), pieces),
            variance=planes.variance if planes else None,
            psf=planes.psf if planes else None,
            usable_planes=planes.usable if planes else None,
            reliability_version=self._reliability_versions(rows),
        )
        _warn_of_unknown_versions(alerts)
        return alerts

    def _reliability_versions(self, rows: NDArray[np.int64]) -> list[str | None] | None:
        """Return the version of the survey's real-bogus score of each alert; None if no alert has one."""
        if (self._spans[rows, RELIABILITY_VERSION, 0] < 0).all():
            return None
        return [self._text(row, RELIABILITY_VERSION) or None for row in rows.tolist()]

    def designations(self, rows: Sequence[int]) -> list[str | None]:
        """Return the designation of the solar-system object of each record; None if there is none."""
        texts = [self._text(row, DESIGNATION_TEXT) for row in rows]
        return [None if text in NO_DESIGNATION else text for text in texts]

    def _warn_of_lost_detections(self, lost: NDArray[np.int64], walked: Sequence[_Walked]) -> None:
        """Log, once per schema, that detections of the alerts in the rows `lost` of the batch have no flux."""
        for fingerprint in dict.fromkeys(walked[row].plan.schema.fingerprint for row in lost.tolist()):
            _warn_once(
                fingerprint,
                "detections without a flux are left out of light curves, because `isdiffpos` (ZTF) is not one of "
                "t, f, 1, 0, true, false, or `psfFlux` (LSST) is missing; first seen with schema %s",
                fingerprint,
            )

    def _record(self, row: int) -> Record:
        item, spans = self._walked[row], self._span_lists[row]
        if item.is_row:
            return Record(memoryview(b""), item.plan.schema, ())
        return Record(
            item.body, item.plan.schema, tuple([(spans[slot][0], spans[slot][1]) for slot in item.plan.cutouts])
        )

    def _text(self, row: int, slot: int) -> str:
        begin, end = self._span_lists[row][slot]
        return str(self._walked[row].body[begin:end], "utf-8", "replace") if begin >= 0 else ""


def _warn_of_unknown_versions(alerts: AlertBatch) -> None:
    """Log, once per schema, that alerts have a schema version that the program does not know."""
    for row in rows_of_unknown_version(alerts):
        schema = alerts.records[row].schema
        _warn_once(
            schema.fingerprint,
            "schema %r (id %s, fingerprint %s) is version %s of the %s alerts, which this program does not know: "
            "alerts are decoded by this schema, and a field that it has renamed is missing",
            schema.canonical["name"],
            schema.registry_id,
            schema.fingerprint,
            alerts.schema_version[row][:_MAX_VERSION],
            Survey(int(alerts.survey[row])).name,
        )


def _warn_once(fingerprint: str, message: str, *values: object) -> None:
    """Log a warning about a schema, unless it was logged before, or _MAX_WARNINGS were."""
    if (fingerprint, message) not in _warned and len(_warned) < _MAX_WARNINGS:
        _warned.add((fingerprint, message))
        log.warning(message, *values)


def _doubted_id(reject: Reject) -> int:
    """Return the schema id of a wire format packet whose schema may be wrong.

    The result is NO_ID if the packet was rejected for another reason, or names no schema id.
    """
    data = reject.packet.data
    if reject.reason in _CAN_COME_FROM_WRONG_SCHEMA and wire.is_wire_message(data):
        return wire.unframe(data).schema_id
    return NO_ID


def _with_origin(reject: Reject, schemas: Mapping[int, WriterSchema | Damage]) -> Reject:
    """Return the reject, with the file of the cached schema in its detail if that schema may be wrong."""
    schema = schemas.get(_doubted_id(reject))
    if not isinstance(schema, WriterSchema) or schema.cached is None:
        return reject
    origin = f"schema {schema.registry_id} was read from the cache file {schema.cached} of an earlier run"
    return replace(reject, detail=f"{reject.detail}; {origin}")


def _walk_damage(status: Status, start: int, end: int, n_bytes: int, *, last: bool) -> Damage | None:
    """Return the damage of a record walked from `start` to `end` of a block of `n_bytes`; None if there is none.

    `last`: the record is the last of its block, so it must end where the block ends.
    """
    if status is Status.DONE:
        if start == end:
            return RejectReason.MISSING_FIELD, "the record has no bytes, so the alert has no id"
        if last and end != n_bytes:
            return RejectReason.CORRUPT, f"{n_bytes - end} bytes are left after the last record"
        return None
    if status is Status.TRUNCATED:
        return RejectReason.TRUNCATED, f"the block ends within a record, in the field at byte {end}"
    return RejectReason.CORRUPT, f"impossible number, length or union branch at byte {end}"


def _doubled(array: NDArray[_T]) -> NDArray[_T]:
    return np.concatenate([array, np.empty_like(array)])
