"""For any schema and any bytes, both walkers (C and Python) agree, and read the values that were written."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import fastavro
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from broker_filter.packets import walk
from broker_filter.packets.compiled import IMPLEMENTATION
from broker_filter.packets.plan import MAX_LOOPS, Op, Reading, Wanted, compile_program
from broker_filter.packets.schemas.writer_schema import SchemaError, writer_schema
from broker_filter.packets.walk import MISSING_ID, Status, walk_python

WALKERS = [pytest.param(walk_python, id="python")]
if IMPLEMENTATION == "c":
    WALKERS.append(pytest.param(walk.walk, id="c"))

N_SLOTS = 64


class Outputs:
    """New outputs, filled with arbitrary values that a walker must overwrite."""

    def __init__(self, room: int = 256) -> None:
        self.scalars = np.full((2, N_SLOTS), 7.5)
        self.ids = np.full((2, N_SLOTS), 7, dtype=np.int64)
        self.spans = np.full((2, N_SLOTS, 2), 7, dtype=np.int64)
        self.points = np.full((room, 4), 7.5)

    def walk(self, walker: Any, program: NDArray[np.int32], body: bytes, start: int = 0) -> tuple[int, int, int]:
        return walker(program, memoryview(body), start, 1, self.scalars, self.ids, self.spans, self.points, 0)


def assert_same(program: NDArray[np.int32], body: bytes) -> tuple[tuple[int, int, int], Outputs]:
    """Run both walkers and check that their outputs are bit-identical."""
    expected = Outputs()
    result = expected.walk(walk_python, program, body)
    found = Outputs()
    assert found.walk(walk.walk, program, body) == result
    for name in ("scalars", "ids", "spans", "points"):
        assert getattr(found, name).tobytes() == getattr(expected, name).tobytes(), name
    return result, expected


def compiled(fields: list[dict[str, Any]], wanted: dict[str, Wanted]) -> NDArray[np.int32]:
    return compile_program(writer_schema({"type": "record", "name": "r", "fields": fields}), wanted)


def encoded(fields: list[dict[str, Any]], record: dict[str, Any]) -> bytes:
    stream = io.BytesIO()
    fastavro.schemaless_writer(stream, {"type": "record", "name": "r", "fields": fields}, record)
    return stream.getvalue()


# Random schemas and values.

PRIMITIVE_VALUES: dict[str, st.SearchStrategy[Any]] = {
    "null": st.none(),
    "boolean": st.booleans(),
    "int": st.integers(-(2**31), 2**31 - 1),
    "long": st.integers(-(2**63), 2**63 - 1),
    "float": st.floats(width=32),
    "double": st.floats(),
    "bytes": st.binary(max_size=20),
    "string": st.text(max_size=20),
}


@st.composite
def types(draw: st.DrawFn, depth: int = 3) -> Any:
    """Return a random Avro type, in which named types have no names yet."""
    kind = draw(
        st.sampled_from(
            [*PRIMITIVE_VALUES, "fixed", "enum", *(["record", "array", "map", "union", "logical"] * (depth > 0))]
        )
    )
    match kind:
        case "fixed":
            return {"type": "fixed", "size": draw(st.integers(0, 9))}
        case "enum":
            return {"type": "enum", "symbols": ["red", "green", "x", "u"]}
        case "record":
            inner = [draw(types(depth - 1)) for _ in range(draw(st.integers(0, 4)))]
            return {"type": "record", "fields": [{"name": f"f{i}", "type": t} for i, t in enumerate(inner)]}
        case "array":
            return {"type": "array", "items": draw(types(depth - 1))}
        case "map":
            return {"type": "map", "values": draw(types(depth - 1))}
        case "logical":
            return {"type": "long", "logicalType": "timestamp-micros"}
        case "union":
            number = draw(st.sampled_from(["boolean", "int", "double"]))
            branches = draw(st.permutations(["null", number, draw(st.sampled_from(["bytes", "string"]))]))
            return [*branches[: draw(st.integers(1, 3))]]
    return kind


def named(type_: Any, numbers: Iterator[int]) -> Any:
    """Return the type with a unique name for each named type in it."""
    if not isinstance(type_, dict):
        return type_
    inner = {key: named(type_[key], numbers) for key in ("items", "values") if key in type_}
    if "fields" in type_:
        inner["fields"] = [{**field, "type": named(field["type"], numbers)} for field in type_["fields"]]
    return {**type_, **inner, "name": f"n{next(numbers)}"}


def values(type_: Any) -> st.SearchStrategy[Any]:
    """Return a strategy for values that fastavro can write as `type_`."""
    if isinstance(type_, list):
        return st.one_of([values(branch) for branch in type_])
    if isinstance(type_, str):
        return PRIMITIVE_VALUES[type_]
    match type_["type"]:
        case "fixed":
            return st.binary(min_size=type_["size"], max_size=type_["size"])
        case "enum":
            return st.sampled_from(type_["symbols"])
        case "record":
            return st.fixed_dictionaries({field["name"]: values(field["type"]) for field in type_["fields"]})
        case "array":
            return st.lists(values(type_["items"]), max_size=4)
        case "map":
            return st.dictionaries(st.text(max_size=3), values(type_["values"]), max_size=3)
    return st.integers(-(2**62), 2**62)  # a long with a logical type


@st.composite
def records(draw: st.DrawFn) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, Wanted], dict[str, Reading]]:
    """Return the fields of a random record, their values, and the wanted readings of some fields."""
    numbers = itertools.count()
    fields = [{"name": f"f{i}", "type": named(draw(types()), numbers)} for i in range(draw(st.integers(1, 6)))]
    record = {field["name"]: draw(values(field["type"])) for field in fields}
    readings = {field["name"]: draw(st.sampled_from(Reading)) for field in fields if draw(st.booleans())}
    wanted = {name: Wanted(reading, int(name[1:]), whole=20 + int(name[1:])) for name, reading in readings.items()}
    return fields, record, wanted, readings


def expected_number(type_: Any, value: Any, letter: bool) -> float | None:
    """Return the result of a NUMBER or LETTER reading; None if the walk does not change the slot."""
    if isinstance(value, bool | int | float):
        return float(value)
    if (
        letter
        and isinstance(value, str | bytes)
        and value
        and not (isinstance(type_, dict) and type_["type"] == "fixed")
    ):
        return float((value.encode() if isinstance(value, str) else value)[0])
    return None


@settings(max_examples=150)
@given(records())
def test_walkers_read_the_values_that_fastavro_wrote(drawn: tuple[Any, Any, Any, Any]) -> None:
    fields, record, wanted, readings = drawn
    body = encoded(fields, record)
    program = compiled(fields, wanted)
    (status, position, _), outputs = assert_same(program, body + b"after")
    assert (status, position) == (Status.DONE, len(body))
    types_ = {field["name"]: field["type"] for field in fields}
    for name, reading in readings.items():
        slot, value, type_ = int(name[1:]), record[name], types_[name]
        container = isinstance(value, dict | list)
        if reading in (Reading.NUMBER, Reading.LETTER) and not container:
            number = expected_number(type_, value, reading is Reading.LETTER)
            np.testing.assert_equal(outputs.scalars[1, slot], math.nan if number is None else number)
        if reading is Reading.ID:
            integral = isinstance(value, int) and not isinstance(value, bool)
            assert outputs.ids[1, slot] == (value if integral else MISSING_ID)
        begin, end = outputs.spans[1, slot].tolist()
        if reading is Reading.BYTES and isinstance(value, str | bytes) and not isinstance(type_, dict):
            assert body[begin:end] == (value.encode() if isinstance(value, str) else value)
        else:
            assert (begin, end) == (-1, -1)
        begin, end = outputs.spans[1, 20 + slot].tolist()
        before = encoded(fields[:slot], {field["name"]: record[field["name"]] for field in fields[:slot]})
        assert body[:begin] == before
        assert body[begin:end] == encoded([fields[slot]], {name: value})


@settings(max_examples=250)
@given(records(), st.data())
def test_walkers_agree_on_damaged_bytes(drawn: tuple[Any, Any, Any, Any], data: st.DataObject) -> None:
    fields, record, wanted, _ = drawn
    body = bytearray(encoded(fields, record))
    for _ in range(data.draw(st.integers(0, 3))):
        if body:
            body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(body)))
    assert_same(compiled(fields, wanted), bytes(body[:cut]))


@settings(max_examples=150)
@given(records(), st.binary(max_size=200))
def test_walkers_agree_on_any_bytes(drawn: tuple[Any, Any, Any, Any], body: bytes) -> None:
    fields, _, wanted, _ = drawn
    assert_same(compiled(fields, wanted), body)


# Specific cases.

POINT = {
    "type": "record",
    "name": "p",
    "fields": [{"name": "t", "type": "double"}, {"name": "b", "type": ["null", "string"]}],
}
HISTORY = [{"name": "h", "type": ["null", {"type": "array", "items": POINT}]}, {"name": "z", "type": "double"}]
WANT_HISTORY = {
    "h": Wanted(table=3, fields={"t": Wanted(Reading.NUMBER, 1), "b": Wanted(Reading.LETTER, 2)}),
    "z": Wanted(Reading.NUMBER, 0),
}


@pytest.mark.parametrize("walker", WALKERS)
def test_items_of_an_array_become_rows(walker: Any) -> None:
    record = {"h": [{"t": 1.5, "b": "g"}, {"t": 2.5, "b": None}, {"t": 3.5, "b": "red"}], "z": 9.0}
    outputs = Outputs()
    body = encoded(HISTORY, record)
    assert outputs.walk(walker, compiled(HISTORY, WANT_HISTORY), body) == (Status.DONE, len(body), 3)
    np.testing.assert_equal(
        outputs.points[:3],
        [[3, 1.5, ord("g"), np.nan], [3, 2.5, np.nan, np.nan], [3, 3.5, ord("r"), np.nan]],
    )
    assert outputs.scalars[1, 0] == 9.0
    assert (outputs.scalars[0] == 7.5).all()


@pytest.mark.parametrize("walker", WALKERS)
def test_more_rows_than_capacity_is_reported(walker: Any) -> None:
    record = {"h": [{"t": 1.5, "b": "g"}] * 9, "z": 9.0}
    outputs = Outputs(room=8)
    status, _, n_points = outputs.walk(walker, compiled(HISTORY, WANT_HISTORY), encoded(HISTORY, record))
    assert (status, n_points) == (Status.NO_ROOM, 8)


@pytest.mark.parametrize("walker", WALKERS)
def test_blocks_with_sizes_are_read(walker: Any) -> None:
    items = [{"name": "a", "type": {"type": "array", "items": "int"}}, {"name": "b", "type": "int"}]
    program = compiled(items, {"b": Wanted(Reading.NUMBER, 0)})
    body = b"\x03\x04\x02\x04" + b"\x01\x02\x06" + b"\x00" + b"\x54"  # -2 items in 2 bytes, -1 item in 1, the end; 42
    outputs = Outputs()
    assert outputs.walk(walker, program, body) == (Status.DONE, len(body), 0)
    assert outputs.scalars[1, 0] == 42


@pytest.mark.parametrize(
    ("type_", "body", "status"),
    [
        ("long", b"", Status.TRUNCATED),
        ("long", b"\x80\x80", Status.TRUNCATED),
        ("long", b"\xff" * 9 + b"\x01", Status.DONE),
        ("long", b"\xff" * 9 + b"\x02", Status.CORRUPT),
        ("long", b"\xff" * 10, Status.CORRUPT),
        ("string", b"\x04a", Status.TRUNCATED),
        ("string", b"\x01", Status.CORRUPT),
        ("bytes", b"\xfe\xff\xff\xff\xff\xff\xff\xff\xff\x01", Status.TRUNCATED),
        ("double", b"\x00" * 7, Status.TRUNCATED),
        ("boolean", b"", Status.TRUNCATED),
        (["null", "int"], b"\x04", Status.CORRUPT),
        (["null", "int"], b"\x01", Status.CORRUPT),
        (["int", "string", "null"], b"\x06", Status.CORRUPT),
        ({"type": "array", "items": "int"}, b"\x01\x01", Status.CORRUPT),
        ({"type": "array", "items": "int"}, b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", Status.CORRUPT),
        ({"type": "array", "items": "int"}, b"\xfe\xff\xff\xff\xff\xff\xff\xff\xff\x01", Status.TRUNCATED),
        ({"type": "map", "values": "null"}, b"\x02\x02k", Status.TRUNCATED),
    ],
)
@pytest.mark.parametrize("reading", [None, Reading.NUMBER, Reading.LETTER, Reading.ID, Reading.BYTES])
def test_damage_is_truncation_or_corruption(type_: Any, body: bytes, status: Status, reading: Reading | None) -> None:
    program = compiled([{"name": "a", "type": type_}], {"a": Wanted(reading, 0)})
    assert assert_same(program, body)[0][0] == status


def test_walkers_agree_on_damaged_rows_of_nullable_numbers_that_are_not_wanted() -> None:
    unions: list[Any] = [["null", "float"], ["double", "null"], ["null", "boolean"], ["null", "float"]]
    names = "abcd"
    item = {
        "type": "record",
        "name": "p",
        "fields": [{"name": n, "type": u} for n, u in zip(names, unions, strict=True)],
    }
    fields = [{"name": "h", "type": {"type": "array", "items": item}}, {"name": "z", "type": "double"}]
    program = compiled(fields, {"z": Wanted(Reading.NUMBER, 0)})
    items = [dict(zip(names, each, strict=True)) for each in ((1.5, None, True, None), (None, 2.5, None, 3.5))]
    body = encoded(fields, {"h": items, "z": 9.0})
    (status, position, _), outputs = assert_same(program, body)
    assert (status, position) == (Status.DONE, len(body))
    assert outputs.scalars[1, 0] == 9.0
    for end in range(len(body)):
        assert assert_same(program, body[:end])[0][0] == Status.TRUNCATED
    for place in range(len(body)):
        for index in (b"\x00", b"\x01", b"\x02", b"\x04", b"\x80\x00", b"\x82\x00", b"\x80"):
            assert_same(program, body[:place] + index + body[place + 1 :])


@pytest.mark.parametrize("walker", WALKERS)
def test_items_without_bytes_are_not_iterated(walker: Any) -> None:
    nothing = {"type": "record", "name": "nothing", "fields": [{"name": "n", "type": "null"}]}
    program = compiled([{"name": "a", "type": {"type": "array", "items": nothing}}], {})
    count = b"\xfe\xff\xff\xff\xff\xff\xff\xff\xff\x01"  # 2^63 - 1, a thousand times
    assert Outputs().walk(walker, program, count * 1000 + b"\x00") == (Status.DONE, 10_001, 0)


def test_named_types_are_resolved_everywhere() -> None:
    inner = {"type": "record", "name": "s", "namespace": "a.b", "fields": [{"name": "x", "type": "int"}]}
    fields = [
        {"name": "first", "type": {"type": "array", "items": inner}},
        {"name": "again", "type": ["null", "a.b.s"]},
        {"name": "bare", "type": {"type": "record", "name": "a.b.t", "fields": [{"name": "y", "type": "s"}]}},
    ]
    program = compiled(fields, {"again": Wanted(fields={"x": Wanted(Reading.NUMBER, 5)})})
    (status, _, _), outputs = assert_same(
        program, encoded(fields, {"first": [{"x": 1}], "again": {"x": 2}, "bare": {"y": {"x": 3}}})
    )
    assert status == Status.DONE
    assert outputs.scalars[1, 5] == 2


def test_a_table_that_is_not_an_array_is_skipped() -> None:
    fields = [{"name": "h", "type": {"type": "record", "name": "s", "fields": [{"name": "b", "type": "string"}]}}]
    program = compiled(fields, {"h": Wanted(table=0, fields={"b": Wanted(Reading.LETTER, 0)})})
    (status, _, n_points), outputs = assert_same(program, encoded(fields, {"h": {"b": "[,,f]"}}))
    assert (status, n_points) == (Status.DONE, 0)
    assert np.isnan(outputs.scalars[1]).all()


@pytest.mark.parametrize(
    "definition",
    [
        pytest.param(
            {"type": "record", "name": "r", "fields": [{"name": "next", "type": ["null", "r"]}]}, id="in itself"
        ),
        pytest.param(
            {
                "type": "record",
                "name": "r",
                "fields": [
                    {
                        "name": f"f{i}",
                        "type": {
                            "type": "record",
                            "name": f"n{i}",
                            "fields": [{"name": f"g{j}", "type": f"n{i - 1}" if i else "null"} for j in range(2)],
                        },
                    }
                    for i in range(40)
                ],
            },
            id="doubling",
        ),
        pytest.param(
            json.loads(
                '{"type": "record", "name": "r", "fields": [{"name": "a", "type": '
                + '{"type": "array", "items": ' * (MAX_LOOPS + 1)
                + '"int"'
                + "}" * (MAX_LOOPS + 1)
                + "}]}"
            ),
            id="arrays in arrays",
        ),
    ],
)
def test_schemas_beyond_the_bounds_are_refused(definition: dict[str, Any]) -> None:
    with pytest.raises(SchemaError):
        compile_program(writer_schema(definition), {})


@pytest.mark.skipif(IMPLEMENTATION != "c", reason="the compiled walker is not built")
@settings(max_examples=500)
@given(
    st.lists(st.one_of(st.sampled_from(Op), st.integers(-3, 70), st.integers(-(2**31), 2**31 - 1)), max_size=12),
    st.binary(max_size=60),
)
def test_invalid_programs_do_not_harm_the_compiled_walker(program: list[int], body: bytes) -> None:
    with contextlib.suppress(ValueError):  # raised for an invalid program
        Outputs(room=16).walk(walk.walk, np.array(program, dtype=np.int32), body)


@pytest.mark.skipif(IMPLEMENTATION != "c", reason="the compiled walker is not built")
def test_outputs_of_a_wrong_shape_are_refused() -> None:
    program, body = np.zeros(0, dtype=np.int32), memoryview(b"")
    good = Outputs()
    arguments = (good.scalars, good.ids, good.spans, good.points)
    for k, bad in enumerate(
        (good.scalars[0], good.ids.astype(np.int32), good.spans[:, :, :1].copy(), good.points[:, ::2])
    ):
        mixed = (*arguments[:k], bad, *arguments[k + 1 :])
        with pytest.raises((ValueError, BufferError)):
            walk.walk(program, body, 0, 1, *mixed, 0)
    for start, row, n_points in ((1, 1, 0), (-1, 1, 0), (0, 2, 0), (0, -1, 0), (0, 1, 257), (0, 1, -1)):
        with pytest.raises(ValueError, match="walk"):
            walk.walk(program, body, start, row, *arguments, n_points)


def test_an_environment_variable_chooses_python() -> None:
    shown = subprocess.run(
        [sys.executable, "-c", "from broker_filter.packets.compiled import IMPLEMENTATION; print(IMPLEMENTATION)"],
        env={**os.environ, "BROKER_FILTER_PURE_PYTHON": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout == "python\n"
