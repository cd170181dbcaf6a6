"""Columns of Parquet tables of detections (LSST's diaSource), as arrays."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


def integers(table: pa.Table, name: str) -> NDArray[np.int64]:
    """Return a column as int64, 0 where it is missing. Ids have more digits than float64 can hold."""
    return np.asarray(table[name].fill_null(0).cast(pa.int64()))


def numbers(table: pa.Table, name: str) -> NDArray[np.float64]:
    """Return a column of numbers or truth values as float64, NaN where it is missing or not in the table."""
    if name not in table.column_names:
        return np.full(len(table), np.nan)
    column = table[name]
    if pa.types.is_boolean(column.type):
        column = column.cast(pa.int8())
    return np.asarray(column.cast(pa.float64()).to_numpy(zero_copy_only=False), np.float64)
