"""Decodes FITS stamps, gzip-compressed (ZTF) or plain (LSST), into pixels, bit for bit as published.

It reads the primary image, two-dimensional and of any FITS number type, with the same results as astropy (the tests
compare them), and on request the variance plane and the PSF image in the extensions of LSST's stamps. It must never
trust a size that the bytes claim, never change a pixel, and raise only `StampError`; a damaged extension is not an
error. The time is proportional to the size of the decompressed stamp: headers and the number of extensions are bounded,
and FITS features beyond plain images are not interpreted.
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
from broker_filter.packets.batch import PLANES
from broker_filter.packets.rejects import RejectReason

MAX_STAMP_BYTES = 4 * 2**20
"""The maximum size of a decompressed stamp. ZTF's stamps have 20 kB, LSST's up to 150 kB; a few kB of gzip can claim
gigabytes."""
MAX_HEADER_BYTES = 32 * 2880
"""The maximum size of a FITS header, 1,152 cards. Stamps of ZTF have 7 cards, of LSST 24, whole exposures hundreds."""

_GZIP = b"\x1f\x8b"
_GZIP_SIZE_BYTES = 4
"""The length of the last field of a gzip file: the decompressed size modulo 2^32 (RFC 1952, section 2.3.1)."""
_CARD = 80
_BLOCK = 2880
_END = b"END".ljust(_CARD)
_DAMAGED_END = re.compile(rb"END[^A-Z0-9_-]")
"""The start of a card with the keyword END that is not `_END`."""
_PRIMARY, _EXTENSION = b"SIMPLE", b"XTENSION"
"""The keyword of the first card of a primary header, and of an extension's header."""
_MANDATORY = (b"BITPIX", b"NAXIS", b"NAXIS1", b"NAXIS2")
"""The next cards of a two-dimensional image, in their mandatory order (FITS standard 4.0, section 4.4.1.1)."""
_DESCRIBING = (b"PCOUNT", b"EXTNAME", b"UTYPE")
"""The cards of an extension that say what it is."""
MAX_EXTENSIONS = 4
"""The maximum number of extensions that are searched. LSST's stamps have 2; a mask would be a third."""
_VARIANCE_NAME, _PSF_NAME = b"'UNCERT'", b"'PSFIMAGE'"
_VARIANCE_TYPE = b"'VarianceUncertainty'"
"""The value of UTYPE that tells a variance from a standard deviation (astropy.nddata.CCDData)."""
_SCALING = (b"BSCALE", b"BZERO", b"BLANK")
_NUMBER_TYPES = {b"8": ">u1", b"16": ">i2", b"32": ">i4", b"64": ">i8", b"-32": ">f4", b"-64": ">f8"}
"""The NumPy type of the pixels for each value of BITPIX."""
_LENGTH = re.compile(rb"[0-9]{1,9}")
_TRAILING_SPACES = re.compile(rb" +'$")
_REAL = re.compile(rb"[+-]?(?:\d+\.?\d*|\.\d+)(?:[ED][+-]?\d+)?")
_INTEGER = re.compile(rb"[+-]?\d{1,19}")
_UNDECIDED, _ABSENT, _USABLE = 2, 0, 1
"""The states of a plane: left to Python by the compiled code, absent or unusable, and usable. `_stamps.c` has the same
numbers; `decode_planes` returns the last two."""
_KNOWN_HEADERS = 128
"""The number of parsed headers in the cache. The headers of one survey differ only in the shape of the image."""


