"""FITS stamps into pixels: gzip-ed (ZTF) or plain (LSST), the primary image, bit for bit as published.

The layouts that surveys publish are read directly; any other FITS image goes through astropy, the reference for both.
Never trusts a size that the bytes claim, never alters a pixel, and raises nothing but `StampError`.
"""

from __future__ import annotations

import math
import threading
import warnings
from functools import lru_cache
from io import BytesIO

import deflate
import numpy as np
from numpy.typing import NDArray

from broker_filter.packets import compiled
from broker_filter.packets.rejects import RejectReason

MAX_STAMP_BYTES = 4 * 2**20
"""Of an inflated stamp: ZTF's are 20 kB, LSST's up to 150 kB, while a few kB of gzip can claim gigabytes."""

_GZIP = b"\x1f\x8b"
_FITS = b"SIMPLE"
_CARD = 80
_BLOCK = 2880
_END = b"END".ljust(_CARD)
_MANDATORY = 5 * _CARD
"""SIMPLE, BITPIX, NAXIS, NAXIS1, NAXIS2: FITS fixes their order (FITS standard 4.0, section 4.4.1.1)."""
_MAX_HEADER = 4 * _BLOCK
"""Longer headers go through astropy. ZTF's have 7 cards, LSST's 24; a block holds 36."""

_astropy_lock = threading.Lock()


class StampError(Exception):
    """A cutout that cannot be used. `reason`: MISSING_CUTOUT, BAD_CUTOUT or BLANK_CUTOUT; `detail`: what is wrong."""

    def __init__(self, reason: RejectReason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


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
    dimensions, end before it does, or exceed MAX_STAMP_BYTES; BLANK_CUTOUT where no pixel in the slot is finite.
    """
    image = _read_fits(_inflate(data))
    y0, top, height = _place(image.shape[0], out.shape[0], centred)
    x0, left, width = _place(image.shape[1], out.shape[1], centred)
    kept = image[top : top + height, left : left + width]
    if not np.isfinite(kept).any():
        raise StampError(RejectReason.BLANK_CUTOUT, f"none of the {height} x {width} pixels is finite")
    out[:] = 0
    out[y0 : y0 + height, x0 : x0 + width] = kept
    return y0, x0, height, width


def _inflate(data: bytes | memoryview) -> bytes | bytearray | memoryview:
    """The FITS file of a stamp."""
    if not data:
        raise StampError(RejectReason.MISSING_CUTOUT, "absent or empty")
    if data[:2] != _GZIP:
        return data
    size = int.from_bytes(data[-4:], "little")  # gzip's trailer: libdeflate checks it, and writes no byte beyond it
    if size > MAX_STAMP_BYTES:
        raise StampError(RejectReason.BAD_CUTOUT, f"claims to inflate to {size} bytes, more than {MAX_STAMP_BYTES}")
    try:
        fits: bytearray = deflate.gzip_decompress(data, size)
    except deflate.DeflateError as error:
        raise StampError(RejectReason.BAD_CUTOUT, "does not inflate") from error
    return fits


def _read_fits(fits: bytes | bytearray | memoryview) -> NDArray[np.float32]:
    """The primary image whole, float32[height, width] in either byte order, perhaps a read-only view into `fits`."""
    if fits[: len(_FITS)] != _FITS:
        raise StampError(RejectReason.BAD_CUTOUT, "not a FITS file")
    header = bytes(memoryview(fits)[:_MAX_HEADER])
    layout = _float32_layout(header[: header.find(_END, _MANDATORY) + _CARD])
    if layout is None:
        return _read_with_astropy(fits)
    height, width, start = layout
    if start + 4 * height * width > len(fits):
        raise StampError(RejectReason.BAD_CUTOUT, f"{len(fits)} bytes end before the {height} x {width} image does")
    return np.frombuffer(fits, ">f4", height * width, start).reshape(height, width)


@lru_cache(maxsize=1024)
def _float32_layout(header: bytes) -> tuple[int, int, int] | None:
    """(height, width, first byte of the pixels) by a header up to its END; None for any but a plain float32 image."""
    # A header without END is cut within a card. BSCALE and BZERO may stand anywhere; astropy applies them.
    if len(header) % _CARD or b"BSCALE" in header or b"BZERO" in header:
        return None
    values = {}
    for start in range(0, _MANDATORY, _CARD):
        keyword, _, value = header[start : start + _CARD].partition(b"=")
        values[keyword.rstrip()] = value.partition(b"/")[0].strip()
    if [values.get(key) for key in (b"SIMPLE", b"BITPIX", b"NAXIS")] != [b"T", b"-32", b"2"]:
        return None
    width, height = values.get(b"NAXIS1", b""), values.get(b"NAXIS2", b"")
    if not (width.isdigit() and height.isdigit() and int(width) and int(height)):
        return None
    return int(height), int(width), math.ceil(len(header) / _BLOCK) * _BLOCK


def _read_with_astropy(fits: bytes | bytearray | memoryview) -> NDArray[np.float32]:
    # Imported here because it takes a third of a second and is rarely needed.
    from astropy.io import fits as astropy_fits

    # The lock is for catch_warnings, which is not thread-safe.
    with _astropy_lock, warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        try:
            with astropy_fits.open(BytesIO(fits), memmap=False) as hdus:
                shape = [int(hdus[0].header[f"NAXIS{axis + 1}"]) for axis in range(int(hdus[0].header["NAXIS"]))]
                if len(shape) != 2 or not 0 < math.prod(shape) <= len(fits):
                    raise ValueError(f"an image of shape {shape}")
                return np.asarray(hdus[0].data).astype(np.float32)
        except Exception as error:  # astropy raises errors of many kinds, by what exactly is damaged
            raise StampError(RejectReason.BAD_CUTOUT, f"not a two-dimensional FITS image: {error}") from error


def _place(length: int, slot: int, centred: bool) -> tuple[int, int, int]:
    """Along one axis: the first pixel in the slot, the first pixel of the stamp to keep, and how many."""
    middle = slot // 2 - length // 2
    if length > slot:
        return 0, -middle, slot
    return (middle if centred else 0), 0, length
