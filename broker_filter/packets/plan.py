"""Compiles a writer's schema and the fields that are wanted of it into a flat program for `walk`.

A packet holds thousands of fields and a few dozen are wanted: the program reads those and steps over the rest, in one
pass over the body. Fields are found by name, whatever their order, their type and the unions around them. Must never
read a packet.

A program is an int32 array of instructions, an operation and its operands:

    SKIP n                 step over n bytes
    SKIP_LONG              step over an int, a long or an enum's index
    SKIP_BYTES             step over bytes or a string
    FLOAT s, DOUBLE s, BOOLEAN s, LONG s
                           read a number into scalar s (int and long are written alike)
    LETTER s               read a string's first byte into scalar s; an empty string leaves it as it was
    CONSTANT s v           scalar s becomes v
    ID s                   read an int or a long into id s, exactly
    BYTES s                span s becomes where the bytes or the string stand
    BEGIN s, END s         span s becomes what lies between the two, encoded
    OPTION b n             a union of null (branch b) and another, whose n words follow; null jumps over them
    UNION k t1 ... tk      jump to the code of the branch, t words from this instruction
    JUMP n                 jump over n words
    ARRAY n, MAP n         the item's n words follow, done as often as the blocks say (a map's item begins with its key)
    ROW t                  begin a row of points for table t: scalars are columns of that row until the array ends

Jumps go forward only, an item that takes no bytes (n = 0) is not iterated, and a row of points that takes none is a
type without values: a walk's work is bounded by the body's length.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, IntEnum, auto
from typing import Any

import numpy as np
from numpy.typing import NDArray

from broker_filter.packets.schema import MAX_SCHEMA_DEPTH, PRIMITIVES, SchemaError, WriterSchema

MAX_TYPES = 1 << 14
"""Named types are compiled where they are used: a small schema can mean a vast program. LSST's widest has 3,000."""
MAX_LOOPS = 16
"""Arrays and maps within each other; the depth of the walkers' stacks. The surveys' own schemas nest one."""
_MAX_SKIP = (1 << 31) - 1
"""The largest operand."""


class Op(IntEnum):
    """The instructions; `_walk.c` has the same numbers."""

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
    """What to make of a field's value."""

    NUMBER = auto()
    """A number or boolean, as a float64 scalar."""
    LETTER = auto()
    """As NUMBER, and of a string or an enum the first byte's code."""
    ID = auto()
    """An int or long, as an exact int64."""
    BYTES = auto()
    """Where a string's or bytes' content stands in the body."""


@dataclass(slots=True)
class Wanted:
    """What is wanted of a field: nothing, one reading into `slot`, or something of the fields inside it.

    A type that has no such reading (the number of a string) leaves the slot as it was. `whole` is a span slot for the
    encoded field as it stands, union branch included. `table` makes each item of an array a row of points, the readings
    inside it being columns 1 and up of that row, and column 0 the table's number.
    """

    reading: Reading | None = None
    slot: int = 0
    whole: int | None = None
    table: int | None = None
    fields: dict[str, Wanted] = field(default_factory=dict)

    def read(self, reading: Reading, slot: int) -> None:
        """Wants a reading of the field itself, which can have one only."""
        if self.reading is not None:
            raise ValueError(f"a field is wanted twice: as {self.reading} in {self.slot}, as {reading} in {slot}")
        self.reading, self.slot = reading, slot


_NOTHING = Wanted()
_NUMBERS = (Reading.NUMBER, Reading.LETTER)
_FIXED_WIDTH = {"boolean": (1, Op.BOOLEAN), "float": (4, Op.FLOAT), "double": (8, Op.DOUBLE)}


def compile_program(schema: WriterSchema, wanted: Mapping[str, Wanted]) -> NDArray[np.int32]:
    """The program that walks a record of `schema` and reads what is `wanted` of its fields. Raises SchemaError."""
    compiler = _Compiler(_named_types(schema.canonical))
    return np.array(compiler.code(schema.canonical, Wanted(fields=dict(wanted)), 0, 0), dtype=np.int32)


def field_paths(schema: WriterSchema) -> frozenset[str]:
    """The names of the top-level fields of `schema`, and `outer.inner` for those inside records, nullable ones too."""
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
    """The definitions of the named types inside a canonical form, by full name."""
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
    """Compiles the types of one schema's canonical form."""

    def __init__(self, named: dict[str, dict[str, Any]]) -> None:
        self._named = named
        self._types = 0

    def code(self, type_: Any, wanted: Wanted, depth: int, loops: int) -> list[int]:
        """The code of a type inside `depth` others, `loops` of them arrays or maps."""
        self._types += 1
        if depth > MAX_SCHEMA_DEPTH or loops > MAX_LOOPS or self._types > MAX_TYPES:
            raise SchemaError(
                "the schema's types nest too deeply, in themselves, or are too many once names are resolved"
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
                    # A row that takes no bytes has no time either; as many as a number says would take all memory.
                    item = [Op.ROW, wanted.table, *row] if row else _branch([])
                return [Op.ARRAY, len(item), *item]
            case _:  # a map
                item = self.code(type_["values"], _NOTHING, depth + 1, loops + 1)
                return [Op.MAP, 1 + len(item), Op.SKIP_BYTES, *item]

    def _record(self, fields: list[dict[str, Any]], wanted: Wanted, depth: int, loops: int) -> list[int]:
        code: list[int] = []
        skipped = 0  # bytes of fixed width that nobody wants, gathered into one instruction
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
    """UNION over `codes`, each followed by a jump to the common end."""
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
        raise SchemaError("the schema's fixed types are too large")
    return [Op.SKIP, width] if width else []