class StampError(Exception):
    """A cutout cannot be used. `reason`: MISSING_CUTOUT, BAD_CUTOUT or BLANK_CUTOUT. `detail`: what is wrong."""

    def __init__(self, reason: RejectReason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class PlaneSlots(NamedTuple):
    """The slots for the planes of N records, and whether each plane could be used.

    `variance` float32[N, 3, S, S] and `psf` float32[N, 3, P, P]: None for a plane that is not wanted. `usable` bool[N,
    3, 2]: in the order of PLANES; False for a plane that is not wanted.
    """

    variance: NDArray[np.float32] | None
    psf: NDArray[np.float32] | None
    usable: NDArray[np.bool_]

    def select(self, rows: list[int]) -> PlaneSlots:
        """Return the slots of the records `rows`."""
        variance, psf = (None if slots is None else slots[rows] for slots in (self.variance, self.psf))
        return PlaneSlots(variance, psf, self.usable[rows])


class _Image(NamedTuple):
    """The description of an image in a FITS header.

    `height`, `width`: the shape in pixels. `start`: the offset of the first pixel in bytes from the start of the
    header. `dtype`: the stored number type. `scale`, `zero`: BSCALE and BZERO. `blank`: the stored value that means
    NaN; None if there is none. `name`, `kind`: EXTNAME and UTYPE in quotes; empty if there is none.
    """

    height: int
    width: int
    start: int
    dtype: np.dtype[np.generic]
    scale: float
    zero: float
    blank: int | None
    name: bytes
    kind: bytes

    @property
    def n_bytes(self) -> int:
        """The size of the header and the pixels."""
        return self.start + self.height * self.width * self.dtype.itemsize

    def values(self, pixels: NDArray[np.generic]) -> NDArray[np.generic]:
        """Return the physical values of stored pixels (FITS standard 4.0, section 4.4.2.5).

        The dtype is the one that astropy returns.
        """
        if self.scale == 1 and self.zero == 0 and self.blank is None:
            return pixels
        is_float = self.dtype.kind == "f"
        precise = self.dtype.itemsize == 8 or (self.dtype.itemsize == 4 and not is_float)
        values: NDArray[np.floating[Any]] = pixels.astype(np.float64 if precise else np.float32)
        with np.errstate(all="ignore"):  # an impossible BSCALE or BZERO gives inf or NaN
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
    planes: PlaneSlots | None = None,
) -> dict[int, tuple[int, StampError]]:
    """Decode the three stamps of each of N records, as `decode_stamp` and `decode_planes` do.

    `spans` int64[N, 3, 2]: stamp c of record i is `bodies[i][spans[i, c, 0]:spans[i, c, 1]]`; both are negative if the
    record has no such stamp. `centred` bool[N]: see `decode_stamp`. Outputs: the pixels in `slots` float32[N, 3, S, S]
    and the boxes (y0, x0, height, width) in `boxes` int16[N, 3, 4]; the planes in `planes`, if they are wanted.

    Returns, by record, the number of the first unusable stamp and its error. The slots of these records are undefined.
    """
    taken = np.zeros(spans.shape[:2], np.bool_)
    states = np.full((*spans.shape[:2], len(PLANES)), _UNDECIDED, np.uint8)
    variance, psf = (planes.variance, planes.psf) if planes else (None, None)
    if compiled.decode_stamps is not None:
        compiled.decode_stamps(bodies, spans, centred, slots, boxes, taken, variance, psf, states)
    undecided = (states == _UNDECIDED).any(axis=2) & (planes is not None)
    failed: dict[int, tuple[int, StampError]] = {}
    for i, c in np.argwhere(~taken | undecided).tolist():
        begin, end = spans[i, c].tolist()
        stamp, is_centred = bodies[i][begin:end], bool(centred[i])
        try:
            if not taken[i, c]:
                boxes[i, c] = decode_stamp(stamp, slots[i, c], centred=is_centred)
            if undecided[i, c] and i not in failed:
                states[i, c] = decode_planes(
                    stamp,
                    None if variance is None else variance[i, c],
                    None if psf is None else psf[i, c],
                    centred=is_centred,
                )
        except StampError as error:
            failed.setdefault(i, (c, error))
    if planes:
        np.equal(states, _USABLE, out=planes.usable)
    return failed


