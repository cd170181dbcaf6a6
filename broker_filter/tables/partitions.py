"""Rows of a table, divided into Parquet files by night: `DIRECTORY/night=YYYYMMDD/scores.parquet`.

Hive, Spark, Dask, Polars and pyarrow read the directory as one table with a column `night`. A complete file has its
final name; see `rows.open_table`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow as pa

from broker_filter.packets.batch import Survey
from broker_filter.packets.surveys import LSST_NIGHT_START
from broker_filter.tables.formats import Table
from broker_filter.tables.rows import TableError, open_table

NO_NIGHT = "__HIVE_DEFAULT_PARTITION__"
"""The night of rows without a time, such as packets that could not be read. Readers give it as null."""
MOST_OPEN_FILES = 16
"""Nights whose files are open at the same time. Each keeps up to a row group of rows in memory."""
_EPOCH = np.datetime64("1858-11-17")
"""The date of MJD 0."""
_LAST_DAY = 2_973_483
"""The MJD of 9999-12-31, the last date with a year of four digits."""


def nights(rows: pa.RecordBatch) -> list[str]:
    """Return the night of each row as YYYYMMDD, or NO_NIGHT if it has no time: N strings.

    A night has the date that its survey gives it: the date in UTC (ZTF), or the date half a day earlier (LSST, as
    `day_obs`), so that a night of Chile is not divided.
    """
    mjd = rows.column("mjd").to_numpy(zero_copy_only=False)
    is_lsst = np.array([survey == str(Survey.LSST) for survey in rows.column("survey").to_pylist()], np.bool_)
    days = np.floor(np.where(is_lsst, mjd - LSST_NIGHT_START, mjd))
    known = (days >= 0) & (days <= _LAST_DAY)  # False for NaN
    dates = (_EPOCH + np.where(known, days, 0).astype(np.int64)).astype(str)
    return [date.replace("-", "") if there else NO_NIGHT for date, there in zip(dates, known, strict=True)]


@contextmanager
def open_partitions(directory: Path, schema: pa.Schema) -> Iterator[Table]:
    """Open a directory of tables by night, which is created when the first row is written.

    Raises TableError if there are files in the directory already, before any row is written.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise TableError(f"{directory}: exists and is not an empty directory: choose another name, or remove it")
    with _Nights(directory, schema) as table:
        yield table


class _Nights:
    """The tables of all nights. The one that was written to longest ago is closed if too many are open."""

    def __init__(self, directory: Path, schema: pa.Schema) -> None:
        self._directory = directory
        self._schema = schema
        self._open: dict[str, tuple[Table, ExitStack]] = {}
        self._n_files: dict[str, int] = {}

    def __enter__(self) -> _Nights:
        return self

    def write(self, rows: pa.RecordBatch) -> None:
        of_rows = np.array(nights(rows), dtype=object)
        for night in dict.fromkeys(of_rows.tolist()):
            self._table(night).write(rows.filter(pa.array(of_rows == night)))

    def _table(self, night: str) -> Table:
        if night in self._open:
            self._open[night] = self._open.pop(night)  # now the last one
            return self._open[night][0]
        if len(self._open) == MOST_OPEN_FILES:
            _, oldest = self._open.pop(next(iter(self._open)))
            oldest.close()
        n = self._n_files[night] = self._n_files.get(night, 0) + 1
        folder = self._directory / f"night={night}"
        folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            table = stack.enter_context(open_table(folder / f"scores{f'-{n}' if n > 1 else ''}.parquet", self._schema))
            self._open[night] = table, stack.pop_all()
        return table

    def close(self) -> None:
        """Complete the files of all nights."""
        self.__exit__(None, None, None)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with ExitStack() as every:
            for _, stack in self._open.values():
                every.push(stack)
            self._open = {}
            every.pop_all().__exit__(kind, error, trace)
