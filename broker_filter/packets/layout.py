"""Assigns each field of a survey a slot in the outputs of the walker, and reads the slots back as columns.

This module must depend on nothing but the names of fields, never on the order or types of a schema.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from broker_filter.packets.batch import CUTOUTS
from broker_filter.packets.light_curve_summary import CurveSummary
from broker_filter.packets.photometry import DetectionsSoFar, Points, Values
from broker_filter.packets.plan import Reading, Wanted, compile_program
from broker_filter.packets.schemas.writer_schema import WriterSchema
from broker_filter.packets.surveys import (
    DESIGNATION,
    FORMATS,
    UNVERSIONED,
    Derived,
    Field,
    OfCurve,
    SoFar,
    Source,
    SurveyFormat,
    select_columns,
)
from broker_filter.packets.walk import MISSING_ID

# Span slots: the encoded cutout fields, the stamps inside them, the schema version, the name of the object, the version
# of the survey's reliability, and the designation of a solar-system object.
WHOLE_CUTOUT, STAMP, VERSION = 0, len(CUTOUTS), 2 * len(CUTOUTS)
OBJECT_NAME, RELIABILITY_VERSION, DESIGNATION_TEXT, N_SPANS = VERSION + 1, VERSION + 2, VERSION + 3, VERSION + 4

_LSST_NAMESPACE = re.compile(r"lsst\.v(\d+)_(\d+)\b")


class Fields(NamedTuple):
    """The fields of N records, as a walk or the reading of a table writes them.

    `scalars` float64[N, n_scalars], `ids` int64[N, n_ids], `spans` int64[N, N_SPANS, 2]: a value that a record does not
    have is NaN, MISSING_ID or -1. `points` float64[M, N_POINT_COLUMNS]: the history rows of all records. `owners`
    int64[M]: the record of each history row, ascending within a table.
    """

    scalars: NDArray[np.float64]
    ids: NDArray[np.int64]
    spans: NDArray[np.int64]
    points: NDArray[np.float64]
    owners: NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """How to read records of one schema: the wanted fields, the walker's program, and the layout of the outputs.

    `cutouts`: the span slots of the cutout fields in the order of the schema. `version`: the schema version of records
    that have no such field.
    """

    schema: WriterSchema
    layout: Layout
    wanted: Mapping[str, Wanted]
    program: NDArray[np.int32]
    cutouts: tuple[int, ...]
    version: str


class Layout:
    """The slots of the fields of one survey in the walker's scalars and ids.

    `columns`: the names of the metadata columns to read. Raises ValueError for an unknown name. `designation`: whether
    to read the text DESIGNATION as well.
    """

    def __init__(self, survey_format: SurveyFormat, columns: Sequence[str], *, designation: bool = False) -> None:
        self.format = survey_format
        sources = [column.source(survey_format.survey) for column in select_columns(columns)]
        texts = {
            VERSION: survey_format.version,
            OBJECT_NAME: survey_format.object_name,
            RELIABILITY_VERSION: survey_format.reliability_version,
        }
        self._texts: dict[int, tuple[str, ...]] = {slot: (path,) for slot, path in texts.items() if path is not None}
        if designation:
            self._texts[DESIGNATION_TEXT] = DESIGNATION.paths(survey_format.survey)
        self._ids = {path: slot for slot, path in enumerate(survey_format.alert_ids + survey_format.object_ids)}
        parts = [part for source in (*survey_format.place, *sources) for part in _parts_of(source)]
        fields = (*survey_format.own_fields, *(part for part in parts if isinstance(part, Field)))
        numbers = [field for field in dict.fromkeys(fields) if field.paths[0] not in self._ids]
        self._sums_up = survey_format.detections_so_far if any(isinstance(part, SoFar) for part in parts) else None
        self._summarises = any(isinstance(part, OfCurve) for part in parts)
        self._scalars = {field: slot for slot, field in enumerate(numbers)}
        # Most metadata columns are unchanged scalars. These are copied in one step; the others are computed.
        direct = {
            place: source
            for place, source in enumerate(sources)
            if isinstance(source, Field) and source in self._scalars
        }
        self._direct = list(direct)
        self._direct_slots = [self._scalars[source] for source in direct.values()]
        self._computed = [
            (place, source) for place, source in enumerate(sources) if source is not None and place not in direct
        ]
        self._missing = np.full(len(sources), np.nan)
        for place, source in direct.items():
            self._missing[place] = np.nan if source.missing is None else source.missing

    @property
    def n_scalars(self) -> int:
        """The number of scalars per record."""
        return len(self._scalars)

    @property
    def n_ids(self) -> int:
        """The number of ids per record."""
        return len(self._ids)

    @property
    def fields(self) -> frozenset[str]:
        """The dotted paths of all fields that are read if a packet has them."""
        survey = self.format
        stamps = [cutout if survey.stamp is None else f"{cutout}.{survey.stamp}" for cutout in survey.cutouts]
        rows = [f"{table.name}.{path}" for table in survey.tables for field in table.fields for path in field.paths]
        numbers = [path for field in self._scalars for path in field.paths]
        texts = [path for paths in self._texts.values() for path in paths]
        return frozenset([*numbers, *self._ids, *texts, *stamps, *rows])

    def plan(self, schema: WriterSchema, paths: frozenset[str]) -> Plan:
        """Return the plan for records of `schema`. `paths`: its field paths, as `plan.field_paths` returns them.

        Raises SchemaError if the schema exceeds the bounds on programs.
        """
        wanted: dict[str, Wanted] = {}

        def want(path: str) -> Wanted:
            outer, _, inner = path.partition(".")
            place = wanted.setdefault(outer, Wanted())
            return place.fields.setdefault(inner, Wanted()) if inner else place

        def first(candidates: Sequence[str]) -> str:
            return next((path for path in candidates if path in paths), candidates[0])

        for field, slot in self._scalars.items():
            want(first(field.paths)).read(_reading(field), slot)
        for path, slot in self._ids.items():
            want(path).read(Reading.ID, slot)
        for slot, candidates in self._texts.items():
            want(first(candidates)).read(Reading.BYTES, slot)
        for c, cutout in enumerate(self.format.cutouts):
            want(cutout).whole = WHOLE_CUTOUT + c
            want(cutout if self.format.stamp is None else f"{cutout}.{self.format.stamp}").read(
                Reading.BYTES, STAMP + c
            )
        for t, table in enumerate(self.format.tables):
            want(table.name).table = t
            for column, field in enumerate(table.fields, start=1):
                want(f"{table.name}.{field.paths[0]}").read(_reading(field), column)

        order = [entry["name"] for entry in schema.canonical["fields"]]
        present = [c for c, cutout in enumerate(self.format.cutouts) if cutout in order]
        cutouts = sorted(present, key=lambda c: order.index(self.format.cutouts[c]))
        program = compile_program(schema, wanted)
        return Plan(schema, self, wanted, program, tuple(WHOLE_CUTOUT + c for c in cutouts), _version(schema))

    def column(
        self,
        source: Source | None,
        scalars: NDArray[np.float64],
        ids: NDArray[np.int64],
        so_far: DetectionsSoFar | None = None,
        curve: CurveSummary | None = None,
    ) -> Values:
        """Return the values of `source` for N records, float64[N]; NaN for missing values, or if `source` is None.

        `scalars` [N, n_scalars] and `ids` [N, n_ids] are the walker's outputs; `so_far` is needed for a `SoFar` source,
        `curve` for an `OfCurve` source.
        """
        if source is None:
            return np.full(len(scalars), np.nan)
        if isinstance(source, SoFar | OfCurve):
            values: Values = getattr(so_far if isinstance(source, SoFar) else curve, source.name)
            return values
        if isinstance(source, Derived):
            return source.formula(*(self.column(part, scalars, ids, so_far, curve) for part in source.fields))
        if source in self._scalars:
            values = scalars[:, self._scalars[source]]
            return values if source.missing is None else np.where(values == source.missing, np.nan, values)
        present = self._first(source.paths, ids)
        return np.where(present == MISSING_ID, np.nan, present)

    def metadata(
        self,
        rows: NDArray[np.int64],
        scalars: NDArray[np.float64],
        ids: NDArray[np.int64],
        history_rows: NDArray[np.int64],
        history: NDArray[np.float64],
        pieces: Sequence[Points],
    ) -> NDArray[np.float64]:
        """Return the metadata of N records, float64[N, F] for F columns.

        `points` documents the first arguments; `pieces` is its result.
        """
        so_far = None
        if self._sums_up is not None:
            first_table = history[:, 0] == 0
            so_far = self._sums_up(
                [self.column(field, scalars, ids) for field in self.format.own_fields],
                np.searchsorted(rows, history_rows[first_table]),
                list(history[first_table, 1:].T),
            )
        curve = None
        if self._summarises:
            curve = CurveSummary(pieces[0], pieces[1:], rows, self.format.night_start)
        metadata = np.full((len(scalars), len(self._missing)), np.nan)
        metadata[:, self._direct] = scalars[:, self._direct_slots]
        metadata[metadata == self._missing] = np.nan
        for place, source in self._computed:
            metadata[:, place] = self.column(source, scalars, ids, so_far, curve)
        metadata[np.isinf(metadata)] = np.nan  # an infinite value is not a measurement; models and filters expect NaN
        return metadata

    def alert_ids(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the ids of the alerts, int64[N]; MISSING_ID if a record has none."""
        return self._first(self.format.alert_ids, ids)

    def object_ids(self, ids: NDArray[np.int64]) -> list[str]:
        """Return the numeric object ids as text, N strings; an empty string if a record has none (0 counts as none)."""
        if not self.format.object_ids:
            return [""] * len(ids)
        present = self._first(self.format.object_ids, np.where(ids == 0, MISSING_ID, ids))
        return ["" if number == MISSING_ID else str(number) for number in present.tolist()]

    def points(
        self,
        rows: NDArray[np.int64],
        scalars: NDArray[np.float64],
        ids: NDArray[np.int64],
        history_rows: NDArray[np.int64],
        history: NDArray[np.float64],
    ) -> list[Points]:
        """Return the light-curve points of N records: first their own measurements, then the points of each table.

        `rows` int64[N]: the rows of the records in the batch, ascending. `scalars` [N, n_scalars], `ids` [N, n_ids]:
        the walker's outputs. `history` float64[M, 1 + columns]: the items of the tables; column 0 is the number of the
        table. `history_rows` int64[M]: the row of the record to which each item belongs.
        """
        pieces = [self.format.own_points(rows, [self.column(field, scalars, ids) for field in self.format.own_fields])]
        for t, table in enumerate(self.format.tables):
            mine = history[:, 0] == t
            pieces.append(table.points(history_rows[mine], list(history[mine, 1 : 1 + len(table.fields)].T)))
        return pieces

    def _first(self, paths: Sequence[str], ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return, for each record, the first id in the order of `paths` that is not missing: int64[N]."""
        first = ids[:, self._ids[paths[0]]]
        for path in paths[1:]:
            first = np.where(first == MISSING_ID, ids[:, self._ids[path]], first)
        return first


def _parts_of(source: Source | None) -> tuple[Field | SoFar | OfCurve, ...]:
    if isinstance(source, Derived):
        return source.fields
    return () if source is None else (source,)


def _reading(field: Field) -> Reading:
    return Reading.LETTER if field.letter else Reading.NUMBER


def _version(schema: WriterSchema) -> str:
    """Return the version of an LSST schema, from its namespace or its registry id (100 x major + minor).

    The result is UNVERSIONED if neither states a version.
    """
    if match := _LSST_NAMESPACE.match(schema.canonical["name"]):
        return f"{match[1]}.{match[2]}"
    if schema.registry_id is not None:
        return f"{schema.registry_id // 100}.{schema.registry_id % 100}"
    return UNVERSIONED


N_POINT_COLUMNS = 1 + max(len(table.fields) for known in FORMATS for table in known.tables)
"""The width of a history row: the number of the table, and the fields of the widest table."""