def decode_stamp(data: bytes | memoryview, out: NDArray[np.float32], *, centred: bool) -> tuple[int, int, int, int]:
    """Write the pixels of a stamp into the slot `out`, float32[S, S], with zeros around them.

    Returns the box of the pixels within the slot, (y0, x0, height, width). Along each axis of n pixels: if n > S, or if
    `centred`, pixel n // 2 of the stamp is placed at pixel S // 2 of the slot, and pixels outside the slot are cut off;
    otherwise the first pixel of the stamp is placed at the first pixel of the slot. NaN, infinite and FLT_MAX pixels
    are not changed.

    Raises StampError, and then leaves the slot undefined: MISSING_CUTOUT if there are no bytes; BAD_CUTOUT if the bytes
    cannot be decompressed, are not a two-dimensional FITS image, end before the image does, or exceed MAX_STAMP_BYTES
    or MAX_HEADER_BYTES; BLANK_CUTOUT if no pixel in the slot is finite.
    """
    fits = _inflate(data)
    box = _place_image(fits, _read_header(_header_at(fits, 0, _PRIMARY)), out, centred)
    pixels = _boxed(out, box)
    if not np.isfinite(pixels).any():
        raise StampError(RejectReason.BLANK_CUTOUT, f"none of the {box[2]} x {box[3]} pixels is finite")
    return box


def decode_planes(
    data: bytes | memoryview,
    variance: NDArray[np.float32] | None,
    psf: NDArray[np.float32] | None,
    *,
    centred: bool,
) -> tuple[bool, bool]:
    """Write the variance plane and the PSF image of a stamp into their slots, with zeros around them.

    `variance` float32[S, S]: the plane is placed as the pixels of the stamp are (see `decode_stamp`). `psf` float32[P,
    P]: pixel n // 2 along each axis of n pixels is placed at pixel P // 2, and pixels outside the slot are cut off.
    None for a plane that is not wanted. Values are bit for bit as published.

    Returns whether each of the two planes is usable; the slot of a plane that is not is NaN. The variance plane is the
    extension UNCERT, of the type VarianceUncertainty and of the shape of the image, with a positive finite value in the
    slot. The PSF image is the extension PSFIMAGE, with only finite values in the slot, one of them positive. The search
    ends after MAX_EXTENSIONS extensions, or at the first one that is not a complete two-dimensional image.

    Raises StampError if `decode_stamp` cannot read the header of the stamp itself.
    """
    fits = _inflate(data)
    image = _read_header(_header_at(fits, 0, _PRIMARY))
    found = _extensions(fits, image)
    usable = []
    for slot, name in ((variance, _VARIANCE_NAME), (psf, _PSF_NAME)):
        good = False
        if slot is not None and name in found:
            start, plane = found[name]
            if slot is psf:
                values = _boxed(slot, _place_image(fits[start:], plane, slot, True))
                good = bool(np.isfinite(values).all() and (values > 0).any())
            elif plane.kind == _VARIANCE_TYPE and (plane.height, plane.width) == (image.height, image.width):
                values = _boxed(slot, _place_image(fits[start:], plane, slot, centred))
                good = bool((np.isfinite(values) & (values > 0)).any())
        if slot is not None and not good:
            slot[:] = np.nan
        usable.append(good)
    return usable[0], usable[1]


def inflated_bytes(stamp: bytes | memoryview) -> int:
    """Return the maximum number of bytes to which reading a stamp decompresses it, found without decompressing it."""
    if stamp[: len(_GZIP)] != _GZIP:
        return len(stamp)
    return sum(size for _, size in _gzip_sizes(stamp) if size <= MAX_STAMP_BYTES)


