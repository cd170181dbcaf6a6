"""Decoder: packets -> AlertBatch + Rejects. The one way from bytes to alerts.

Frames each packet, walks each record once by a plan compiled for its schema, decodes the stamps into their slots, and
makes the columns of all alerts at once. Must never raise on any bytes, and never lose a packet: each becomes at least
one alert or one reject. Only an unreachable schema registry escapes, because the packet is not at fault.

A packet is untrusted input, and what it costs is bounded: time, memory and output are at most in proportion to
min(`GREATEST_RATIO` x its bytes, `max_packet_bytes`), beside a constant. `tests/packets/test_costs.py` measures that.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from threading import Lock
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from broker_filter.packets import foreign, wire
from broker_filter.packets.batch import BANDS, CUTOUTS, UNKNOWN_BAND, AlertBatch, AlertIdentity, Record, Survey
from broker_filter.packets.layout import (
    N_POINT_COLUMNS,
    N_SPANS,
    OBJECT_NAME,
    STAMP,
    VERSION,
    Layout,
    Plan,
)
from broker_filter.packets.ocf import (
    GREATEST_RATIO,
    MAGIC,
    MAX_CONTAINER_BYTES,
    Block,
    Container,
    Damage,
    read_container,
)
from broker_filter.packets.packet import Packet
from broker_filter.packets.photometry import NO_ALERT, Points, detections_without_flux, light_curves
from broker_filter.packets.plan import field_paths
from broker_filter.packets.registry import SchemaRegistry, UnknownSchemaId
from broker_filter.packets.rejects import Reject, RejectReason
from broker_filter.packets.schema import BySchema, SchemaError, WriterSchema
from broker_filter.packets.stamps import decode_stamps, inflated_bytes
from broker_filter.packets.surveys import DEFAULT_COLUMNS, FORMATS, recognise
from broker_filter.packets.walk import MISSING_ID, Status, walk

DEFAULT_CUTOUT_SIZE = 63
"""ZTF's, in pixels."""
MAX_RECORDS = 10_000
"""Alerts in one packet: a message holds one, a block of an archive dozens; a lying block must not become a million."""
MAX_POINTS = 100_000
"""Rows of history in one packet; ten years of LSST are some thousands."""
MAX_UNPACKING = 4
"""What the alerts of a packet may take in all, as a multiple of min(GREATEST_RATIO x its bytes, max_packet_bytes): of
each its body, its schema, the slots of its cutouts, and its stamps inflated. A ZTF alert takes three times its bytes.
A packet's first alert is always decoded."""
RECORD_BYTES = 4096
"""Memory that a record takes at most, beside its body, schema and cutouts, also one that is rejected."""
ROW_BYTES = 400
"""Memory that a row of history takes at most, until the light curves are made."""
BATCH_BYTES_PER_PACKET = 512 << 10
"""Memory that the packets of a batch may take on average: what is beyond is decoded in a batch of its own. A ZTF alert
takes 0.1 MB, an LSST alert 0.3 MB."""
_POINTS_PER_PACKET = 64
"""Room for history at first; it doubles when full."""

