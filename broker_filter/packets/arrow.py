"""Reads the fields of alerts from columns of Arrow: what `walk` does for records of Avro, for all rows at once.

A row gives the values that its conversion to Avro and a walk would give. Fields are found by name, whatever their order
or types. A value whose type does not permit the reading is missing, as in a walk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from broker_filter.packets.layout import N_POINT_COLUMNS, N_SPANS, Fields, Plan
from broker_filter.packets.plan import Reading, Wanted
from broker_filter.packets.walk import MISSING_ID

IS_LIST = (
    pa.types.is_list,
    pa.types.is_large_list,
    pa.types.is_fixed_size_list,
    pa.types.is_list_view,
    pa.types.is_large_list_view,
)
"""The types of Arrow that are lists."""
IS_BYTES = (
    pa.types.is_binary,
    pa.types.is_large_binary,
    pa.types.is_binary_view,
    pa.types.is_fixed_size_binary,
)
"""The types of Arrow that are bytes."""
_IS_TEXT = (*IS_BYTES, pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
_LARGEST_ID = np.iinfo(np.int64).max


class _History(NamedTuple):
    """The table of history rows of N alerts.

    `table`: its number. `lengths` int64[N]: the number of rows of each alert. `lists`: columns of lists, each with the
    wanted fields of the items of its lists by name; the name is empty if the items themselves are wanted.
    """

    table: int
    lengths: NDArray[np.int64]
    lists: list[tuple[pa.Array, dict[str, Wanted]]]


class AlertColumns:
    """The wanted columns of N rows of alerts, found but not yet read.

    `n_points` int64[N]: the number of history rows of each alert. `n_bytes` int64[N]: the size of its stamps and texts.
    `uneven` bool[N]: whether a history of the alert is stored as several lists whose lengths differ.
    """

    def __init__(self, batch: pa.RecordBatch, plan: Plan) -> None:
        self._plan = plan
        self._numbers: list[tuple[Wanted, pa.Array]] = []
        self._texts: list[tuple[int, pa.LargeBinaryArray]] = []
        self._histories: list[_History] = []
        self.n_points: NDArray[np.int64] = np.zeros(batch.num_rows, np.int64)
        self.n_bytes: NDArray[np.int64] = np.zeros(batch.num_rows, np.int64)
        self.uneven: NDArray[np.bool_] = np.zeros(batch.num_rows, np.bool_)
        if batch.num_columns:
            self._find(batch.to_struct_array(), plan.wanted)

    def _find(self, record: pa.StructArray, wanted: Mapping[str, Wanted]) -> None:
        """Find the wanted fields of a record."""
        for name, field in wanted.items():
            column = _field(record, name)
            if column is None:
                continue
            if field.table is not None:
                self._find_history(column, field.table, field.fields)
            elif pa.types.is_struct(column.type):
                self._find(column, field.fields)
            elif field.reading is Reading.BYTES:
                self._find_text(column, field.slot)
            elif field.reading is not None:
                self._numbers.append((field, column))

    def _find_text(self, column: pa.Array, slot: int) -> None:
        if is_any(column.type, _IS_TEXT):
            text = column.cast(pa.large_binary())
            self._texts.append((slot, text))
            self.n_bytes += np.where(_is_valid(text), np.diff(_offsets(text)), 0)

    def _find_history(self, column: pa.Array, table: int, wanted: Mapping[str, Wanted]) -> None:
        """Find a history: a list of structs or, as nested HATS catalogues have it, a struct of lists."""
        if is_any(column.type, IS_LIST) and pa.types.is_struct(column.type.value_type):
            lists = [(column, dict(wanted))]
        elif pa.types.is_struct(column.type):
            fields = ((_field(column, name), field) for name, field in wanted.items())
            lists = [(each, {"": field}) for each, field in fields if each is not None and is_any(each.type, IS_LIST)]
        else:
            lists = []
        lengths = [pc.list_value_length(each).fill_null(0).to_numpy().astype(np.int64) for each, _ in lists]
        if not lengths:
            return
        for others in lengths[1:]:
            self.uneven |= others != lengths[0]
        self.n_points += lengths[0]
        self._histories.append(_History(table, lengths[0], lists))

    def read(self, with_history: NDArray[np.bool_]) -> tuple[Fields, memoryview]:
        """Return the fields of the first R rows, and the bytes into which their spans point.

        `with_history` bool[R]: False for the alerts whose history is left out.
        """
        n, layout = len(with_history), self._plan.layout
        scalars = np.full((n, layout.n_scalars), np.nan)
        ids = np.full((n, layout.n_ids), MISSING_ID, np.int64)
        for field, column in self._numbers:
            if field.reading is Reading.ID:
                _read_ids(column[:n], ids[:, field.slot])
            else:
                _read_numbers(column[:n], field, scalars[:, field.slot])
        spans, content = self._read_texts(n)
        points, owners = self._read_histories(with_history)
        return Fields(scalars, ids, spans, points, owners), content

    def _read_texts(self, n: int) -> tuple[NDArray[np.int64], memoryview]:
        spans = np.full((n, N_SPANS, 2), -1, np.int64)
        if not self._texts:
            return spans, memoryview(b"")
        joined = pa.concat_arrays([text[:n] for _, text in self._texts])  # copied: one buffer for all spans of a row
        offsets, valid = _offsets(joined), _is_valid(joined)
        for k, (slot, _) in enumerate(self._texts):
            own = slice(k * n, (k + 1) * n)
            spans[:, slot] = np.where(valid[own, None], np.stack([offsets[own], offsets[1:][own]], axis=1), -1)
        content = joined.buffers()[2]
        # The bytes of pyarrow are signed, and those of packets are not.
        return spans, memoryview(content if content is not None else b"").cast("B")

    def _read_histories(self, kept: NDArray[np.bool_]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        points, owners = [np.empty((0, N_POINT_COLUMNS))], [np.empty(0, np.int64)]
        for history in self._histories:
            lengths = np.where(kept, history.lengths[: len(kept)], 0)
            rows = np.full((int(lengths.sum()), N_POINT_COLUMNS), np.nan)
            rows[:, 0] = history.table
            for lists, fields in history.lists:
                items = _only(lists[: len(kept)], kept).flatten()
                for name, field in fields.items():
                    column = _field(items, name) if name else _plain(items)
                    if column is not None:
                        _read_numbers(column, field, rows[:, field.slot])
            points.append(rows)
            owners.append(np.repeat(np.arange(len(kept)), lengths))
        return np.concatenate(points), np.concatenate(owners)


def is_any(kind: pa.DataType, tests: tuple[Callable[[pa.DataType], bool], ...]) -> bool:
    """Return whether any of the `tests`, such as IS_LIST, is true for an Arrow type."""
    return any(test(kind) for test in tests)


def _field(record: pa.StructArray, name: str) -> pa.Array | None:
    """Return a field of N structs, null where the struct is; None if there is not exactly one field of this name."""
    index = record.type.get_field_index(name)
    return None if index < 0 else _plain(pc.struct_field(record, [index]))


def _plain(array: pa.Array) -> pa.Array:
    """Return the values of an array that may be encoded by a dictionary."""
    return array.dictionary.take(array.indices) if pa.types.is_dictionary(array.type) else array


def _only(lists: pa.Array, kept: NDArray[np.bool_]) -> pa.Array:
    """Return N lists, null where `kept` bool[N] is False."""
    return lists if kept.all() else lists.take(pa.array(np.arange(len(kept)), mask=~kept))


def _read_ids(column: pa.Array, out: NDArray[np.int64]) -> None:
    """Write integers into `out` int64[N]; a null, and a value beyond int64, is not written."""
    integers = _integers(column)
    if integers is not None:
        valid = _is_valid(integers)
        values = integers.fill_null(0).to_numpy()
        valid &= values <= _LARGEST_ID
        out[valid] = values[valid].astype(np.int64)


def _read_numbers(column: pa.Array, field: Wanted, out: NDArray[np.float64]) -> None:
    """Write numbers into `out` float64[N], or the codes of the first bytes of texts; a null is not written."""
    kind = column.type
    if field.reading is Reading.LETTER and is_any(kind, _IS_TEXT):
        text = column.cast(pa.large_binary())
        offsets = _offsets(text)
        some = _is_valid(text) & (offsets[1:] > offsets[:-1])
        if some.any():
            out[some] = np.frombuffer(text.buffers()[2], np.uint8)[offsets[:-1][some]]
        return
    if pa.types.is_boolean(kind):
        numbers = column.cast(pa.uint8())
    elif pa.types.is_float16(kind):
        numbers = column.cast(pa.float32())  # the NaN of a null float16 has other bits
    else:
        numbers = column if pa.types.is_floating(kind) else _integers(column)
    if numbers is not None:
        out[:] = numbers.to_numpy(zero_copy_only=False)  # a null becomes NaN


def _integers(column: pa.Array) -> pa.Array | None:
    """Return the integers of a column that Avro stores as an int or a long; None for any other column."""
    kind = column.type
    if pa.types.is_integer(kind):
        return column
    if pa.types.is_date32(kind):
        return column.cast(pa.int32())
    if pa.types.is_timestamp(kind) and kind.unit != "ns":
        return column.cast(pa.timestamp("us", kind.tz), safe=False).cast(pa.int64())
    return None


def _offsets(text: pa.LargeBinaryArray) -> NDArray[np.int64]:
    """Return the offsets of N texts in their content, int64[N + 1]."""
    if not len(text):
        return np.zeros(1, np.int64)
    return np.frombuffer(text.buffers()[1], np.int64)[text.offset : text.offset + len(text) + 1]


def _is_valid(array: pa.Array) -> NDArray[np.bool_]:
    """Return whether each value is not null, bool[N]."""
    valid: NDArray[np.bool_] = array.is_valid().to_numpy(zero_copy_only=False)
    return valid
