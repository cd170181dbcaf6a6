"""FITS stamps into pixels: gzip-ed (ZTF) or plain (LSST), the primary image, bit for bit as published.

Reads two-dimensional images of every FITS number type, with the results of astropy, which the tests compare with. Must
never trust a size that the bytes claim, never alter a pixel, and never raise anything but `StampError`. Reading costs a
time in proportion to the stamp's inflated bytes: headers are bounded, and what is no plain image is not interpreted.
"""

from __future__ import annotations

import math
import re
from functools import lru_cache
from typing import Any, NamedTuple

import deflate
import numpy as np
from numpy.typing import NDArray

from broker_filter.packets import compiled
from broker_filter.packets.rejects import RejectReason

MAX_STAMP_BYTES = 4 * 2**20
"""Of an inflated stamp: ZTF's are 20 kB, LSST's up to 150 kB, while a few kB of gzip can claim gigabytes."""
MAX_HEADER_BYTES = 32 * 2880
"""Of a stamp's FITS header, 1,152 cards: ZTF's have 7, LSST's 24, whole exposures of other surveys some hundreds."""

_GZIP = b"\x1f\x8b"
_GZIP_SIZE_BYTES = 4
"""A gzip file ends with its inflated size (RFC 1952, section 2.3.1), modulo 2^32."""
_CARD = 80
_BLOCK = 2880
_END = b"END".ljust(_CARD)
_MANDATORY = (b"SIMPLE", b"BITPIX", b"NAXIS", b"NAXIS1", b"NAXIS2")
"""The first cards of a two-dimensional image; FITS fixes their order (FITS standard 4.0, section 4.4.1.1)."""
_SCALING = (b"BSCALE", b"BZERO", b"BLANK")
_NUMBER_TYPES = {b"8": ">u1", b"16": ">i2", b"32": ">i4", b"64": ">i8", b"-32": ">f4", b"-64": ">f8"}
"""By BITPIX."""
_LENGTH = re.compile(rb"[0-9]{1,9}")
_REAL = re.compile(rb"[+-]?(?:\d+\.?\d*|\.\d+)(?:[ED][+-]?\d+)?")
_INTEGER = re.compile(rb"[+-]?\d{1,19}")
_KNOWN_HEADERS = 128
"""Headers whose reading is remembered; a survey's differ by the shape of the image."""


