"""Runs a program of `plan` over an Avro body, in C (`_walk.c`) if the extension is installed, otherwise in Python.

Both implementations give identical results on any bytes, valid or not, and neither reads beyond the body. `compiled.py`
chooses the implementation.
"""

from __future__ import annotations

import struct
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from broker_filter.packets import compiled
from broker_filter.packets.plan import Op

MISSING_ID = -(1 << 63)
"""Stands for an id that the record does not have."""

_FLOAT_BITS = struct.Struct("<f")
_DOUBLE_BITS = struct.Struct("<d")

# Plain integers, because comparing with enum members would take a third of the time of a walk.
(
    _SKIP,
    _SKIP_LONG,
    _SKIP_BYTES,
    _FLOAT,
    _DOUBLE,
    _BOOLEAN,
    _LONG,
    _LETTER,
    _CONSTANT,
    _ID,
    _BYTES,
    _BEGIN,
    _END,
    _OPTION,
    _UNION,
    _JUMP,
    _ARRAY,
    _MAP,
    _ROW,
) = (int(op) for op in Op)


class Status(IntEnum):
    """The result of a walk. `_walk.c` defines the same numbers."""

    DONE = 0
    """The walk reached the end of the record."""
    TRUNCATED = 1
    """The body ends within the record."""
    CORRUPT = 2
    """The body has an impossible length, number or union branch."""
    NO_ROOM = 3
    """The record has more rows of points than the output array can hold."""


def walk_python(
    program: NDArray[np.int32],
    body: memoryview,
    start: int,
    row: int,
    scalars: NDArray[np.float64],
    ids: NDArray[np.int64],
    spans: NDArray[np.int64],
    points: NDArray[np.float64],
    n_points: int,
) -> tuple[int, int, int]:
    """Walk the record at offset `start` of `body` and write row `row` of the outputs.

    Outputs: `scalars` float64[N, F], `ids` int64[N, I] and `spans` int64[N, S, 2]. A value that the record does not
    have is NaN, MISSING_ID or -1, respectively. Table rows are written to `points` float64[M, P] from row `n_points`
    on. `program` must come from `plan.compile_program`.

    Returns the Status, the offset at which the record ended or the walk failed, and the number of used rows of
    `points`. After a failure the outputs hold the values that were read before it.
    """
    walk = _PythonWalk(body, start, n_points)
    try:
        walk.run(program.tolist(), scalars[row], ids[row], spans[row], points)
    except _StoppedError as stopped:
        return stopped.status, walk.position, walk.n_points
    return Status.DONE, walk.position, walk.n_points


class _StoppedError(Exception):
    """Raised inside this module to stop a walk."""

    def __init__(self, status: Status) -> None:
        super().__init__()
        self.status = status


