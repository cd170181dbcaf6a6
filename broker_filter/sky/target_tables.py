"""Reads the names and positions of targets from a table: CSV, ECSV, FITS, VOTable or Parquet. Files are untrusted.

The format is recognised by the content. Nothing outside of the file is read, and only three columns are.
"""

from __future__ import annotations

import csv
import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.parsers import expat

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import yaml
from numpy.typing import NDArray
from pyarrow import csv as arrow_csv
from pyarrow import parquet

from broker_filter.sky.fits_table import FITS_MAGIC, open_table
from broker_filter.sky.tracked import MAX_FILE_BYTES, SkyFileError

MAX_TARGETS = 5_000_000
"""The most targets of a list: their names, positions and search tree take about 500 MB."""
RA_NAMES = (
    *("ra_deg", "radeg", "ra_d", "_raj2000", "ra", "raj2000", "ra_icrs", "ra2000", "right_ascension"),
    *("meanra", "ramean"),
)
DEC_NAMES = (
    *("dec_deg", "decdeg", "dedeg", "dec_d", "_dej2000", "dec", "dej2000", "decj2000", "dec_icrs", "de_icrs"),
    *("dec2000", "declination", "de", "decl", "meandec", "decmean"),
)
NAME_NAMES = (
    *("name", "target", "target_name", "objname", "object", "object_name", "objectid", "object_id", "oid", "id"),
    *("source_id", "source_name", "main_id", "designation", "tns_name", "diaobjectid"),
)
"""The accepted names of a column, in order of preference. Upper and lower case are the same. Names that state degrees
come first: where a table has them, `ra` may be in hours, minutes and seconds."""
DEGREES = ("deg", "degree", "degrees")
DELIMITERS = (",", "\t", ";", "|")
PARQUET_MAGIC = b"PAR1"
ECSV_MAGIC = b"# %ECSV"
MOST_COLUMNS_SHOWN = 12
MOST_MESSAGE_CHARACTERS = 200
"""The maximum length of a library's message in an error; it may quote the file."""


class Targets(NamedTuple):
    """M targets in the order of the file."""

    names: pa.StringArray  # M; `row 1` and so on for targets without a name
    ra: NDArray[np.float64]  # [M] degrees; NaN if missing
    dec: NDArray[np.float64]  # [M] degrees; NaN if missing


class _Chosen(NamedTuple):
    """The names of the three columns in the file. `name` is None if no column has names."""

    ra: str
    dec: str
    name: str | None

    @property
    def all(self) -> list[str]:
        return [name for name in self if name is not None]


def read_targets(path: Path, data: bytes) -> Targets:
    """Return the targets in a table. `data`: the bytes of the file `path`.

    Columns are found by usual names (RA_NAMES, DEC_NAMES, NAME_NAMES); coordinates are in degrees (ICRS). Raises
    SkyFileError if the file is no such table, has more than MAX_TARGETS rows, or states another unit than degrees.
    """
    try:
        if data.startswith(FITS_MAGIC):
            table = _from_fits(path, data)
        elif data.startswith(PARQUET_MAGIC):
            table = _from_parquet(path, data)
        elif data.lstrip()[:1] == b"<":
            table = _from_votable(path, data)
        else:
            table = _from_text(path, data)
    except SkyFileError:
        raise
    except Exception as error:  # from damaged files, the libraries raise errors of many kinds
        message = " ".join(str(error).split())[:MOST_MESSAGE_CHARACTERS]
        if "conversion error to double" in message:
            raise SkyFileError(f"{path}: coordinates must be numbers in degrees: {message}") from None
        raise SkyFileError(f"{path}: not a readable table of targets: {message}") from None
    return table


def _choose(path: Path, columns: Sequence[str]) -> _Chosen:
    """Return the columns to read. Raises SkyFileError if there are no coordinates."""
    by_name = {column.strip().lower(): column for column in reversed(columns)}
    ra, dec, name = (
        next((by_name[known] for known in names if known in by_name), None)
        for names in (RA_NAMES, DEC_NAMES, NAME_NAMES)
    )
    if ra is None or dec is None:
        shown = ", ".join(columns[:MOST_COLUMNS_SHOWN]) + (", ..." if len(columns) > MOST_COLUMNS_SHOWN else "")
        what = "right ascension (`ra`)" if ra is None else "declination (`dec`)"
        raise SkyFileError(f"{path}: no column of {what}; the columns are: {shown[:MOST_MESSAGE_CHARACTERS]}")
    return _Chosen(ra, dec, name)


def _check_rows(path: Path, rows: int) -> None:
    if rows > MAX_TARGETS:
        raise SkyFileError(f"{path}: {rows:,} rows; a list has at most {MAX_TARGETS:,} targets")


def _check_units(path: Path, chosen: _Chosen, stated: Mapping[str, Any]) -> None:
    """Raise SkyFileError if a coordinate has a unit that is not degrees. `stated`: units by column, None if unknown."""
    for column in (chosen.ra, chosen.dec):
        unit = stated.get(column)
        if unit and str(unit).lower() not in DEGREES:
            raise SkyFileError(f"{path}: the column {column} is in {unit}; give it in degrees")