def _inflate(data: bytes | memoryview) -> memoryview:
    """Return the FITS file of a stamp, decompressed if it is gzip-compressed. Raises StampError."""
    if not data:
        raise StampError(RejectReason.MISSING_CUTOUT, "the stamp is absent or empty")
    if data[: len(_GZIP)] != _GZIP:
        return memoryview(data)
    sizes = _gzip_sizes(data)
    for end, size in sizes:
        if 0 < size <= MAX_STAMP_BYTES:
            try:
                # gzip_decompress fails if the real size differs from `size`, and never writes beyond it.
                fits: bytearray = deflate.gzip_decompress(data[:end], size)
            except deflate.DeflateError:
                continue
            return memoryview(fits)
    claimed = sizes[0][1]
    if claimed > MAX_STAMP_BYTES:
        raise StampError(
            RejectReason.BAD_CUTOUT, f"the stamp claims to decompress to {claimed} bytes, more than {MAX_STAMP_BYTES}"
        )
    raise StampError(RejectReason.BAD_CUTOUT, "the stamp cannot be decompressed")


def _gzip_sizes(gzip: bytes | memoryview) -> list[tuple[int, int]]:
    """Return the possible ends of a gzip file, each with the decompressed size that the file claims there.

    The first of them is the end of the bytes. Some writers pad stamps with zeros. If the bytes end with zeros, the file
    may also end earlier, at each position for which the claimed size is a multiple of a FITS block.
    """
    last = len(gzip)
    content = len(bytes(gzip).rstrip(b"\0"))
    ends = [last, *(end for end in range(content, min(content + _GZIP_SIZE_BYTES, last)))]
    sizes = [(end, int.from_bytes(gzip[max(0, end - _GZIP_SIZE_BYTES) : end], "little")) for end in ends]
    return [sizes[0], *((end, size) for end, size in sizes[1:] if size and size % _BLOCK == 0)]


def _extensions(fits: memoryview, image: _Image) -> dict[bytes, tuple[int, _Image]]:
    """Return the first extensions of a FITS file by name, with the offsets of their headers; see `decode_planes`."""
    found: dict[bytes, tuple[int, _Image]] = {}
    start = 0
    for _ in range(MAX_EXTENSIONS):
        start += math.ceil(image.n_bytes / _BLOCK) * _BLOCK
        try:
            image = _read_header(_header_at(fits, start, _EXTENSION))
        except StampError:
            break
        if start + image.n_bytes > len(fits):
            break
        found.setdefault(image.name, (start, image))
    return found


def _place_image(fits: memoryview, image: _Image, out: NDArray[np.float32], centred: bool) -> tuple[int, int, int, int]:
    """Write the pixels of an image into a slot, with zeros around them, and return their box.

    `fits`: bytes that begin with the header of the image. Raises StampError if the bytes end before the image does.
    """
    if image.n_bytes > len(fits):
        raise StampError(
            RejectReason.BAD_CUTOUT,
            f"the stamp has only {len(fits)} bytes, too few for an image of {image.height} x {image.width} pixels",
        )
    pixels = np.frombuffer(fits, image.dtype, image.height * image.width, image.start)
    y0, top, height = _place(image.height, out.shape[0], centred)
    x0, left, width = _place(image.width, out.shape[1], centred)
    box = y0, x0, height, width
    out[:] = 0
    # A float64 value beyond the range of float32 becomes infinite; a signalling NaN becomes a quiet one.
    with np.errstate(over="ignore", invalid="ignore"):
        _boxed(out, box)[:] = image.values(
            pixels.reshape(image.height, image.width)[top : top + height, left : left + width]
        )
    return box


def _boxed(slot: NDArray[np.float32], box: tuple[int, int, int, int]) -> NDArray[np.float32]:
    """Return a view of the pixels of a slot within a box."""
    y0, x0, height, width = box
    return slot[y0 : y0 + height, x0 : x0 + width]


def _header_at(fits: memoryview, start: int, keyword: bytes) -> bytes:
    """Return the cards of the FITS header at `start`, without the END card.

    Raises StampError if the header does not begin with `keyword`.
    """
    header = bytes(fits[start : start + MAX_HEADER_BYTES])
    if not header.startswith(keyword):
        raise StampError(RejectReason.BAD_CUTOUT, "the stamp is not a FITS file")
    end = header.find(_END)
    while end % _CARD and end >= 0:  # found within another card
        end = header.find(_END, end + 1)
    if end < 0:
        raise StampError(RejectReason.BAD_CUTOUT, f"the FITS header has no END within {len(header)} bytes")
    return header[:end]


