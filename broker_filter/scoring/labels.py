"""A table of labels, CSV or Parquet: which class an alert or an object is of. Never guesses at what it cannot use."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import dataset

from broker_filter.scoring.reference import UNLABELLED

KEYS: dict[str, Literal["alert", "object"]] = {
    "alert_id": "alert",
    "candid": "alert",
    "diaSourceId": "alert",
    "object_id": "object",
    "objectId": "object",
    "diaObjectId": "object",
}
"""Columns that labels are joined by, and whose id they hold; of several the first that the table has is taken."""
UNLABELLED_TEXTS = frozenset(
    ["", "nan", "NaN", "-nan", "-NaN", "NA", "N/A", "n/a", "<NA>", "#N/A", "#NA", "null", "NULL", "None", "NaT"]
)
"""What programs write for a missing value into a column of text: those that pandas reads as missing. A class has such a
value only where a rule names it."""
CLASS_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
"""A class becomes an output of the bundle, and outputs stand in filters."""


class LabelsError(Exception):
    """A table of labels, or a class, that cannot be used: which, what is wrong with it, what to do."""


@dataclass(frozen=True, slots=True)
class ClassRule:
    """Which values of the label column make a class: those of `values`, or the numbers above `low` up to `high`."""

    name: str
    values: frozenset[str] = frozenset()
    low: float = math.inf
    high: float = -math.inf

    def takes(self, value: object) -> bool:
        """Whether a value of the table, not null, is of this class."""
        return str(value) in self.values or (isinstance(value, int | float) and self.low < value <= self.high)

    def __str__(self) -> str:
        return f"{self.name}={','.join(sorted(self.values)) or f'{self.low:g}..{self.high:g}'}"


def parse_rule(text: str) -> ClassRule:
    """`SN=SN Ia,SN II`: these values; `real=0.5..1`: numbers above 0.5 up to 1. Raises LabelsError else."""
    name, _, given = text.partition("=")
    if not CLASS_NAME.fullmatch(name) or not given:
        raise LabelsError(f"{text!r} is no class: NAME=VALUE,VALUE... or NAME=LOW..HIGH, the name an identifier")
    low, dots, high = given.partition("..")
    if not dots:
        return ClassRule(name, frozenset(given.split(",")))
    try:
        rule = ClassRule(name, low=float(low), high=float(high))
    except ValueError as error:
        raise LabelsError(f"{text!r} is no class: {given!r} is no pair of numbers") from error
    if not rule.low < rule.high:
        raise LabelsError(f"{text!r} is no class: no number is above {rule.low:g} and up to {rule.high:g}")
    return rule


@dataclass(frozen=True, slots=True)
class Labels:
    """The class of each labelled id, as an index into `rules`."""

    table: Path
    sha256: str
    column: str
    key: str
    rules: tuple[ClassRule, ...]
    label_of: dict[str, int]

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes' names."""
        return tuple(rule.name for rule in self.rules)

    def key_of(self, alert_id: int, object_id: str) -> str:
        """What an alert is looked up by in `label_of`."""
        return str(alert_id) if KEYS[self.key] == "alert" else object_id

    def of(self, alert_id: NDArray[np.int64], object_id: NDArray[np.str_]) -> NDArray[np.int64]:
        """The class of each of N alerts, UNLABELLED where it has no label."""
        keys = (self.key_of(*names) for names in zip(alert_id.tolist(), object_id.tolist(), strict=True))
        return np.array([self.label_of.get(key, UNLABELLED) for key in keys], np.int64)


def read_labels(table: Path, column: str, rules: Sequence[ClassRule] = ()) -> Labels:
    """The labels in `column` of a table; without `rules` every value is a class of its own.

    Rows whose id or label is missing (null, NaN, empty, or one of UNLABELLED_TEXTS) are left out, and so are those of
    no class. Raises LabelsError where the table cannot be read or has no row, lacks a column, has ids that are rounded
    (floating-point numbers), gives an id two classes, or has no row of a class, and where two rules are of one name.
    """
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
            raise LabelsError(f"{table}: no column {column!r}; there are {', '.join(rows.schema.names)}")
        columns = rows.to_table(columns=list(dict.fromkeys([key, column])))
    except (pa.ArrowException, ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        raise LabelsError(f"{table}: neither a .csv nor a .parquet that can be read: {reason}") from error
    if not len(columns):
        raise LabelsError(f"{table}: has no row: a table of labels has one for each alert or object")
    if binary := [name for name in (key, column) if pa.types.is_binary(columns.schema.field(name).type)]:
        raise LabelsError(f"{table}: {binary[0]!r} holds bytes that are no text in UTF-8: save the table as UTF-8")
    if pa.types.is_floating(columns.schema.field(key).type):
        raise LabelsError(
            f"{table}: {key} holds floating-point numbers, which round ids above 2^53: write them as integers or text"
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
        found = f" ({rules[0].name})" if rules else ": every label is missing"
        raise LabelsError(f"{table}: {column!r} makes {len(rules)} class{found}; a classifier needs two")
    label_of: dict[str, int] = {}
    for identifier, value in labelled:
        label = next((i for i, rule in enumerate(rules) if rule.takes(value)), None)
        if label is None:
            continue
        if (other := label_of.setdefault(identifier, label)) != label:
            both = f"{rules[other].name} and {rules[label].name}"
            raise LabelsError(f"{table}: {key} {identifier} is labelled {both}; an id has one label")
    used = set(label_of.values())
    if absent := [rule.name for i, rule in enumerate(rules) if i not in used]:
        raise LabelsError(f"{table}: no row of {column!r} is of class {', '.join(absent)}")
    with table.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return Labels(table, sha256, column, key, rules, label_of)


def _given(value: object) -> bool:
    """Whether a table's cell says anything."""
    return value is not None and str(value).strip() not in UNLABELLED_TEXTS  # a number that is NaN is written nan


def _class_of(value: str, table: Path, column: str) -> ClassRule:
    """The class that is called as its values are."""
    if not CLASS_NAME.fullmatch(value):
        raise LabelsError(
            f"{table}: {value!r} of {column!r} is no class's name, which is an identifier: name it with "
            f"--class NAME={value!r}, and the others"
        )
    return ClassRule(value, frozenset({value}))