class _PythonWalk:
    """The state of a walk: the body, the current position and the number of rows of points.

    If reading a value fails, the position stays at the start of that value.
    """

    __slots__ = ("body", "n_points", "position")

    def __init__(self, body: memoryview, position: int, n_points: int) -> None:
        self.body = body
        self.position = position
        self.n_points = n_points

    def long(self) -> int:
        """Read an Avro int or long."""
        body, position = self.body, self.position
        bits = shift = 0
        while True:
            if position == len(body):
                raise _StoppedError(Status.TRUNCATED)
            byte = body[position]
            position += 1
            if shift == 63 and byte > 1:  # more than 64 bits
                raise _StoppedError(Status.CORRUPT)
            bits |= (byte & 0x7F) << shift
            if byte < 0x80:
                self.position = position
                return (bits >> 1) ^ -(bits & 1)
            shift += 7

    def skip(self, size: int) -> int:
        """Skip `size` bytes and return the position of the first one."""
        begin = self.position
        if size > len(self.body) - begin:
            raise _StoppedError(Status.TRUNCATED)
        self.position = begin + size
        return begin

    def bytes(self) -> tuple[int, int]:
        """Skip length-prefixed bytes and return their start and end."""
        before = self.position
        size = self.long()
        begin = self.position
        self.position = before
        if size < 0:
            raise _StoppedError(Status.CORRUPT)
        if size > len(self.body) - begin:
            raise _StoppedError(Status.TRUNCATED)
        self.position = begin + size
        return begin, begin + size

    def block(self) -> int:
        """Read the item count of the next block of an array or a map; 0 means that there is no further block."""
        count = self.long()
        if count >= 0:
            return count
        # A negative count is followed by the size of the block in bytes.
        if count == MISSING_ID or self.long() < 0:
            raise _StoppedError(Status.CORRUPT)
        return -count

    def run(
        self,
        program: list[int],
        scalars: NDArray[np.float64],
        ids: NDArray[np.int64],
        spans: NDArray[np.int64],
        points: NDArray[np.float64],
    ) -> None:
        """Run `program` on one record. The arrays are the rows of the outputs that belong to it, and all `points`."""
        scalars[:], ids[:], spans[:] = np.nan, MISSING_ID, -1
        loops: list[tuple[int, int, int, NDArray[np.float64]]] = []  # items left; their code; the scalars outside
        pc, stop = 0, len(program)
        while True:
            while pc == stop:
                if not loops:
                    return
                left, begin, end, outer = loops.pop()
                left = left - 1 or self.block()
                if left:
                    loops.append((left, begin, end, outer))
                    pc = begin
                else:
                    scalars = outer
                    stop = loops[-1][2] if loops else len(program)
            op = program[pc]
            if op == _OPTION:
                branch = self.long()
                if branch not in (0, 1):
                    raise _StoppedError(Status.CORRUPT)
                pc += 3 + program[pc + 2] if branch == program[pc + 1] else 3
            elif op == _SKIP:
                self.skip(program[pc + 1])
                pc += 2
            elif op == _SKIP_LONG:
                self.long()
                pc += 1
            elif op == _SKIP_BYTES:
                self.bytes()
                pc += 1
            elif op == _FLOAT:
                (scalars[program[pc + 1]],) = _FLOAT_BITS.unpack_from(self.body, self.skip(4))
                pc += 2
            elif op == _DOUBLE:
                (scalars[program[pc + 1]],) = _DOUBLE_BITS.unpack_from(self.body, self.skip(8))
                pc += 2
            elif op == _LONG:
                scalars[program[pc + 1]] = self.long()
                pc += 2
            elif op == _BOOLEAN:
                scalars[program[pc + 1]] = self.body[self.skip(1)] != 0
                pc += 2
            elif op == _LETTER:
                begin, end = self.bytes()
                if begin < end:
                    scalars[program[pc + 1]] = self.body[begin]
                pc += 2
            elif op == _CONSTANT:
                scalars[program[pc + 1]] = program[pc + 2]
                pc += 3
            elif op == _ID:
                ids[program[pc + 1]] = self.long()
                pc += 2
            elif op == _BYTES:
                spans[program[pc + 1]] = self.bytes()
                pc += 2
            elif op == _BEGIN:
                spans[program[pc + 1], 0] = self.position
                pc += 2
            elif op == _END:
                spans[program[pc + 1], 1] = self.position
                pc += 2
            elif op == _UNION:
                branch = self.long()
                if not 0 <= branch < program[pc + 1]:
                    raise _StoppedError(Status.CORRUPT)
                pc += program[pc + 2 + branch]
            elif op == _JUMP:
                pc += 2 + program[pc + 1]
            elif op == _ROW:
                if self.n_points == len(points):
                    raise _StoppedError(Status.NO_ROOM)
                scalars = points[self.n_points]
                scalars[0], scalars[1:] = program[pc + 1], np.nan
                self.n_points += 1
                pc += 2
            else:  # ARRAY, MAP
                length = program[pc + 1]
                pc += 2
                left = self.block()
                while left and not length:
                    left = self.block()
                if left:
                    stop = pc + length
                    loops.append((left, pc, stop, scalars))
                else:
                    pc += length


walk: compiled.Walk = compiled.walk or walk_python