@lru_cache(maxsize=_KNOWN_HEADERS)
def _read_header(header: bytes) -> _Image:
    """Parse a FITS header, given without END, of a primary image or an extension.

    Raises StampError if it is not that of a plain two-dimensional image.
    """
    cards = [header[start : start + _CARD] for start in range(0, len(header), _CARD)]
    values = {}
    for keyword, card in zip(_MANDATORY, cards[1:], strict=False):
        if card[:9] == keyword.ljust(8) + b"=":
            values[keyword] = _value(card)
    dtype = _NUMBER_TYPES.get(values.get(b"BITPIX", b""))
    width, height = (values.get(axis, b"") for axis in (b"NAXIS1", b"NAXIS2"))
    others: dict[bytes, bytes] = {}
    for card in cards[1 + len(_MANDATORY) :]:
        if _DAMAGED_END.match(card):  # what follows is pixels, and perhaps another header
            raise StampError(RejectReason.BAD_CUTOUT, "the END card of the FITS header is damaged")
        if card.startswith(_SCALING + _DESCRIBING) and (keyword := card[:8].rstrip()) in _SCALING + _DESCRIBING:
            others.setdefault(keyword, _value(card) if card[8:10] == b"= " else b"")
    first = cards[0][:9], _text(_value(cards[0]))
    if not (
        (first == (b"SIMPLE  =", b"T") or (first == (b"XTENSION=", b"'IMAGE'") and others.get(b"PCOUNT", b"0") == b"0"))
        and values.get(b"NAXIS") == b"2"
        and dtype
        and _LENGTH.fullmatch(width)
        and _LENGTH.fullmatch(height)
        and int(width)
        and int(height)
    ):
        raise StampError(RejectReason.BAD_CUTOUT, "the stamp is not a two-dimensional FITS image")
    scaling = {keyword: value for keyword, value in others.items() if keyword in _SCALING}
    blank = scaling.pop(b"BLANK", None)
    if dtype[1] == "f":  # BLANK has no meaning for floating-point pixels
        blank = None
    if not all(_REAL.fullmatch(value) for value in scaling.values()) or not (
        blank is None or _INTEGER.fullmatch(blank)
    ):
        raise StampError(RejectReason.BAD_CUTOUT, "BSCALE, BZERO or BLANK in the FITS header is not a number")
    scale, zero = (
        float(scaling.get(keyword, default).replace(b"D", b"E"))
        for keyword, default in ((b"BSCALE", b"1"), (b"BZERO", b"0"))
    )
    return _Image(
        height=int(height),
        width=int(width),
        start=math.ceil((len(header) + _CARD) / _BLOCK) * _BLOCK,
        dtype=np.dtype(dtype),
        scale=scale,
        zero=zero,
        blank=None if blank is None else int(blank),
        name=_text(others.get(b"EXTNAME", b"")),
        kind=_text(others.get(b"UTYPE", b"")),
    )


def _text(value: bytes) -> bytes:
    """Return the value of a FITS card without the spaces at the end of a string, which have no meaning."""
    return _TRAILING_SPACES.sub(b"'", value)


def _value(card: bytes) -> bytes:
    """Return the value of a FITS card: the bytes between its `=` and its comment."""
    return card[9:].partition(b"/")[0].strip()


def _place(length: int, slot: int, centred: bool) -> tuple[int, int, int]:
    """Return the placement of a stamp in a slot along one axis.

    The placement is the first pixel in the slot, the first pixel of the stamp, and the number of pixels.
    """
    middle = slot // 2 - length // 2
    if length > slot:
        return 0, -middle, slot
    return (middle if centred else 0), 0, length
