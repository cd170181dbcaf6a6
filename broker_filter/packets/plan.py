"""Compiles a writer's schema and the wanted fields into a flat program for `walk`.

A packet holds thousands of fields, and a few dozen are wanted. The program reads these and skips the others, in one
pass over the body. Fields are found by name, whatever their order, their types and the unions around them. This module
must never read a packet.

A program is an int32 array of instructions. An instruction is an operation and its operands:

    SKIP n                 skip n bytes
    SKIP_LONG              skip an int, a long or the index of an enum symbol
    SKIP_BYTES             skip bytes or a string
    FLOAT s, DOUBLE s, BOOLEAN s, LONG s
                           read a number into scalar s (Avro encodes int and long in the same way)
    LETTER s               read the first byte of a string into scalar s; an empty string does not change the scalar
    CONSTANT s v           set scalar s to v
    ID s                   read an int or a long into id s, as an exact int64
    BYTES s                set span s to the range of the content of bytes or a string
    BEGIN s, END s         set the start and the end of span s to the current position
    OPTION b n             a union of null (branch b) and another type, whose n words follow; for null, jump over them
    UNION k t1 ... tk      jump to the code of the branch, t words from this instruction
    JUMP n                 jump over n words
    ARRAY n, MAP n         repeat the n words that follow for each item (the code of a map's item begins with its key)
    ROW t                  begin a row of points for table t: scalars are columns of this row until the array ends

The work of a walk is bounded by the length of the body: jumps go forward only, items that take no bytes (n = 0) are not
iterated, and a row of points that takes no bytes is compiled into an instruction that fails.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, IntEnum, auto
from typing import Any

import numpy as np
from numpy.typing import NDArray

from broker_filter.packets.schemas.writer_schema import MAX_SCHEMA_DEPTH, PRIMITIVES, SchemaError, WriterSchema

MAX_TYPES = 1 << 14
"""The maximum number of compiled types. A named type is compiled at each use, so a small schema can become a huge
program. The widest LSST schema has 3,000 types."""
MAX_LOOPS = 16
"""The maximum nesting of arrays and maps, which is the depth of the walkers' stacks. The surveys' schemas nest one."""
_MAX_SKIP = (1 << 31) - 1
"""The largest operand of an instruction (int32)."""


class Op(IntEnum):
    """The operations of a program. `_walk.c` defines the same numbers."""

    SKIP = 0
    SKIP_LONG = 1
    SKIP_BYTES = 2
    FLOAT = 3
    DOUBLE = 4
    BOOLEAN = 5
    LONG = 6
    LETTER = 7
    CONSTANT = 8
    ID = 9
    BYTES = 10
    BEGIN = 11
    END = 12
    OPTION = 13
    UNION = 14
    JUMP = 15
    ARRAY = 16
    MAP = 17
    ROW = 18


class Reading(Enum):
    """How to read the value of a field."""

    NUMBER = auto()
    """Read a number or boolean as a float64 scalar."""
    LETTER = auto()
    """Read a number or boolean as NUMBER does, and a string or enum as the code of its first byte."""
    ID = auto()
    """Read an int or long as an exact int64."""
    BYTES = auto()
    """Read the byte range of the content of a string or bytes in the body."""


@dataclass(slots=True)
class Wanted:
    """What to read from a field.

    `reading`, `slot`: how to read the value and the slot for it; None to skip the value. If the type of the field does
    not permit the reading (a string as a NUMBER), the slot is not changed. `whole`: the span slot for the encoded
    field, including the index of the union branch. `table`: the number of a table; each item of the array is then a row
    of points, whose column 0 is this number and whose other columns are the readings inside the item. `fields`: what to
    read from the fields inside a record, by name.
    """

    reading: Reading | None = None
    slot: int = 0
    whole: int | None = None
    table: int | None = None
    fields: dict[str, Wanted] = field(default_factory=dict)

    def read(self, reading: Reading, slot: int) -> None:
        """Set the reading of the field. Raises ValueError if it already has one."""
        if self.reading is not None:
            raise ValueError(
                f"a field has two readings: {self.reading} into slot {self.slot} and {reading} into slot {slot}"
            )
        self.reading, self.slot = reading, slot


_NOTHING = Wanted()
_NUMBERS = (Reading.NUMBER, Reading.LETTER)
_FIXED_WIDTH = {"boolean": (1, Op.BOOLEAN), "float": (4, Op.FLOAT), "double": (8, Op.DOUBLE)}


def compile_program(schema: WriterSchema, wanted: Mapping[str, Wanted]) -> NDArray[np.int32]:
    """Return the program that walks a record of `schema` and reads the `wanted` fields, by name; int32[words].

    Raises SchemaError if the program would exceed MAX_TYPES, MAX_LOOPS or MAX_SCHEMA_DEPTH.
    """
    compiler = _Compiler(_named_types(schema.canonical))
    return np.array(compiler.code(schema.canonical, Wanted(fields=dict(wanted)), 0, 0), dtype=np.int32)


def field_paths(schema: WriterSchema) -> frozenset[str]:
    """Return the names of the top-level fields, and `outer.inner` for the fields of records in them.

    An outer field may be nullable.
    """
    named = _named_types(schema.canonical)
    paths = set()
    for outer in schema.canonical["fields"]:
        paths.add(outer["name"])
        for branch in outer["type"] if isinstance(outer["type"], list) else [outer["type"]]:
            record = named.get(branch) if isinstance(branch, str) else branch
            if record is not None and record["type"] == "record":
                paths.update(f"{outer['name']}.{inner['name']}" for inner in record["fields"])
    return frozenset(paths)


def _named_types(canonical: Any) -> dict[str, dict[str, Any]]:
    """Return the definitions of all named types in the canonical form of a schema, by full name."""
    named: dict[str, dict[str, Any]] = {}
    pending = [canonical]
    while pending:
        type_ = pending.pop()
        if isinstance(type_, list):
            pending += type_
        elif isinstance(type_, dict):
            if "name" in type_:
                named[type_["name"]] = type_
            pending += [entry["type"] for entry in type_.get("fields", ())]
            pending += [type_[inner] for inner in ("items", "values") if inner in type_]
    return named


class _Compiler:
    """Compiles the types of the canonical form of one schema. `named`: its named types."""

    def __init__(self, named: dict[str, dict[str, Any]]) -> None:
        self._named = named
        self._types = 0

    def code(self, type_: Any, wanted: Wanted, depth: int, loops: int) -> list[int]:
        """Return the code of a type that is nested inside `depth` other types, of which `loops` are arrays or maps.

        Raises SchemaError.
        """
        self._types += 1
        if depth > MAX_SCHEMA_DEPTH or loops > MAX_LOOPS or self._types > MAX_TYPES:
            raise SchemaError(
                "the types of the schema are recursive, nest too deeply, or are too many once names are resolved"
            )
        if isinstance(type_, list):
            return self._union(type_, wanted, depth, loops)
        if isinstance(type_, str):
            if type_ in PRIMITIVES:
                return _primitive(type_, wanted)
            type_ = self._named[type_]
        match type_["type"]:
            case "record":
                return self._record(type_["fields"], wanted if wanted.table is None else _NOTHING, depth, loops)
            case "enum":
                return _enum(type_["symbols"], wanted)
            case "fixed":
                return _skip(type_["size"])
            case "array":
                if wanted.table is None:
                    item = self.code(type_["items"], _NOTHING, depth + 1, loops + 1)
                else:
                    columns = Wanted(fields=wanted.fields)
                    row = self.code(type_["items"], columns, depth + 1, loops + 1)
                    # A row that takes no bytes has no time, and an untrusted count of such rows could fill the memory.
                    # UNION without branches rejects every row.
                    item = [Op.ROW, wanted.table, *row] if row else _branch([])
                return [Op.ARRAY, len(item), *item]
            case _:  # a map
                item = self.code(type_["values"], _NOTHING, depth + 1, loops + 1)
                return [Op.MAP, 1 + len(item), Op.SKIP_BYTES, *item]

    def _record(self, fields: list[dict[str, Any]], wanted: Wanted, depth: int, loops: int) -> list[int]:
        code: list[int] = []
        skipped = 0  # bytes of unwanted fields of fixed width, merged into one instruction
        for entry in fields:
            want = wanted.fields.get(entry["name"], _NOTHING)
            part = self.code(entry["type"], want, depth + 1, loops)
            if want.whole is not None:
                part = [Op.BEGIN, want.whole, *part, Op.END, want.whole]
            if part and part[0] == Op.SKIP and len(part) == 2:
                skipped += part[1]
            else:
                code += [*_skip(skipped), *part]
                skipped = 0
        return code + _skip(skipped)

    def _union(self, branches: list[Any], wanted: Wanted, depth: int, loops: int) -> list[int]:
        codes = [self.code(branch, wanted, depth + 1, loops) for branch in branches]
        if len(branches) == 2 and "null" in branches:
            null = branches.index("null")
            return [Op.OPTION, null, len(codes[1 - null]), *codes[1 - null]]
        return _branch(codes)


def _primitive(type_: str, wanted: Wanted) -> list[int]:
    if type_ == "null":
        return []
    if type_ in _FIXED_WIDTH:
        width, op = _FIXED_WIDTH[type_]
        return [op, wanted.slot] if wanted.reading in _NUMBERS else _skip(width)
    if type_ in ("int", "long"):
        if wanted.reading is Reading.ID:
            return [Op.ID, wanted.slot]
        return [Op.LONG, wanted.slot] if wanted.reading in _NUMBERS else [Op.SKIP_LONG]
    if wanted.reading is Reading.BYTES:
        return [Op.BYTES, wanted.slot]
    return [Op.LETTER, wanted.slot] if wanted.reading is Reading.LETTER else [Op.SKIP_BYTES]


def _enum(symbols: list[str], wanted: Wanted) -> list[int]:
    if wanted.reading is Reading.LETTER and symbols:
        return _branch([[Op.CONSTANT, wanted.slot, *symbol.encode()[:1]] if symbol else [] for symbol in symbols])
    return [Op.SKIP_LONG]


def _branch(codes: list[list[int]]) -> list[int]:
    """Return a UNION with one code per branch, each followed by a jump to the common end."""
    bodies: list[int] = []
    targets: list[int] = []
    left = sum(len(code) + 2 for code in codes)
    for code in codes:
        targets.append(2 + len(codes) + len(bodies))
        left -= len(code) + 2
        bodies += [*code, Op.JUMP, left]
    return [Op.UNION, len(codes), *targets, *bodies]


def _skip(width: int) -> list[int]:
    if width > _MAX_SKIP:
        raise SchemaError(f"the schema has fixed-size fields of more than {_MAX_SKIP} bytes")
    return [Op.SKIP, width] if width else []
