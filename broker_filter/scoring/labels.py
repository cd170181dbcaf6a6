"""Tables of labels, CSV or Parquet: the class of each labelled alert or object.

A value that is ambiguous or unusable is an error; nothing is guessed.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from broker_filter.errors import BrokerFilterError

UNLABELLED = -1
"""The class index that stands for no label."""
KEYS: dict[str, Literal["alert", "object"]] = {
    "alert_id": "alert",
    "candid": "alert",
    "diaSourceId": "alert",
    "object_id": "object",
    "objectId": "object",
    "diaObjectId": "object",
}
"""Columns to join labels by, and whether each holds the id of an alert or of an object. If a table has several of them,
the first one in this order is used."""
UNLABELLED_TEXTS = frozenset(
    ["", "nan", "NaN", "-nan", "-NaN", "NA", "N/A", "n/a", "<NA>", "#N/A", "#NA", "null", "NULL", "None", "NaT"]
)
"""Texts that stand for a missing value in a text column: those that pandas reads as missing. Such a text is a label
only if a class rule lists it."""
CLASS_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
"""Pattern of a class name: an identifier, because a class becomes an output of the bundle and its name is used in
filters."""


class LabelsError(BrokerFilterError):
    """A table of labels, or a class, cannot be used. The message says what is wrong, where, and what to do."""


@dataclass(frozen=True, slots=True)
class ClassRule:
    """Which values of the label column belong to a class: those in `values`, or numbers x with low < x <= high."""

    name: str
    values: frozenset[str] = frozenset()
    low: float = math.inf
    high: float = -math.inf

    def takes(self, value: object) -> bool:
        """Return whether a non-null value of the table belongs to this class."""
        return str(value) in self.values or (isinstance(value, int | float) and self.low < value <= self.high)

    def __str__(self) -> str:
        return f"{self.name}={','.join(sorted(self.values)) or f'{self.low:g}..{self.high:g}'}"


def parse_rule(text: str) -> ClassRule:
    """Parse a class rule: `SN=SN Ia,SN II` lists values, `real=0.5..1` means 0.5 < number <= 1.

    Raises LabelsError if `text` is neither.
    """
    name, _, given = text.partition("=")
    if not CLASS_NAME.fullmatch(name) or not given:
        raise LabelsError(
            f"{text!r} is not a class: write NAME=VALUE,VALUE... or NAME=LOW..HIGH, where NAME is an identifier"
        )
    low, dots, high = given.partition("..")
    if not dots:
        return ClassRule(name, frozenset(given.split(",")))
    try:
        rule = ClassRule(name, low=float(low), high=float(high))
    except ValueError as error:
        raise LabelsError(f"{text!r} is not a class: {given!r} is not LOW..HIGH with two numbers") from error
    if not rule.low < rule.high:
        raise LabelsError(f"{text!r} is not a class: LOW ({rule.low:g}) must be below HIGH ({rule.high:g})")
    return rule


@dataclass(frozen=True, slots=True)
class Labels:
    """The class of each labelled id.

    `label_of`: id -> index into `rules`; ids are texts. `key`: the column that was joined by (see KEYS). `column`: the
    label column. `sha256`: of the table's file.
    """

    table: Path
    sha256: str
    column: str
    key: str
    rules: tuple[ClassRule, ...]
    label_of: dict[str, int]

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, in the order of their indices."""
        return tuple(rule.name for rule in self.rules)

    def key_of(self, alert_id: int, object_id: str) -> str:
        """Return the id by which an alert is looked up in `label_of`."""
        return str(alert_id) if KEYS[self.key] == "alert" else object_id

    def of(self, alert_id: NDArray[np.int64], object_id: NDArray[np.str_]) -> NDArray[np.int64]:
        """Return the class index of each of N alerts, int64[N]; UNLABELLED for an alert without a label."""
        keys = (self.key_of(*names) for names in zip(alert_id.tolist(), object_id.tolist(), strict=True))
        return np.array([self.label_of.get(key, UNLABELLED) for key in keys], np.int64)


