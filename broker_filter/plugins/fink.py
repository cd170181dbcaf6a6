"""Fink (https://fink-broker.org): the scores that its science modules add to alerts, from columns of pandas.

Fink calls a science module as a `pandas_udf`: columns of alerts in, one column of equal length out. The modules are in
`deploy/fink`; they are a few lines around the functions of this module, which need no Spark.

A bad value must never fail the job of all alerts: its row has a null score. A model that is missing on a worker fails
when the module is imported, with an error that names it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import pyarrow as pa

from broker_filter.engines import stamps
from broker_filter.errors import BrokerFilterError
from broker_filter.scoring.scores import output_name
from broker_filter.tables.arrow_scorer import ArrowScorer
from broker_filter.tables.rows import column_name

MODEL, LABEL = stamps.BUNDLE, stamps.LABEL
"""The shipped bundle and its output."""
SOURCE = "diaSource"
"""Fink's column of the measurements of a Rubin alert; it is a struct."""
CUTOUTS = ("cutoutScience", "cutoutTemplate", "cutoutDifference")
"""Fink's columns of cutouts of a Rubin alert."""

ZtfFunction = Callable[[pd.Series, pd.Series, pd.Series], pd.Series]
RubinFunction = Callable[[pd.DataFrame, pd.Series, pd.Series, pd.Series], pd.Series]

_rubin = ArrowScorer([MODEL])


class ColumnError(BrokerFilterError, TypeError):
    """A column does not hold what the science module needs."""


def open_ztf() -> ZtfFunction:
    """Load the model, once in a process, and return `real_bogus_ztf`. Raises BundleError if the model is missing."""
    stamps.network()
    return real_bogus_ztf


def open_rubin() -> RubinFunction:
    """Load the model, once in a process, and return `real_bogus_rubin`. Raises BundleError if the model is missing."""
    _rubin.reads(pa.schema([]))
    return real_bogus_rubin


def real_bogus_ztf(science: pd.Series, template: pd.Series, difference: pd.Series) -> pd.Series:
    """Return the probability that an alert of ZTF is real, float32[N], from its stamps: `cutoutScience.stampData` etc.

    The score is that of the bundle `default`, and NaN where a stamp is null or unusable. Raises ColumnError if a column
    does not hold bytes.
    """
    columns = (science, template, difference)
    return pd.Series(stamps.real_bogus(*(_bytes(column, f"{name}.stampData") for name, column in _named(columns))))


def real_bogus_rubin(source: pd.DataFrame, science: pd.Series, template: pd.Series, difference: pd.Series) -> pd.Series:
    """Return the probability that an alert of Rubin is real, float32[N].

    `source`: the struct `diaSource`, as Spark passes it: one column for each of its fields. `science`, `template`,
    `difference`: the cutouts, as bytes. The score is that of the bundle `default`, and NaN where a row cannot be
    scored. Raises ColumnError if a column does not hold bytes, or `source` is not the struct of a source.
    """
    if not isinstance(source, pd.DataFrame) or f"{SOURCE}Id" not in source.columns:
        raise ColumnError(f"the first column is not the struct {SOURCE} with its field {SOURCE}Id: pass df[{SOURCE!r}]")
    if source.empty:
        return pd.Series(np.empty(0, np.float32))
    cutouts = {name: pa.array(_bytes(c, name), pa.binary()) for name, c in _named((science, template, difference))}
    # pandas holds a column of integers as floats if a value is null, and an id is read as an integer only.
    fields = source.assign(**{f"{SOURCE}Id": source[f"{SOURCE}Id"].astype("Int64")})
    table = pa.table({SOURCE: pa.Table.from_pandas(fields, preserve_index=False).to_struct_array(), **cutouts})
    return _rubin(table)[column_name(output_name(MODEL, LABEL))].to_pandas()


def _named(columns: tuple[pd.Series, ...]) -> zip[tuple[str, pd.Series]]:
    return zip(CUTOUTS, columns, strict=True)


def _bytes(column: pd.Series, name: str) -> list[bytes | None]:
    """Return the values of a column of bytes, None where they are null. Raises ColumnError for any other type."""
    values = [None if value is None or value is pd.NA else value for value in column.tolist()]
    for value in values:
        if not isinstance(value, bytes | None):
            raise ColumnError(f"a value is of type {type(value).__name__}, not bytes: pass the column df[{name!r}]")
    return values