def _targets(path: Path, columns: Mapping[str, pa.Array], chosen: _Chosen) -> Targets:
    """Return the targets from Arrow columns. Raises SkyFileError if coordinates are not numbers."""
    for column in (chosen.ra, chosen.dec):
        kind = columns[column].type
        if not (pa.types.is_floating(kind) or pa.types.is_integer(kind)):
            raise SkyFileError(f"{path}: the column {column} holds {kind}, not numbers; give degrees")
    ra, dec = (
        np.asarray(columns[column].cast(pa.float64()).to_numpy(zero_copy_only=False), np.float64)
        for column in (chosen.ra, chosen.dec)
    )
    _check_rows(path, len(ra))
    rows = pc.binary_join_element_wise("row", pa.array(np.arange(1, len(ra) + 1)).cast(pa.string()), " ")
    if chosen.name is None:
        return Targets(rows, ra, dec)
    names = pc.utf8_trim_whitespace(columns[chosen.name].cast(pa.string()))
    return Targets(pc.if_else(pc.equal(pc.fill_null(names, ""), ""), rows, names), ra, dec)


def _from_text(path: Path, data: bytes) -> Targets:
    """Read CSV or ECSV: comment lines, a line with the names of the columns, and a line for each target."""
    text = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8-sig", newline="")
    comments = []
    try:
        while (line := text.readline()).startswith("#"):
            comments.append(line)
    except UnicodeDecodeError:
        raise SkyFileError(f"{path}: neither FITS, VOTable or Parquet nor UTF-8 text") from None
    is_ecsv = data.startswith(ECSV_MAGIC)
    delimiter = max((*DELIMITERS, " ") if is_ecsv else DELIMITERS, key=line.count)
    columns = [column.strip() for column in next(csv.reader([line.rstrip("\r\n")], delimiter=delimiter), [])]
    if not columns:
        raise SkyFileError(f"{path}: the first line that does not begin with # must name the columns, and it is empty")
    chosen = _choose(path, columns)
    if is_ecsv:
        header = yaml.safe_load("".join(line.removeprefix("#").removeprefix(" ") for line in comments[1:]))
        _check_units(path, chosen, {entry.get("name"): entry.get("unit") for entry in header["datatype"]})
    table = arrow_csv.read_csv(
        io.BytesIO(data),
        read_options=arrow_csv.ReadOptions(skip_rows=len(comments) + 1, column_names=_distinct(columns)),
        parse_options=arrow_csv.ParseOptions(delimiter=delimiter),
        convert_options=arrow_csv.ConvertOptions(
            include_columns=chosen.all,
            column_types={chosen.ra: pa.float64(), chosen.dec: pa.float64()}
            | ({chosen.name: pa.string()} if chosen.name else {}),
        ),
    )
    return _targets(path, {name: table.column(name).combine_chunks() for name in chosen.all}, chosen)


def _distinct(columns: Sequence[str]) -> list[str]:
    """Return the names of columns. A name that occurred before is replaced by another one."""
    return [f"{column}\0{i}" if column in columns[:i] else column for i, column in enumerate(columns)]


def _from_parquet(path: Path, data: bytes) -> Targets:
    file = parquet.ParquetFile(pa.BufferReader(data))
    _check_rows(path, file.metadata.num_rows)
    size = sum(file.metadata.row_group(i).total_byte_size for i in range(file.metadata.num_row_groups))
    if size > MAX_FILE_BYTES:
        raise SkyFileError(f"{path}: {size >> 20} MiB uncompressed; keep only the columns that you need")
    chosen = _choose(path, file.schema_arrow.names)
    table = file.read(columns=chosen.all)
    return _targets(path, {name: table.column(name).combine_chunks() for name in chosen.all}, chosen)


def _from_fits(path: Path, data: bytes) -> Targets:
    with open_table(path, data) as table:
        chosen = _choose(path, table.columns.names)
        _check_rows(path, table.header["NAXIS2"])
        _check_units(path, chosen, {column.name: column.unit for column in table.columns})
        return _targets(path, {name: _arrow(table.data[name]) for name in chosen.all}, chosen)


def _from_votable(path: Path, data: bytes) -> Targets:
    from astropy.io.votable import parse_single_table

    _check_votable(path, data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deviations from the standard that do not matter here
        table = parse_single_table(io.BytesIO(data)).to_table(use_names_over_ids=True)
    chosen = _choose(path, table.colnames)
    _check_units(path, chosen, {name: table[name].unit for name in chosen.all})
    return _targets(path, {name: _arrow(table[name]) for name in chosen.all}, chosen)


def _check_votable(path: Path, data: bytes) -> None:
    """Raise SkyFileError if a VOTable makes astropy open a URL, or reserve memory for rows that it does not have."""

    def start(element: str, attributes: Mapping[str, str]) -> None:
        match element.rpartition(":")[2].upper():
            case "STREAM" if any(name.lower() == "href" for name in attributes):
                raise SkyFileError(f"{path}: a VOTable with its data behind a URL; save it with the data in it")
            case "TABLE":
                _check_rows(path, int(attributes.get("nrows", 0)))

    def doctype(*_: Any) -> None:
        raise SkyFileError(f"{path}: a VOTable with a document type declaration")

    parser = expat.ParserCreate()
    parser.StartElementHandler = start
    parser.StartDoctypeDeclHandler = doctype
    parser.Parse(data, True)


def _arrow(values: Any) -> pa.Array:
    """Return a column of astropy as an Arrow array; masked values are null."""
    mask = np.ma.getmaskarray(values) if isinstance(values, np.ma.MaskedArray) else None
    array = np.asarray(values)
    if array.dtype.kind in "SU":
        return pa.array(array.astype(str).astype(object), pa.string(), mask=mask)
    if array.dtype.kind == "O":
        return pa.array([str(value) for value in array], pa.string(), mask=mask)
    return pa.array(array.astype(array.dtype.newbyteorder("=")), mask=mask)