class StampError(Exception):
    """A cutout that cannot be used. `reason`: MISSING_CUTOUT, BAD_CUTOUT or BLANK_CUTOUT; `detail`: what is wrong."""

    def __init__(self, reason: RejectReason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class _Image(NamedTuple):
    """What a header says of the primary image. `start`: the first byte of its pixels. `blank`: what stands for NaN."""

    height: int
    width: int
    start: int
    dtype: np.dtype[np.generic]
    scale: float
    zero: float
    blank: int | None

    def values(self, pixels: NDArray[np.generic]) -> NDArray[np.generic]:
        """The physical values of stored pixels (FITS standard 4.0, section 4.4.2.5), in the precision of astropy."""
        if self.scale == 1 and self.zero == 0 and self.blank is None:
            return pixels
        is_float = self.dtype.kind == "f"
        precise = self.dtype.itemsize == 8 or (self.dtype.itemsize == 4 and not is_float)
        values: NDArray[np.floating[Any]] = pixels.astype(np.float64 if precise else np.float32)
        with np.errstate(all="ignore"):  # nonsense in a header becomes inf or NaN
            values *= self.scale
            values += self.zero
        if self.blank is not None:
            values[pixels == self.blank] = np.nan
        return values


def decode_stamps(
    bodies: list[memoryview],
    spans: NDArray[np.int64],
    centred: NDArray[np.bool_],
    slots: NDArray[np.float32],
    boxes: NDArray[np.int16],
) -> dict[int, tuple[int, StampError]]:
    """Decodes the stamps of N records as `decode_stamp` does, into `slots` [N, 3, S, S] and `boxes` [N, 3, 4].

    Stamp c of record i is `bodies[i]` from `spans[i, c, 0]` to `spans[i, c, 1]`, both negative where there is none;
    `centred` [N]. Returns the records that have one which cannot be used: which, and why.
    """
    taken = np.zeros(spans.shape[:2], np.bool_)
    if compiled.decode_stamps is not None:
        compiled.decode_stamps(bodies, spans, centred, slots, boxes, taken)
    failed: dict[int, tuple[int, StampError]] = {}
    for i, c in np.argwhere(~taken).tolist():
        begin, end = spans[i, c].tolist()
        try:
            boxes[i, c] = decode_stamp(bodies[i][begin:end], slots[i, c], centred=bool(centred[i]))
        except StampError as error:
            failed.setdefault(i, (c, error))
    return failed


def decode_stamp(data: bytes | memoryview, out: NDArray[np.float32], *, centred: bool) -> tuple[int, int, int, int]:
    """Writes the pixels into `out`, a float32[S, S] slot, and zeros around them; returns their box in it, (y0, x0,
    height, width). After a StampError the slot holds anything.

    Along each axis of n pixels: if n > S, or if `centred`, pixel n // 2 of the stamp falls on pixel S // 2 of the slot,
    and what falls outside is cut off; otherwise the stamp begins at the slot's first pixel. NaN, infinite and FLT_MAX
    pixels stay as they are.

    Raises `StampError`: MISSING_CUTOUT for no bytes; BAD_CUTOUT for bytes that do not inflate, are no FITS image of two
    dimensions, end before it does, or exceed MAX_STAMP_BYTES or MAX_HEADER_BYTES; BLANK_CUTOUT where no pixel in the
    slot is finite.
    """
    fits = _inflate(data)
    image = _read_header(_header_of(fits))
    n_pixels = image.height * image.width
    if image.start + n_pixels * image.dtype.itemsize > len(fits):
        raise StampError(
            RejectReason.BAD_CUTOUT, f"{len(fits)} bytes end before the {image.height} x {image.width} image does"
        )
    pixels = np.frombuffer(fits, image.dtype, n_pixels, image.start).reshape(image.height, image.width)
    y0, top, height = _place(image.height, out.shape[0], centred)
    x0, left, width = _place(image.width, out.shape[1], centred)
    kept = image.values(pixels[top : top + height, left : left + width])
    out[:] = 0
    with np.errstate(over="ignore"):  # a float64 beyond float32 is infinite
        out[y0 : y0 + height, x0 : x0 + width] = kept
    if not np.isfinite(out[y0 : y0 + height, x0 : x0 + width]).any():
        raise StampError(RejectReason.BLANK_CUTOUT, f"none of the {height} x {width} pixels is finite")
    return y0, x0, height, width


def inflated_bytes(stamp: bytes | memoryview) -> int:
    """How many bytes reading a stamp inflates at most; costs no time that depends on them."""
    if stamp[: len(_GZIP)] != _GZIP:
        return len(stamp)
    return sum(size for _, size in _gzip_sizes(stamp) if size <= MAX_STAMP_BYTES)


def _inflate(data: bytes | memoryview) -> bytes | bytearray | memoryview:
    """The FITS file of a stamp."""
    if not data:
        raise StampError(RejectReason.MISSING_CUTOUT, "absent or empty")
    if data[: len(_GZIP)] != _GZIP:
        return data
    sizes = _gzip_sizes(data)
    for end, size in sizes:
        if 0 < size <= MAX_STAMP_BYTES:
            try:
                fits: bytearray = deflate.gzip_decompress(
                    data[:end], size
                )  # checks the size, and writes no byte beyond
            except deflate.DeflateError:
                continue
            return fits
    claimed = sizes[0][1]
    if claimed > MAX_STAMP_BYTES:
        raise StampError(RejectReason.BAD_CUTOUT, f"claims to inflate to {claimed} bytes, more than {MAX_STAMP_BYTES}")
    raise StampError(RejectReason.BAD_CUTOUT, "does not inflate")


def _gzip_sizes(gzip: bytes | memoryview) -> list[tuple[int, int]]:
    """Where a gzip file may end, and the inflated size that it claims then; the first is at the end of the bytes.

    Some writers fill stamps up with zeros: as far as the bytes end with those, the file may end earlier, wherever the
    size is that of a FITS file, which consists of whole blocks.
    """
    last = len(gzip)
    content = len(bytes(gzip).rstrip(b"\0"))
    ends = [last, *(end for end in range(content, min(content + _GZIP_SIZE_BYTES, last)))]
    sizes = [(end, int.from_bytes(gzip[max(0, end - _GZIP_SIZE_BYTES) : end], "little")) for end in ends]
    return [sizes[0], *((end, size) for end, size in sizes[1:] if size and size % _BLOCK == 0)]


def _header_of(fits: bytes | bytearray | memoryview) -> bytes:
    """The header's cards without the last, END."""
    header = bytes(memoryview(fits)[:MAX_HEADER_BYTES])
    if not header.startswith(_MANDATORY[0]):
        raise StampError(RejectReason.BAD_CUTOUT, "not a FITS file")
    end = header.find(_END)
    while end % _CARD and end >= 0:  # within a card
        end = header.find(_END, end + 1)
    if end < 0:
        raise StampError(RejectReason.BAD_CUTOUT, f"no end of the FITS header within {len(header)} bytes")
    return header[:end]


@lru_cache(maxsize=_KNOWN_HEADERS)
def _read_header(header: bytes) -> _Image:
    """What a header, given without its END, says of the primary image; raises StampError for any but a plain one."""
    cards = [header[start : start + _CARD] for start in range(0, len(header), _CARD)]
    values = {}
    for keyword, card in zip(_MANDATORY, cards, strict=False):
        if card[:9] == keyword.ljust(8) + b"=":
            values[keyword] = _value(card)
    dtype = _NUMBER_TYPES.get(values.get(b"BITPIX", b""))
    width, height = (values.get(axis, b"") for axis in (b"NAXIS1", b"NAXIS2"))
    if not (
        values.get(b"SIMPLE") == b"T"
        and values.get(b"NAXIS") == b"2"
        and dtype
        and _LENGTH.fullmatch(width)
        and _LENGTH.fullmatch(height)
        and int(width)
        and int(height)
    ):
        raise StampError(RejectReason.BAD_CUTOUT, "not a FITS image of two dimensions")
    scaling: dict[bytes, bytes] = {}
    for card in cards[len(_MANDATORY) :]:
        if card.startswith(_SCALING) and (keyword := card[:8].rstrip()) in _SCALING:
            scaling.setdefault(keyword, _value(card) if card[8:10] == b"= " else b"")
    blank = scaling.pop(b"BLANK", None) if dtype[1] != "f" else None
    if not all(_REAL.fullmatch(value) for value in scaling.values()) or not (
        blank is None or _INTEGER.fullmatch(blank)
    ):
        raise StampError(RejectReason.BAD_CUTOUT, "BSCALE, BZERO or BLANK of the FITS header is no number")
    scale, zero = (
        float(scaling.get(keyword, default).replace(b"D", b"E"))
        for keyword, default in ((b"BSCALE", b"1"), (b"BZERO", b"0"))
    )
    start = math.ceil((len(header) + _CARD) / _BLOCK) * _BLOCK
    return _Image(int(height), int(width), start, np.dtype(dtype), scale, zero, None if blank is None else int(blank))


def _value(card: bytes) -> bytes:
    """What stands between the `=` of a card and its comment."""
    return card[9:].partition(b"/")[0].strip()


def _place(length: int, slot: int, centred: bool) -> tuple[int, int, int]:
    """Along one axis: the first pixel in the slot, the first pixel of the stamp to keep, and how many."""
    middle = slot // 2 - length // 2
    if length > slot:
        return 0, -middle, slot
    return (middle if centred else 0), 0, length