def read_labels(table: Path, column: str, rules: Sequence[ClassRule] = ()) -> Labels:
    """Read the labels in `column` of a table. Without `rules`, every distinct value is a class.

    Rows whose id or label is missing (null, NaN, empty, or one of UNLABELLED_TEXTS) are skipped, and so are rows that
    belong to no class.

    Raises LabelsError if the table cannot be read, has no rows or lacks a column; if its ids are floating-point numbers
    (rounded); if an id has two classes; if a class has no rows or there are fewer than two classes; or if two rules
    have the same name.
    """
    import pyarrow as pa
    from pyarrow import dataset  # takes 0.3 s if pandas is installed, and few processes read labels

    names = [rule.name for rule in rules]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise LabelsError(f"{table}: class {', '.join(twice)} is described more than once")
    if not table.is_file():
        raise LabelsError(f"{table}: no such file")
    try:
        rows = dataset.dataset(table, format=table.suffix.removeprefix("."))
        key = next((name for name in KEYS if name in rows.schema.names), None)
        if key is None:
            raise LabelsError(f"{table}: no column to join by; there must be one of {', '.join(KEYS)}")
        if column not in rows.schema.names:
            raise LabelsError(f"{table}: no column {column!r}; its columns are {', '.join(rows.schema.names)}")
        columns = rows.to_table(columns=list(dict.fromkeys([key, column])))
    except (pa.ArrowException, ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        raise LabelsError(f"{table}: cannot be read as .csv or .parquet: {reason}") from error
    if not len(columns):
        raise LabelsError(f"{table}: has no rows; a table of labels has one row for each alert or object")
    if binary := [name for name in (key, column) if pa.types.is_binary(columns.schema.field(name).type)]:
        raise LabelsError(f"{table}: column {binary[0]!r} is not UTF-8 text: save the table as UTF-8")
    if pa.types.is_floating(columns.schema.field(key).type):
        raise LabelsError(
            f"{table}: column {key} holds floating-point numbers, which round ids above 2^53: write ids as integers or "
            "text"
        )
    ids, values = (columns[name].to_pylist() for name in (key, column))
    described = {value for rule in rules for value in rule.values}
    labelled = [
        (str(i), value)
        for i, value in zip(ids, values, strict=True)
        if _given(i) and (_given(value) or str(value) in described)
    ]
    rules = tuple(rules) or tuple(_class_of(value, table, column) for value in sorted({str(v) for _, v in labelled}))
    if len(rules) < 2:
        found = f" ({rules[0].name})" if rules else " (every label is missing)"
        raise LabelsError(f"{table}: column {column!r} has {len(rules)} class{found}; a classifier needs at least two")
    label_of: dict[str, int] = {}
    for identifier, value in labelled:
        label = next((i for i, rule in enumerate(rules) if rule.takes(value)), None)
        if label is None:
            continue
        if (other := label_of.setdefault(identifier, label)) != label:
            both = f"{rules[other].name} and {rules[label].name}"
            raise LabelsError(f"{table}: {key} {identifier} is labelled both {both}; an id must have one label")
    used = set(label_of.values())
    if absent := [rule.name for i, rule in enumerate(rules) if i not in used]:
        raise LabelsError(f"{table}: no value of column {column!r} belongs to class {', '.join(absent)}")
    with table.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return Labels(table, sha256, column, key, rules, label_of)


def _given(value: object) -> bool:
    """Return whether a cell of the table holds a value."""
    return value is not None and str(value).strip() not in UNLABELLED_TEXTS  # str(NaN) is "nan"


def _class_of(value: str, table: Path, column: str) -> ClassRule:
    """Return the class that has the same name as its only value."""
    if not CLASS_NAME.fullmatch(value):
        raise LabelsError(
            f"{table}: the value {value!r} of column {column!r} cannot be a class name, because it is not an "
            "identifier: "
            f"name the class with --class NAME={value!r}, and name the other classes likewise"
        )
    return ClassRule(value, frozenset({value}))