_DOUBTFUL = frozenset(
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
"""What a sound alert in wire format may be rejected as that is decoded by another schema than it was written with."""

NO_ID = -1
"""No schema's id."""

_MAX_SAID = 100
"""Schemas of which a warning is given: packets bring their own, and must not fill the log."""

log = logging.getLogger(__name__)
_said: set[str] = set()
_T = TypeVar("_T", bound=np.generic)


class _Walked(NamedTuple):
    """A record that was walked, with or without success."""

    packet: int
    record: int
    plan: Plan
    body: memoryview
    start: int  # of `body` in its block, from where the walker counts
    damage: Damage | None


class _Outputs:
    """What the walker writes: a row a record, and the rows of their histories one after another."""

    def __init__(self, layouts: Sequence[Layout], capacity: int) -> None:
        n_scalars = max(layout.n_scalars for layout in layouts)
        n_ids = max(layout.n_ids for layout in layouts)
        self.scalars: NDArray[np.float64] = np.empty((capacity, n_scalars))
        self.ids: NDArray[np.int64] = np.empty((capacity, n_ids), dtype=np.int64)
        self.spans: NDArray[np.int64] = np.empty((capacity, N_SPANS, 2), dtype=np.int64)
        self.points: NDArray[np.float64] = np.empty((capacity * _POINTS_PER_PACKET, N_POINT_COLUMNS))
        self.n_points: list[int] = []  # of each row
        self.points_end = 0

    def walk(self, plan: Plan, body: memoryview, start: int, max_points: int = MAX_POINTS) -> tuple[Status, int]:
        """Walks the record at `start` of `body` into the next row. Where it ended, or failed.

        Status.NO_ROOM: its history has more than `max_points` rows.
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

    def forget(self, n_rows: int) -> None:
        """Drops all rows but the first `n_rows`."""
        self.points_end -= sum(self.n_points[n_rows:])
        del self.n_points[n_rows:]


class Decoder:
    """Turns packets into columns. One serves any number of threads.

    `cutout_size` S: pixels along a side of the cutouts. `columns`: names of `surveys.COLUMNS` (ValueError for others).
    """

    def __init__(
        self,
        registry: SchemaRegistry,
        *,
        cutout_size: int = DEFAULT_CUTOUT_SIZE,
        columns: Sequence[str] = DEFAULT_COLUMNS,
        max_packet_bytes: int = MAX_CONTAINER_BYTES,
    ) -> None:
        self._registry = registry
        self._cutout_size = cutout_size
        self._slot_bytes = len(CUTOUTS) * cutout_size**2 * np.dtype(np.float32).itemsize
        self._columns = tuple(columns)
        self._max_packet_bytes = max_packet_bytes
        self._layouts = {known.survey: Layout(known, self._columns) for known in FORMATS}
        self._plan = BySchema(self._make_plan)
        # Only stamps are decoded without the interpreter. Threads that shared it for the rest, call by call, would end
        # that together, inflate together, and want it together again, for ever.
        self._turn = Lock()

    @property
    def fields(self) -> frozenset[str]:
        """The dotted paths of all fields that are read where a packet has them."""
        return frozenset().union(*(layout.fields for layout in self._layouts.values()))

    def decode(self, packets: Sequence[Packet]) -> tuple[AlertBatch, list[Reject]]:
        """Decodes `packets`; every one of them is at least one alert of the batch or one of the rejects.

        Raises RegistryUnavailable where a schema is needed that cannot be had now; then nothing was decoded.
        """
        return self._decode(packets, math.inf)

    def decode_some(self, packets: Sequence[Packet]) -> tuple[AlertBatch, list[Reject]]:
        """As `decode`, of the first packets only where all would take too much memory at a time, and of one at least.

        The batch's `packets` are those that were decoded; the others are for the next call.
        """
        return self._decode(packets, BATCH_BYTES_PER_PACKET * len(packets))

    def decode_stream(self, packets: Iterable[Packet], at_a_time: int) -> Iterator[tuple[AlertBatch, list[Reject]]]:
        """Decodes a stream of packets in its order, in batches of at most so many, in flat memory."""
        waiting = iter(packets)
        while batch := list(islice(waiting, at_a_time)):
            while batch:
                alerts, rejects = self.decode_some(batch)
                yield alerts, rejects
                batch = batch[len(alerts.packets) :]

    def _decode(self, packets: Sequence[Packet], max_bytes: float) -> tuple[AlertBatch, list[Reject]]:
        schemas = self._look_up(packets)
        alerts, rejects = self._decode_with(schemas, packets, max_bytes)
        doubted = {schema_id for reject in rejects if (schema_id := _doubted_id(reject)) in schemas}
        renewed = {i: self._registry.get(i, schema) for i in doubted if isinstance(schema := schemas[i], WriterSchema)}
        if any(schemas[schema_id] is not schema for schema_id, schema in renewed.items()):
            schemas |= renewed
            alerts, rejects = self._decode_with(schemas, packets, max_bytes)
        return alerts, [_with_origin(reject, schemas) for reject in rejects]

    def _look_up(self, packets: Sequence[Packet]) -> dict[int, WriterSchema | Damage]:
        """The schemas of wire format packets, or what is wrong with them, by id.

        They are looked up before any packet is decoded, and outside of the thread's turn: a registry may be slow, and
        other threads have packets whose schemas are at hand.
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
        outputs = _Outputs(list(self._layouts.values()), max(1, len(packets)))
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
                    rejects.append(Reject(packet, *damage, record, schema=fingerprint))
            columns = _Columns(self._layouts, len(self._columns), outputs, walked)
            sound = [row for row, item in enumerate(walked) if not (item.damage or columns.missing_field(row))]
            too_large = self._too_large(packets, walked, sound, columns)
            if too_large:
                sound = [row for row in sound if row not in too_large]

        cutouts = np.empty((len(sound), len(CUTOUTS), self._cutout_size, self._cutout_size), dtype=np.float32)
        boxes = np.empty((len(sound), len(CUTOUTS), 4), dtype=np.int16)
        bad_stamps = columns.decode_stamps(sound, cutouts, boxes)
        if bad_stamps:
            good = [k for k, row in enumerate(sound) if row not in bad_stamps]
            sound, cutouts, boxes = [sound[k] for k in good], cutouts[good], boxes[good]
        kept = set(sound)
        with self._turn:
            for row, item in enumerate(walked):
                if row in kept:
                    continue
                damage = item.damage or columns.missing_field(row) or too_large.get(row) or bad_stamps[row]
                fingerprint = item.plan.schema.fingerprint
                rejects.append(Reject(packets[item.packet], *damage, item.record, columns.identity(row), fingerprint))
            return columns.batch(packets, sound, cutouts, boxes, self._columns), rejects

    def _walk_container(
        self, index: int, allowance: int, container: Container, outputs: _Outputs, walked: list[_Walked]
    ) -> tuple[Damage | None, int]:
        """Walks the records of a packet. What is wrong with it beyond them, if anything, and after how many records."""
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
                    return None, record  # the rest of the packet is not looked at
                if damage is not None:
                    break  # nobody knows where the block's next record begins
                points_left -= outputs.n_points[-1]
                start, record = end, record + 1
            record = end_record
        return container.error or ((RejectReason.NO_RECORD, "no alert in it") if record == 0 else None), record

    def _allowance(self, packet: Packet) -> int:
        """Bytes that the alerts of a packet may take in all."""
        return MAX_UNPACKING * self._most_bytes(packet.data)

    def _most_bytes(self, data: bytes) -> int:
        """Bytes that a packet may inflate to."""
        return min(GREATEST_RATIO * len(data), self._max_packet_bytes)

    def _size(self, container: Container, allowance: int, n_records: int, n_points: int) -> int:
        """Bytes that a packet takes in memory at most, of which so many records and rows of history were walked."""
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
        """The sound alerts that are beyond what their packet may take, by row."""
        owners = [walked[row].packet for row in sound]
        if len(set(owners)) == len(owners):  # nearly always: one alert a packet
            return {}
        taken: dict[int, int] = {}
        too_large: dict[int, Damage] = {}
        for row, owner in zip(sound, owners, strict=True):
            item, allowance = walked[row], self._allowance(packets[owner])
            before = taken.get(owner, 0)
            stamps = columns.inflated_bytes(row)
            taken[owner] = before + self._slot_bytes + item.plan.schema.n_bytes + len(item.body) + stamps
            if before and taken[owner] > allowance:
                detail = f"the packet's alerts take more than {allowance} bytes, unpacked: put fewer into a packet"
                too_large[row] = RejectReason.TOO_LARGE, detail
        return too_large

    def _frame(self, data: bytes, schemas: Mapping[int, WriterSchema | Damage]) -> Container:
        """The records of a packet, still encoded. `schemas`: those of wire format, by id."""
        if not data:
            return Container(None, (), (RejectReason.EMPTY, "no bytes"))
        is_container = data.startswith(MAGIC)
        if not is_container and (kind := foreign.describe(data)):
            return Container(None, (), (RejectReason.NOT_AVRO, kind))
        if len(data) > self._max_packet_bytes:
            return Container(
                None, (), (RejectReason.TOO_LARGE, f"{len(data)} bytes, more than {self._max_packet_bytes}")
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
        """The plan for a schema, or why there is none."""
        paths = field_paths(schema)
        known = recognise(paths)
        if known is None:
            return RejectReason.UNKNOWN_SURVEY, f"the fields of {schema.canonical['name']!r} are no known survey's"
        try:
            return self._layouts[known.survey].plan(schema, paths)
        except SchemaError as error:
            return RejectReason.BAD_SCHEMA, str(error)


class _Columns:
    """The columns of all records that were walked, good or not; a batch is made of the good ones."""

    def __init__(
        self, layouts: Mapping[Survey, Layout], n_columns: int, outputs: _Outputs, walked: Sequence[_Walked]
    ) -> None:
        n = len(walked)
        self._walked = walked
        starts = np.array([item.start for item in walked], dtype=np.int64)
        self._spans: NDArray[np.int64] = outputs.spans[:n] - starts[:, None, None]
        self._span_lists: list[list[list[int]]] = self._spans.tolist()
        self._survey = np.array([item.plan.layout.format.survey for item in walked], dtype=np.uint8)
        self._alert_id = np.empty(n, dtype=np.int64)
        self._place = np.empty((n, 4))  # mjd, ra, dec, band
        self._metadata = np.empty((n, n_columns))
        self._object_id = [""] * n
        self._points: list[Points] = []
        points = outputs.points[: outputs.points_end]
        owners = np.repeat(np.arange(n), np.array(outputs.n_points, dtype=np.int64))
        for survey, layout in layouts.items():
            rows = np.flatnonzero(self._survey == survey)
            if not len(rows):
                continue
            scalars, ids = outputs.scalars[rows], outputs.ids[rows]
            self._alert_id[rows] = layout.alert_ids(ids)
            for row, name in zip(rows.tolist(), layout.object_ids(ids), strict=True):
                self._object_id[row] = name or self._text(row, OBJECT_NAME)
            mine = self._survey[owners] == survey
            with np.errstate(all="ignore"):  # nonsense in a packet becomes inf or NaN in its columns
                for k, source in enumerate(layout.format.place):
                    self._place[rows, k] = layout.column(source, scalars, ids)
                histories = owners[mine], points[mine]
                self._metadata[rows] = layout.metadata(rows, scalars, ids, *histories)
                self._points += layout.points(rows, scalars, ids, *histories)
        self._unplaced = (self._alert_id == MISSING_ID) | ~np.isfinite(self._place[:, :3]).all(axis=1)

    def missing_field(self, row: int) -> Damage | None:
        """What the record lacks that every alert must have."""
        if not self._unplaced[row]:
            return None
        names = ("id", "time", "right ascension", "declination")
        found = (self._alert_id[row] != MISSING_ID, *np.isfinite(self._place[row, :3]))
        missing = [name for name, there in zip(names, found, strict=True) if not there]
        return RejectReason.MISSING_FIELD, f"the alert has no {' and no '.join(missing)}"

    def decode_stamps(
        self, rows: Sequence[int], cutouts: NDArray[np.float32], boxes: NDArray[np.int16]
    ) -> dict[int, Damage]:
        """Decodes the stamps of N records into their slots, [N, 3, S, S] and [N, 3, 4]. What is wrong, by row."""
        formats = [self._walked[row].plan.layout.format for row in rows]
        failed = decode_stamps(
            [self._walked[row].body for row in rows],
            self._spans[rows, STAMP : STAMP + len(CUTOUTS)],
            np.array([each.stamps_centred for each in formats], dtype=np.bool_),
            cutouts,
            boxes,
        )
        return {rows[k]: (error.reason, f"{formats[k].cutouts[c]}: {error.detail}") for k, (c, error) in failed.items()}

    def inflated_bytes(self, row: int) -> int:
        """How many bytes reading the stamps of a record inflates at most."""
        body = self._walked[row].body
        spans = self._span_lists[row][STAMP : STAMP + len(CUTOUTS)]
        return sum(inflated_bytes(body[begin:end]) for begin, end in spans if begin >= 0)

    def schema_version(self, row: int) -> str:
        """As the record says it (in Fink's copies of LSST alerts: lsst.v10_0), else as its schema does."""
        return self._text(row, VERSION).removeprefix("lsst.v").replace("_", ".") or self._walked[row].plan.version

    def identity(self, row: int) -> AlertIdentity:
        """What could be read of what the alert is called."""
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
    ) -> AlertBatch:
        """The batch of the rows `kept`."""
        rows = np.array(kept, dtype=np.int64)
        alert_of_row = np.full(len(self._walked), NO_ALERT)
        alert_of_row[rows] = np.arange(len(rows))
        pieces = [points._replace(alert=alert_of_row[points.alert]) for points in self._points]
        walked = [self._walked[row] for row in kept]
        self._say_lost(detections_without_flux(pieces), walked)
        return AlertBatch(
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
        )

    def _say_lost(self, lost: NDArray[np.int64], walked: Sequence[_Walked]) -> None:
        """Says, once for a schema, that detections in the `lost` rows of the batch have no flux."""
        for fingerprint in dict.fromkeys(walked[row].plan.schema.fingerprint for row in lost.tolist()):
            if fingerprint not in _said and len(_said) < _MAX_SAID:
                _said.add(fingerprint)
                log.warning(
                    "detections without a flux are left out of light curves: `isdiffpos` (ZTF) is none of t, f, 1, 0, "
                    "true, false, or `psfFlux` (LSST) is missing; first seen with schema %s",
                    fingerprint,
                )

    def _record(self, row: int) -> Record:
        item, spans = self._walked[row], self._span_lists[row]
        return Record(
            item.body, item.plan.schema, tuple([(spans[slot][0], spans[slot][1]) for slot in item.plan.cutouts])
        )

    def _text(self, row: int, slot: int) -> str:
        begin, end = self._span_lists[row][slot]
        return str(self._walked[row].body[begin:end], "utf-8", "replace") if begin >= 0 else ""


def _doubted_id(reject: Reject) -> int:
    """The schema id of a rejected packet in wire format that another schema might have decoded, else NO_ID."""
    data = reject.packet.data
    return wire.unframe(data).schema_id if reject.reason in _DOUBTFUL and wire.is_wire_message(data) else NO_ID


def _with_origin(reject: Reject, schemas: Mapping[int, WriterSchema | Damage]) -> Reject:
    """A reject whose detail names the file of the cache, if its schema was found in one and may be the wrong one."""
    schema = schemas.get(_doubted_id(reject))
    if not isinstance(schema, WriterSchema) or schema.cached is None:
        return reject
    origin = f"schema {schema.registry_id} was kept by an earlier run in {schema.cached}"
    return replace(reject, detail=f"{reject.detail}; {origin}")


def _walk_damage(status: Status, start: int, end: int, n_bytes: int, *, last: bool) -> Damage | None:
    """What is wrong with a record walked from `start` to `end` of a block of `n_bytes`, which its last record fills."""
    if status is Status.DONE:
        if start == end:
            return RejectReason.MISSING_FIELD, "the record has no bytes, and so no id"
        if last and end != n_bytes:
            return RejectReason.CORRUPT, f"{n_bytes - end} bytes are left after the last record"
        return None
    if status is Status.TRUNCATED:
        return RejectReason.TRUNCATED, f"the record ends after its block does, in a field at byte {end}"
    return RejectReason.CORRUPT, f"an impossible number, length or union branch at byte {end}"


def _doubled(array: NDArray[_T]) -> NDArray[_T]:
    return np.concatenate([array, np.empty_like(array)])
