"""Reads the convolutions of a quantised TensorFlow Lite network, and executes nothing.

The file is a FlatBuffer (https://flatbuffers.dev/internals/): tables whose fields are found by offsets. Field numbers
and enumerations are those of TensorFlow Lite's schema.fbs, version 3. The file is untrusted: an offset beyond its end
is an error, and the work is bounded by its length.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from broker_filter.importers.weights import WeightsError

MAX_TFLITE_BYTES = 2**28
"""Largest file that is read. Networks for phones, for which the format was made, have some megabytes."""
IDENTIFIER = b"TFL3"
CONVOLUTION, DEPTHWISE = 3, 4
"""Values of BuiltinOperator."""
UINT8, INT32 = 3, 2
"""Values of TensorType."""


@dataclass(frozen=True, slots=True)
class Convolution:
    """A convolution, dequantised, in torch's layout."""

    weight: NDArray[np.float32]  # [out, in / groups, height, width]
    bias: NDArray[np.float32]  # [out]


def read_convolutions(path: Path) -> list[Convolution]:
    """Return the convolutions of a `.tflite` file, in the order in which the network runs them.

    Weights are uint8 and biases int32, with one scale and zero point each. Raises WeightsError if the file is missing,
    damaged, too large or quantised in another way.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    if path.stat().st_size > MAX_TFLITE_BYTES:
        raise WeightsError(f"{path}: larger than {MAX_TFLITE_BYTES} bytes, the limit for a .tflite file")
    content = path.read_bytes()
    if content[4:8] != IDENTIFIER:
        raise WeightsError(f"{path}: not a TensorFlow Lite file: it does not have the identifier {IDENTIFIER.decode()}")
    try:
        return _convolutions(content)
    except (struct.error, ValueError, IndexError) as error:
        raise WeightsError(f"{path}: damaged, or not quantised to uint8 with one scale a tensor: {error}") from error


def _convolutions(content: bytes) -> list[Convolution]:
    root = _Table(content, _at(content, 0))
    operations = [code.number(0, "B") for code in root.tables(1)]
    [graph] = root.tables(2)
    tensors, buffers = graph.tables(0), root.tables(4)
    found = []
    for operator in graph.tables(3):
        operation = operations[operator.number(0, "I")]
        if operation not in (CONVOLUTION, DEPTHWISE):
            continue
        _, weight, bias = (tensors[i] for i in operator.array(1, "<i4").tolist())
        array = _dequantised(weight, UINT8, "u1", buffers)  # [out, h, w, in], or [1, h, w, out] if depthwise
        layout = (3, 0, 1, 2) if operation == DEPTHWISE else (0, 3, 1, 2)
        found.append(Convolution(array.transpose(layout).copy(), _dequantised(bias, INT32, "<i4", buffers)))
    return found


def _dequantised(tensor: _Table, kind: int, dtype: str, buffers: list[_Table]) -> NDArray[np.float32]:
    """Return a tensor's values as float32: (integer - zero point) x scale."""
    if tensor.number(1, "B") != kind:
        raise ValueError(f"a tensor has the type {tensor.number(1, 'B')} instead of {kind}")
    [quantisation] = tensor.table(4)
    [scale], [zero] = quantisation.array(2, "<f4"), quantisation.array(3, "<i8")
    if not np.isfinite(scale):
        raise ValueError("a scale is not finite")
    values = buffers[tensor.number(2, "I")].array(0, "u1").view(dtype)
    shape = tensor.array(0, "<i4")
    if (shape < 1).any():
        raise ValueError(f"a tensor has the shape {shape.tolist()}")
    dequantised = (values.astype(np.float64) - float(zero)) * float(scale)
    return dequantised.reshape(shape.tolist()).astype(np.float32)


class _Table:
    """A table of a FlatBuffer.

    Field `i` is absent if the table was written without it; its value is then 0 or empty.
    """

    def __init__(self, content: bytes, position: int) -> None:
        self._content = content
        self._position = position

    def number(self, i: int, kind: str) -> int:
        """Return an integer; `kind` is its format for `struct`."""
        position = self._field(i)
        return 0 if position is None else int(struct.unpack_from(f"<{kind}", self._content, position)[0])

    def array(self, i: int, dtype: str) -> NDArray[Any]:
        """Return a vector of numbers."""
        position = self._field(i)
        if position is None:
            return np.zeros(0, dtype)
        start = _at(self._content, position)
        [count] = struct.unpack_from("<I", self._content, start)
        return np.frombuffer(self._content, dtype, count, start + 4)

    def table(self, i: int) -> list[_Table]:
        """Return the table of a field in a list, which is empty if the field is absent."""
        position = self._field(i)
        return [] if position is None else [_Table(self._content, _at(self._content, position))]

    def tables(self, i: int) -> list[_Table]:
        """Return the tables of a vector."""
        position = self._field(i)
        if position is None:
            return []
        start = _at(self._content, position)
        places = start + 4 + 4 * np.arange(len(self.array(i, "<u4")))
        return [_Table(self._content, _at(self._content, place)) for place in places.tolist()]

    def _field(self, i: int) -> int | None:
        """Return the position of a field, or None if it is absent."""
        table = self._position - int(struct.unpack_from("<i", self._content, self._position)[0])
        [length] = struct.unpack_from("<H", self._content, table)
        slot = 4 + 2 * i  # the first two numbers are the lengths of this table of offsets and of the table itself
        if slot >= length:
            return None
        [offset] = struct.unpack_from("<H", self._content, table + slot)
        return self._position + int(offset) if offset else None


def _at(content: bytes, position: int) -> int:
    """Return the position to which the offset at `position` points."""
    return position + int(struct.unpack_from("<I", content, position)[0])
