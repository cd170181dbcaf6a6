"""Rows of a table that hold the fields of alerts. They are decoded without their bytes: see `arrow`.

This module must not import pyarrow, which takes long and which packets do not need.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Protocol, overload, runtime_checkable

from broker_filter.packets.packet import FilePosition, Packet
from broker_filter.packets.schemas.writer_schema import WriterSchema

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True, slots=True, eq=False)
class AlertRows(Sequence[Packet]):
    """A batch of rows, each with the fields of one alert. As a sequence, it has an empty Packet for each row.

    `batch`: the columns; those that no reader wants may be absent. `schema`: the schema of the rows as Avro records,
    also of the absent columns. `position`: the position of the first row.
    """

    batch: pa.RecordBatch
    schema: WriterSchema
    position: FilePosition

    def __len__(self) -> int:
        return int(self.batch.num_rows)

    @overload
    def __getitem__(self, rows: int) -> Packet: ...
    @overload
    def __getitem__(self, rows: slice) -> AlertRows: ...
    def __getitem__(self, rows: int | slice) -> Packet | AlertRows:
        """Return the packet of a row, or the consecutive rows of a slice. Raises IndexError and ValueError."""
        if isinstance(rows, slice):
            start, stop, step = rows.indices(len(self))
            if step != 1:
                raise ValueError("rows of a table are sliced in steps of 1")
            return AlertRows(self.batch.slice(start, max(0, stop - start)), self.schema, self._position(start))
        return Packet(b"", self._position(range(len(self))[rows]))

    def _position(self, row: int) -> FilePosition:
        return replace(self.position, record=self.position.record + row)


@runtime_checkable
class Batched(Protocol):
    """A source of packets that comes in batches, some of which may be AlertRows."""

    def batches(self, size: int) -> Iterator[Sequence[Packet]]:
        """Yield all packets in order, at most `size` at a time."""
        ...


def in_batches(packets: Iterable[Packet] | Batched, size: int) -> Iterator[Sequence[Packet]]:
    """Yield all packets in order, at most `size` at a time; from a Batched source, rows of tables as AlertRows."""
    if isinstance(packets, Batched):
        return packets.batches(size)
    waiting = iter(packets)
    return iter(lambda: list(islice(waiting, size)), [])
