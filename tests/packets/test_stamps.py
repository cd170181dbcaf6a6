"""Stamps are read bit for bit as by astropy and placed as documented; all other bytes raise StampError."""

from __future__ import annotations

import gzip
import io
import struct
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fastavro
import numpy as np
import pytest
from astropy.io import fits
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from broker_filter.packets import compiled, stamps
from broker_filter.packets.batch import PSF_SIZE
from broker_filter.packets.rejects import RejectReason
from broker_filter.packets.stamps import (
    MAX_EXTENSIONS,
    MAX_STAMP_BYTES,
    PlaneSlots,
    StampError,
    decode_planes,
    decode_stamp,
    decode_stamps,
    inflated_bytes,
)

FLT_MAX = np.finfo(np.float32).max
LARGE = 200
"""The side of a slot in pixels; no stamp of these tests is larger."""
CUTOUT_FIELDS = ("cutoutScience", "cutoutTemplate", "cutoutDifference")


def fits_bytes(image: NDArray[np.generic], **cards: object) -> bytes:
    hdu = fits.PrimaryHDU(image)
    hdu.header.update(cards)
    buffer = io.BytesIO()
    hdu.writeto(buffer)
    return buffer.getvalue()


def fits_bytes_of(*hdus: object) -> bytes:
    buffer = io.BytesIO()
    fits.HDUList(list(hdus)).writeto(buffer)
    return buffer.getvalue()


def astropy_image(stamp: bytes) -> NDArray[np.float32]:
    plain = gzip.decompress(stamp) if stamp[:2] == b"\x1f\x8b" else stamp
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with fits.open(io.BytesIO(plain), memmap=False) as hdus:
            return hdus[0].data.astype(np.float32)


def pixels(stamp: bytes | memoryview) -> NDArray[np.float32]:
    slot = np.empty((LARGE, LARGE), np.float32)
    *corner, height, width = decode_stamp(stamp, slot, centred=False)
    assert corner == [0, 0]
    return slot[:height, :width]


def bits(image: NDArray[np.float32]) -> bytes:
    return np.ascontiguousarray(image, dtype="<f4").tobytes()


def numbered(height: int, width: int) -> NDArray[np.float32]:
    return np.arange(1, height * width + 1, dtype=np.float32).reshape(height, width)


def rejection(stamp: bytes, size: int = 63) -> RejectReason:
    with pytest.raises(StampError) as caught:
        decode_stamp(stamp, np.zeros((size, size), np.float32), centred=False)
    assert caught.value.detail
    return caught.value.reason


def shared_lsst_stamps(shared_data: Path) -> Iterator[bytes]:
    for path in sorted((shared_data / "lsst/ocf").rglob("*.avro")):
        with path.open("rb") as file:
            for alert in fastavro.reader(file):
                yield from (alert[field] for field in CUTOUT_FIELDS if alert[field])


def test_pixels_of_every_shared_ztf_stamp_are_bit_identical_to_astropy(ztf_packets: list[tuple[int, bytes]]) -> None:
    stamps = 0
    for candid, packet in ztf_packets:
        for alert in fastavro.reader(io.BytesIO(packet)):
            for field in CUTOUT_FIELDS:
                stamp = alert[field]["stampData"]
                reference = astropy_image(stamp)
                slot = np.zeros((63, 63), np.float32)
                height, width = reference.shape
                assert decode_stamp(memoryview(stamp), slot, centred=False) == (0, 0, height, width)
                assert bits(slot[:height, :width]) == bits(reference), f"{field} of {candid}"
                assert not slot[height:].any()
                assert not slot[:, width:].any()
                stamps += 1
    assert stamps >= 3 * len(ztf_packets)


def test_pixels_of_every_shared_lsst_stamp_are_bit_identical_to_astropy(shared_data: Path) -> None:
    sizes = set()
    for stamp in shared_lsst_stamps(shared_data):
        reference = astropy_image(stamp)
        assert bits(pixels(memoryview(stamp))) == bits(reference)
        sizes.add(reference.shape)
    assert len(sizes) > 1


@pytest.mark.parametrize(("length", "first"), [(30, 16), (31, 16), (62, 0), (63, 0)])
def test_centred_stamp_has_its_central_pixel_at_the_centre_of_the_slot(length: int, first: int) -> None:
    slot = np.zeros((63, 63), np.float32)
    image = numbered(length, length)
    assert decode_stamp(fits_bytes(image), slot, centred=True) == (first, first, length, length)
    assert slot[31, 31] == image[length // 2, length // 2]
    assert slot.sum() == image.sum()


@pytest.mark.parametrize("size", [63, 64])
@pytest.mark.parametrize("length", [65, 102, 103])
@pytest.mark.parametrize("centred", [True, False])
def test_large_stamp_is_cropped_around_its_central_pixel(length: int, size: int, centred: bool) -> None:
    slot = np.zeros((size, size), np.float32)
    image = numbered(length, length)
    assert decode_stamp(fits_bytes(image), slot, centred=centred) == (0, 0, size, size)
    first = length // 2 - size // 2
    np.testing.assert_array_equal(slot, image[first : first + size, first : first + size])


def test_each_axis_is_placed_by_its_own_length() -> None:
    slot = np.zeros((63, 63), np.float32)
    image = numbered(20, 80)
    assert decode_stamp(fits_bytes(image), slot, centred=True) == (21, 0, 20, 63)
    np.testing.assert_array_equal(slot[21:41], image[:, 9:72])


def test_nan_infinite_and_extreme_pixels_are_unchanged() -> None:
    image = np.zeros((63, 63), np.float32)
    image[0, :4] = np.nan, np.inf, -np.inf, FLT_MAX
    image.view(np.uint32)[1, 0] = 0x7FA12345  # a signalling NaN with a payload
    image[31, 31] = np.nan
    slot = np.zeros((63, 63), np.float32)
    decode_stamp(gzip.compress(fits_bytes(image)), slot, centred=False)
    assert bits(slot) == bits(image)


def test_all_zero_stamp_is_valid() -> None:
    slot = np.zeros((63, 63), np.float32)
    assert decode_stamp(fits_bytes(np.zeros((63, 63), np.float32)), slot, centred=False) == (0, 0, 63, 63)


def test_stamp_without_a_finite_pixel_in_the_slot_is_blank() -> None:
    image = np.full((102, 102), np.nan, np.float32)
    assert rejection(gzip.compress(fits_bytes(image))) is RejectReason.BLANK_CUTOUT
    image[0, 0] = 1.0  # cut off with the margin
    assert rejection(fits_bytes(image)) is RejectReason.BLANK_CUTOUT
    image[20, 20] = 1.0
    decode_stamp(fits_bytes(image), np.zeros((63, 63), np.float32), centred=True)


@pytest.mark.parametrize(
    "stamp",
    [
        fits_bytes(numbered(63, 63).astype(np.float64)),
        fits_bytes(numbered(63, 63).astype(np.int16)),
        fits_bytes(numbered(63, 63).astype(np.uint16)),  # BZERO 32768
        fits_bytes(numbered(63, 63), BSCALE=2.0, BZERO=10.0),
        fits_bytes(numbered(63, 63).astype(np.float64), BSCALE=2.0, BZERO=-1e-3),
        fits_bytes(numbered(63, 63).astype(np.int16), BSCALE=0.1, BLANK=63),
        fits_bytes(numbered(63, 63).astype(np.int32), BZERO=1.5, BLANK=-7),
        fits_bytes(numbered(63, 63).astype(np.int64) << 40),
        fits_bytes(numbered(63, 63).astype(np.uint8), BLANK=63),
        fits_bytes(numbered(63, 63).astype(np.uint32)),
        fits_bytes(numbered(63, 63), **{f"CARD{i}": i for i in range(200)}),
        fits_bytes(numbered(63, 63), LONG="x" * 300, **{"HIERARCH a very long keyword": 1}),
    ],
    ids=[
        "float64", "int16", "uint16", "scaled", "scaled-float64", "int16-with-blanks", "int32-with-blanks", "int64",
        "bytes-with-blanks", "uint32", "long-header", "continued-cards",
    ],
)  # fmt: skip
def test_other_fits_layouts_match_astropy(stamp: bytes) -> None:
    assert bits(pixels(stamp)) == bits(astropy_image(stamp))


PLAIN = fits_bytes(numbered(63, 63))


@pytest.mark.parametrize(
    ("stamp", "reason"),
    [
        (b"", RejectReason.MISSING_CUTOUT),
        (b"not an image", RejectReason.BAD_CUTOUT),
        (b"\x1f\x8b", RejectReason.BAD_CUTOUT),
        (gzip.compress(PLAIN)[:-200], RejectReason.BAD_CUTOUT),
        (b"\x1f\x8b\x08" + bytes(50), RejectReason.BAD_CUTOUT),
        (gzip.compress(gzip.compress(PLAIN)), RejectReason.BAD_CUTOUT),
        (PLAIN[:-8000], RejectReason.BAD_CUTOUT),
        (PLAIN[:2000], RejectReason.BAD_CUTOUT),
        (fits_bytes(numbered(63, 63)[0]), RejectReason.BAD_CUTOUT),
        (fits_bytes(np.ones((2, 63, 63), np.float32)), RejectReason.BAD_CUTOUT),
        (PLAIN.replace(b"NAXIS1  =                   63", b"NAXIS1  =          99999999999"), RejectReason.BAD_CUTOUT),
        (PLAIN.replace(b"NAXIS1  =                   63", b"NAXIS1  =                    0"), RejectReason.BAD_CUTOUT),
        (gzip.compress(bytes(MAX_STAMP_BYTES + 1)), RejectReason.BAD_CUTOUT),
        (gzip.compress(PLAIN)[:-4] + struct.pack("<I", 2**32 - 1), RejectReason.BAD_CUTOUT),
    ],
    ids=[
        "empty", "text", "magic-only", "truncated-gzip", "gzip-of-nothing", "gzip-in-gzip", "truncated-image",
        "truncated-header", "one-dimension", "three-dimensions", "huge-axis", "no-pixels", "bomb", "lying-gzip-size",
    ],
)  # fmt: skip
def test_an_invalid_stamp_is_rejected_with_its_reason(stamp: bytes, reason: RejectReason) -> None:
    assert rejection(stamp) is reason


def fits_header(*cards: bytes) -> bytes:
    content = b"".join(card.ljust(80) for card in cards)
    return content.ljust(-(-len(content) // 2880) * 2880)


MANDATORY = (b"SIMPLE  = T", b"BITPIX  = -32", b"NAXIS   = 2", b"NAXIS1  = 63", b"NAXIS2  = 63")
CONTINUED = [b"LONG    = 'x&'", *[b"CONTINUE  'x&'"] * 50_000]
TABLE = fits.BinTableHDU.from_columns([fits.Column("flux", "D", array=np.arange(3.0))])


@pytest.mark.parametrize(
    "stamp",
    [
        fits_header(*MANDATORY[:2], b"NAXIS   = 1000000000", b"NAXIS1  = 63", b"NAXIS2  = 63", b"END"),
        fits_header(*MANDATORY[:3], b"NAXIS1  = 999999999", b"NAXIS2  = 999999999", b"END"),
        fits_header(*MANDATORY[:3], b"NAXIS1  = -63", b"NAXIS2  = 63", b"END"),
        fits_header(*MANDATORY[:3], b"NAXIS1  = 1", b"NAXIS2  = " + b"9" * 70, b"END"),
        fits_header(*MANDATORY, *CONTINUED, b"END") + bytes(4 * 63 * 63),
        fits_header(*MANDATORY, *[b"HIERARCH a b = 1"] * 50_000),
        fits_header(*MANDATORY, b"BSCALE  = 'one'", b"END") + bytes(4 * 63 * 63),
        fits_header(b"SIMPLE  = T", b"BITPIX  = 8", b"NAXIS   = 0", b"END") + fits_header(b"XTENSION= 'IMAGE'", b"END"),
        fits_bytes_of(fits.PrimaryHDU(), TABLE),
        fits_bytes_of(fits.PrimaryHDU(), fits.CompImageHDU(np.ones((63, 63), np.float32))),
    ],
    ids=[
        "a-billion-axes", "huge-axes", "negative-axis", "endless-number", "deep-card", "no-end", "scale-is-text",
        "image-in-an-extension", "table", "compressed-image",
    ],
)  # fmt: skip
@pytest.mark.parametrize("gzipped", [False, True])
def test_expensive_headers_are_refused_at_once(stamp: bytes, gzipped: bool) -> None:
    began = time.process_time()
    assert rejection(gzip.compress(stamp) if gzipped else stamp) is RejectReason.BAD_CUTOUT
    assert time.process_time() - began < 1  # astropy took seconds, or did not return


@pytest.mark.parametrize("zeros", [1, 2, 3, 4, 5, 2880])
@pytest.mark.parametrize("side", [5, 63, 102, 150])
def test_a_gzip_compressed_stamp_with_zero_padding_is_read(zeros: int, side: int) -> None:
    stamp = gzip.compress(fits_bytes(numbered(side, side))) + bytes(zeros)
    assert bits(pixels(stamp)) == bits(numbered(side, side))
    assert inflated_bytes(stamp) >= len(fits_bytes(numbered(side, side)))
    slots = np.empty((1, 3, 63, 63), np.float32)
    spans = np.array([[(0, len(stamp))] * 3])
    failed = decode_stamps([memoryview(stamp)], spans, np.array([True]), slots, np.empty((1, 3, 4), np.int16))
    assert not failed
    assert slots[0, 0, 31, 31] == numbered(side, side)[side // 2, side // 2]


def test_the_decompressed_size_of_a_stamp_is_known_in_advance() -> None:
    assert inflated_bytes(PLAIN) == len(PLAIN)
    assert inflated_bytes(gzip.compress(PLAIN)) == len(PLAIN)
    assert inflated_bytes(gzip.compress(bytes(MAX_STAMP_BYTES))) == MAX_STAMP_BYTES
    assert inflated_bytes(gzip.compress(bytes(MAX_STAMP_BYTES + 1))) == 0  # refused


def image_hdu(image: NDArray[np.generic] | None, name: str, **cards: object) -> fits.ImageHDU:
    hdu = fits.ImageHDU(image, name=name)
    hdu.header.update(cards)
    return hdu


def variance_hdu(variance: NDArray[np.generic], utype: str = "VarianceUncertainty") -> fits.ImageHDU:
    return image_hdu(variance, "UNCERT", UTYPE=utype)


def gaussian(height: int = 41, width: int = 41) -> NDArray[np.float64]:
    y, x = np.ogrid[:height, :width]
    profile = np.exp(-((y - height // 2) ** 2 + (x - width // 2) ** 2) / 8)
    return profile / profile.sum()


IMAGE = fits.PrimaryHDU(numbered(30, 30))
VARIANCE = variance_hdu(numbered(30, 30) / 7)
PSF = image_hdu(gaussian(), "PSFIMAGE")
LSST = fits_bytes_of(IMAGE, VARIANCE, PSF)

FUZZED = {
    "ztf": fits_bytes(numbered(63, 63), BUNIT="DN"),
    "lsst": LSST,
    "scaled": fits_bytes(numbered(20, 33).astype(np.int16), BSCALE=0.5),
}

KEPT = st.one_of(st.just(1.0), st.floats(0, 1))
EDITS = st.lists(
    st.tuples(
        st.one_of(st.integers(0, 799), st.integers(0, 25_000)), st.sampled_from(b" =-+.0123456789TFANXISBPE/'\x00\xff")
    ),
    max_size=4,
)


def damage(fits_file: bytes, kept: float, edits: list[tuple[int, int]]) -> bytearray:
    damaged = bytearray(fits_file)
    for at, value in edits:
        damaged[at % len(damaged)] = value
    del damaged[int(kept * len(damaged)) :]
    return damaged


def damage_zipped(content: bytes, edits: list[tuple[int, int]]) -> bytearray:
    damaged = bytearray(gzip.compress(content, 1))
    for at, value in edits:
        damaged[at % len(damaged)] = value
    return damaged


@settings(max_examples=400)
@given(
    stamp=st.sampled_from(sorted(FUZZED)),
    kept=KEPT,
    edits=EDITS,
    gzipped=st.booleans(),
    gzip_edits=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=2),
)
def test_damaged_stamp_matches_astropy_or_raises_stamp_error(
    stamp: str, kept: float, edits: list[tuple[int, int]], gzipped: bool, gzip_edits: list[tuple[int, int]]
) -> None:
    damaged = damage(FUZZED[stamp], kept, edits)
    if gzipped:
        damaged = damage_zipped(damaged, gzip_edits)
    try:
        image = pixels(bytes(damaged))
    except StampError:
        return
    try:
        reference = astropy_image(bytes(damaged))
    except OSError:  # astropy also refuses a damaged card that does not affect the pixels
        return
    if max(reference.shape) <= LARGE:
        assert bits(image) == bits(reference)


Box = tuple[int, int, int, int]

needs_compiled = pytest.mark.skipif(compiled.decode_stamps is None, reason="the compiled decoder is not built")


def compiled_arguments(body: bytes, span: tuple[int, int], size: int, centred: bool) -> list[Any]:
    """Return the arguments of the compiled `decode_stamps` for a record with the second stamp `body[slice(*span)]`."""
    spans = np.full((1, 3, 2), -1)
    spans[0, 1] = span
    return [
        [memoryview(body)],
        spans,
        np.array([centred]),
        np.full((1, 3, size, size), 7, np.float32),
        np.zeros((1, 3, 4), np.int16),
        np.zeros((1, 3), bool),
        np.full((1, 3, size, size), 7, np.float32),
        np.full((1, 3, PSF_SIZE, PSF_SIZE), 7, np.float32),
        np.full((1, 3, 2), stamps._UNDECIDED, np.uint8),
    ]


def decode_compiled(stamp: bytes, size: int, centred: bool) -> tuple[Box | None, NDArray[np.float32]]:
    """Return the box and the slot of a stamp from the compiled code alone; no box if it left the stamp to Python."""
    assert compiled.decode_stamps is not None
    arguments = compiled_arguments(b"before" + stamp + b"after", (6, 6 + len(stamp)), size, centred)
    compiled.decode_stamps(*arguments)
    _, _, _, slots, boxes, taken, *_, states = arguments
    assert not taken[0, 0]
    assert not taken[0, 2]
    assert (states[0, ::2] == stamps._UNDECIDED).all()
    y0, x0, height, width = boxes[0, 1].tolist()
    return ((y0, x0, height, width) if taken[0, 1] else None), slots[0, 1]


def compiled_planes(stamp: bytes, size: int, centred: bool) -> dict[str, tuple[bool, bytes]]:
    """Return whether each plane that the compiled code alone decided is usable, and the bits of its slot."""
    assert compiled.decode_stamps is not None
    arguments = compiled_arguments(stamp, (0, len(stamp)), size, centred)
    compiled.decode_stamps(*arguments)
    *_, variance, psf, states = arguments
    return {
        name: (state == stamps._USABLE, bits(slot[0, 1]))
        for name, slot, state in (("variance", variance, states[0, 1, 0]), ("psf", psf, states[0, 1, 1]))
        if state != stamps._UNDECIDED
    }


def python_planes(stamp: bytes, size: int, centred: bool) -> dict[str, tuple[bool, bytes]]:
    """Return whether each plane is usable, and the bits of its slot, from the Python code alone."""
    variance, psf = np.full((size, size), 7, np.float32), np.full((PSF_SIZE, PSF_SIZE), 7, np.float32)
    usable = decode_planes(stamp, variance, psf, centred=centred)
    return {"variance": (usable[0], bits(variance)), "psf": (usable[1], bits(psf))}


@needs_compiled
@settings(max_examples=600)
@given(
    stamp=st.sampled_from(sorted(FUZZED)),
    kept=KEPT,
    edits=EDITS,
    size=st.integers(1, 70),
    centred=st.booleans(),
    gzipped=st.booleans(),
    gzip_kept=KEPT,
    gzip_edits=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=2),
)
def test_compiled_code_never_differs_from_python(
    stamp: str,
    kept: float,
    edits: list[tuple[int, int]],
    size: int,
    centred: bool,
    gzipped: bool,
    gzip_kept: float,
    gzip_edits: list[tuple[int, int]],
) -> None:
    damaged = damage(FUZZED[stamp], kept, edits)
    if gzipped:
        damaged = damage_zipped(damaged, gzip_edits)
        del damaged[int(gzip_kept * len(damaged)) :]
    box, quick = decode_compiled(bytes(damaged), size, centred)
    if box is not None:
        slow = np.full((size, size), 7, np.float32)
        assert box == decode_stamp(bytes(damaged), slow, centred=centred)
        assert bits(quick) == bits(slow)
        planes = python_planes(bytes(damaged), size, centred)
        for name, plane in compiled_planes(bytes(damaged), size, centred).items():
            assert plane == planes[name], name


@needs_compiled
@pytest.mark.parametrize("gzipped", [True, False])
@pytest.mark.parametrize("stamp", ["ztf", "lsst"])
def test_compiled_code_decodes_the_layouts_of_surveys(stamp: str, gzipped: bool) -> None:
    data = gzip.compress(FUZZED[stamp]) if gzipped else FUZZED[stamp]
    assert decode_compiled(data, 63, True)[0] is not None


@needs_compiled
def test_compiled_code_decodes_every_shared_ztf_stamp_as_python_does(ztf_packets: list[tuple[int, bytes]]) -> None:
    for _, packet in ztf_packets:
        for alert in fastavro.reader(io.BytesIO(packet)):
            for field in CUTOUT_FIELDS:
                slot = np.empty((63, 63), np.float32)
                box = decode_stamp(alert[field]["stampData"], slot, centred=False)
                taken, quick = decode_compiled(alert[field]["stampData"], 63, False)
                assert taken == box
                assert bits(quick) == bits(slot)


@needs_compiled
@pytest.mark.parametrize(
    ("argument", "wrong"),
    [
        (1, np.zeros((1, 3, 3), np.int64)),
        (1, np.zeros((2, 3, 2), np.int64)),
        (1, np.zeros((1, 3, 2), np.int32)),
        (2, np.zeros((1, 1), bool)),
        (3, np.zeros((1, 3, 9, 8), np.float32)),
        (3, np.zeros((1, 3, 0, 0), np.float32)),
        (3, np.zeros((1, 3, 9, 9), np.float64)),
        (4, np.zeros((1, 2, 4), np.int16)),
        (5, np.zeros((1, 4), bool)),
        (6, np.zeros((1, 3, 8, 8), np.float32)),
        (6, np.zeros((1, 3, 9, 9), np.float64)),
        (7, np.zeros((1, 3, 9, 8), np.float32)),
        (7, np.zeros((2, 3, 9, 9), np.float32)),
        (8, np.zeros((1, 3, 3), np.uint8)),
    ],
)
def test_compiled_code_refuses_arrays_that_do_not_fit(argument: int, wrong: NDArray[np.generic]) -> None:
    assert compiled.decode_stamps is not None
    arguments = compiled_arguments(PLAIN, (0, len(PLAIN)), 9, False)
    compiled.decode_stamps(*arguments)
    arguments[argument] = wrong
    with pytest.raises(ValueError, match=r"an array has a wrong shape or type|decode_stamps: "):
        compiled.decode_stamps(*arguments)


def test_first_failed_stamp_of_each_record_is_reported() -> None:
    bodies = [memoryview(PLAIN + b"junk"), memoryview(PLAIN)]
    whole, junk, none = (0, len(PLAIN)), (len(PLAIN), len(PLAIN) + 4), (-1, -1)
    spans = np.array([[whole, junk, none], [whole, whole, whole]])
    slots, boxes = np.empty((2, 3, 63, 63), np.float32), np.empty((2, 3, 4), np.int16)
    failed = decode_stamps(bodies, spans, np.array([False, False]), slots, boxes)
    assert {row: (c, error.reason) for row, (c, error) in failed.items()} == {0: (1, RejectReason.BAD_CUTOUT)}
    assert (slots[1] == numbered(63, 63)).all()
    assert boxes[1].tolist() == [[0, 0, 63, 63]] * 3


def astropy_planes(stamp: bytes) -> dict[str, NDArray[np.float32]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with fits.open(io.BytesIO(stamp), memmap=False) as hdus:
            return {hdu.name: hdu.data.astype(np.float32) for hdu in hdus[1:]}


def placed(image: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    """Return the image in a slot of `size` pixels, its central pixel at the centre of the slot."""
    slot = np.zeros((size + 2 * LARGE, size + 2 * LARGE), np.float32)
    first = [LARGE + size // 2 - length // 2 for length in image.shape]
    slot[first[0] : first[0] + image.shape[0], first[1] : first[1] + image.shape[1]] = image
    return slot[LARGE:-LARGE, LARGE:-LARGE]


@pytest.mark.parametrize("size", [31, 63, 102])
def test_planes_of_every_shared_lsst_stamp_are_bit_identical_to_astropy(shared_data: Path, size: int) -> None:
    shapes = set()
    for stamp in shared_lsst_stamps(shared_data):
        planes = astropy_planes(stamp)
        expected = {
            "variance": (True, bits(placed(planes["UNCERT"], size))),
            "psf": (True, bits(placed(planes["PSFIMAGE"], PSF_SIZE))),
        }
        assert python_planes(stamp, size, True) == expected
        if compiled.decode_stamps is not None:
            assert compiled_planes(stamp, size, True) == expected
        shapes.add(planes["PSFIMAGE"].shape)
    assert len(shapes) > 1


ONE_POSITIVE = np.full((30, 30), -1, np.float32)
ONE_POSITIVE[15, 15] = 2


@pytest.mark.parametrize(
    ("stamp", "usable"),
    [
        (LSST, (True, True)),
        (fits_bytes_of(IMAGE, PSF, VARIANCE), (True, True)),
        (fits_bytes_of(IMAGE, image_hdu(numbered(30, 30), "MASK"), VARIANCE, PSF), (True, True)),
        (fits_bytes_of(IMAGE, image_hdu(np.ones((30, 30), np.uint8), "MASK"), VARIANCE, PSF), (True, True)),
        (fits_bytes_of(IMAGE, variance_hdu(numbered(30, 30).astype(np.float64)), PSF), (True, True)),
        (fits_bytes_of(IMAGE, variance_hdu(ONE_POSITIVE), image_hdu(gaussian(43, 45), "PSFIMAGE")), (True, True)),
        (fits_bytes_of(IMAGE, image_hdu(gaussian(11, 17).astype(np.float32), "PSFIMAGE")), (False, True)),
        (fits_bytes_of(IMAGE, variance_hdu(numbered(30, 30)), image_hdu(np.ones((1, 1)), "PSFIMAGE")), (True, True)),
        (fits_bytes_of(fits.PrimaryHDU(numbered(1, 1)), variance_hdu(numbered(1, 1)), PSF), (True, True)),
        (fits_bytes_of(fits.PrimaryHDU(numbered(20, 40)), variance_hdu(numbered(20, 40)), PSF), (True, True)),
        (fits_bytes_of(IMAGE), (False, False)),
        (fits_bytes_of(IMAGE, VARIANCE), (True, False)),
        (fits_bytes_of(IMAGE, variance_hdu(numbered(30, 30), "StdDevUncertainty"), PSF), (False, True)),
        (fits_bytes_of(IMAGE, image_hdu(numbered(30, 30), "UNCERT"), PSF), (False, True)),
        (fits_bytes_of(IMAGE, variance_hdu(numbered(30, 31)), PSF), (False, True)),
        (fits_bytes_of(IMAGE, variance_hdu(np.full((30, 30), np.nan, np.float32)), PSF), (False, True)),
        (fits_bytes_of(IMAGE, variance_hdu(np.full((30, 30), np.inf, np.float32)), PSF), (False, True)),
        (fits_bytes_of(IMAGE, variance_hdu(np.zeros((30, 30), np.float32)), PSF), (False, True)),
        (fits_bytes_of(IMAGE, variance_hdu(-numbered(30, 30)), PSF), (False, True)),
        (fits_bytes_of(IMAGE, VARIANCE, image_hdu(np.zeros((41, 41)), "PSFIMAGE")), (True, False)),
        (fits_bytes_of(IMAGE, VARIANCE, image_hdu(np.full((41, 41), np.nan), "PSFIMAGE")), (True, False)),
        (fits_bytes_of(IMAGE, VARIANCE, image_hdu(np.ones((2, 41, 41)), "PSFIMAGE")), (True, False)),
        (fits_bytes_of(IMAGE, TABLE, VARIANCE, PSF), (False, False)),
        (fits_bytes_of(IMAGE, image_hdu(None, "UNCERT"), PSF), (False, False)),
        (fits_bytes_of(IMAGE, *[image_hdu(numbered(3, 3), "MASK")] * MAX_EXTENSIONS, VARIANCE), (False, False)),
        (LSST[:-6000], (True, False)),
        (LSST[:12_000], (False, False)),
        (LSST + bytes(2880), (True, True)),
        (fits_bytes_of(IMAGE) + b"X" * 5000, (False, False)),
        (LSST.replace(b"XTENSION", b"xtension"), (False, False)),
        (fits_bytes_of(IMAGE) + fits_header(b"XTENSION= 'IMAGE   '", *MANDATORY[1:3], b"NAXIS1  = 999999999",
                                            b"NAXIS2  = 999999999", b"END"), (False, False)),
        (fits_bytes_of(IMAGE) + fits_header(b"XTENSION= 'IMAGE   '", *[b"HIERARCH a b = 1"] * 50_000), (False, False)),
    ],
    ids=[
        "lsst", "other-order", "with-mask", "with-byte-mask", "variance-float64", "one-positive-variance", "psf-only",
        "psf-1px", "1px", "non-square", "no-planes", "no-psf", "standard-deviation", "unknown-uncertainty",
        "another-shape", "variance-nan", "variance-inf", "variance-zero", "variance-negative", "psf-zero", "psf-nan",
        "psf-cube", "table-first", "empty-extension", "too-many-extensions", "truncated-psf", "truncated-variance",
        "padded", "junk", "no-extension-keyword", "huge-axes", "no-end",
    ],
)  # fmt: skip
@pytest.mark.parametrize("gzipped", [False, True])
def test_unusable_planes_are_nan_and_never_change_the_image(
    stamp: bytes, usable: tuple[bool, bool], gzipped: bool
) -> None:
    data = gzip.compress(stamp) if gzipped else stamp
    slots, boxes = np.empty((1, 3, 63, 63), np.float32), np.empty((1, 3, 4), np.int16)
    planes = PlaneSlots(
        np.empty_like(slots), np.empty((1, 3, PSF_SIZE, PSF_SIZE), np.float32), np.ones((1, 3, 2), bool)
    )
    spans = np.array([[(0, len(data))] * 3])
    assert not decode_stamps([memoryview(data)], spans, np.array([True]), slots, boxes, planes)
    assert planes.usable.tolist() == [[list(usable)] * 3]
    alone, alone_boxes = np.empty_like(slots), np.empty_like(boxes)
    assert not decode_stamps([memoryview(data)], spans, np.array([True]), alone, alone_boxes)
    assert bits(slots) == bits(alone)
    assert boxes.tolist() == alone_boxes.tolist()
    expected = python_planes(data, 63, True)
    assert planes.variance is not None
    assert planes.psf is not None
    for slot, name, good in zip((planes.variance, planes.psf), ("variance", "psf"), usable, strict=True):
        assert expected[name] == (good, bits(slot[0, 0]))
        assert np.isnan(slot).all() == (not good)


@needs_compiled
@pytest.mark.parametrize("gzipped", [False, True])
@pytest.mark.parametrize("stamp", ["ztf", "lsst"])
def test_compiled_code_decides_the_planes_of_the_layouts_of_surveys(stamp: str, gzipped: bool) -> None:
    data = gzip.compress(FUZZED[stamp]) if gzipped else FUZZED[stamp]
    assert compiled_planes(data, 63, True) == python_planes(data, 63, True)
    assert {usable for usable, _ in compiled_planes(data, 63, True).values()} == {stamp == "lsst"}


@pytest.mark.parametrize("wanted", ["variance", "psf"])
def test_a_plane_that_is_not_wanted_is_not_decoded(wanted: str) -> None:
    slots, boxes = np.empty((1, 3, 63, 63), np.float32), np.empty((1, 3, 4), np.int16)
    planes = PlaneSlots(
        np.empty_like(slots) if wanted == "variance" else None,
        np.empty((1, 3, PSF_SIZE, PSF_SIZE), np.float32) if wanted == "psf" else None,
        np.ones((1, 3, 2), bool),
    )
    decode_stamps([memoryview(LSST)], np.array([[(0, len(LSST))] * 3]), np.array([True]), slots, boxes, planes)
    assert planes.usable.tolist() == [[[wanted == "variance", wanted == "psf"]] * 3]


UNDECIDED_PSF = image_hdu(numbered(31, 31).astype(np.int16), "PSFIMAGE")
"""A PSF image that the compiled code leaves to Python, because its pixels are integers."""
WITH_UNDECIDED_PSF = fits_bytes_of(fits.PrimaryHDU(numbered(30, 30), fits.Header({"BUNIT": "nJy"})), UNDECIDED_PSF)
CARDS = [
    f"{keyword:8}= {value}".ljust(80).encode()
    for keyword, values in {
        "SIMPLE": ("T", "F"),
        "XTENSION": ("'IMAGE   '", "'IMAGE'", "'BINTABLE'"),
        "BITPIX": ("-32", "-64", "16", "8", "-032"),
        "NAXIS": ("2", "02", "3", "0"),
        "NAXIS1": ("30", "31", "0000000030", "1", "0", "999999999", "30.", "+30"),
        "NAXIS2": ("30", "31", "0000000030", "1"),
        "PCOUNT": ("0", "1", "00"),
        "EXTNAME": ("'PSFIMAGE'", "'UNCERT  '", "'UNCERT'", "'MASK'", ""),
        "UTYPE": ("'VarianceUncertainty'", "'StdDevUncertainty'", "'VarianceUncertainty ' / x"),
        "BLANK": ("'nJy'", "1"),
        "BSCALE": ("2", "x", "1E999"),
    }.items()
    for value in values
] + [b"END".ljust(80), b"END=".ljust(80), b"END     x".ljust(80), b"ENDTIME = 1".ljust(80)]


def decode_all(
    stamp: bytes, size: int, monkeypatch: pytest.MonkeyPatch | None = None
) -> dict[int, RejectReason] | list[bytes]:
    """Return the outputs of `decode_stamps` for a stamp with both planes, or the reasons why it is unusable.

    With `monkeypatch`, the compiled code is not used.
    """
    slots, boxes = np.full((1, 3, size, size), 7, np.float32), np.zeros((1, 3, 4), np.int16)
    psf, usable = np.full((1, 3, PSF_SIZE, PSF_SIZE), 7, np.float32), np.zeros((1, 3, 2), bool)
    planes = PlaneSlots(np.full_like(slots, 7), psf, usable)
    spans = np.array([[(0, len(stamp))] * 3])
    if monkeypatch:
        monkeypatch.setattr(compiled, "decode_stamps", None)
    failed = decode_stamps([memoryview(stamp)], spans, np.array([True]), slots, boxes, planes)
    if failed:
        return {c: error.reason for c, error in failed.values()}
    return [array.tobytes() for array in (slots, boxes, planes.variance, psf, usable) if array is not None]


@pytest.mark.parametrize(
    ("card", "changed", "usable"),
    [
        (b"NAXIS1  =                   30", b"NAXIS1  = 00000000000000000030", False),
        (b"BUNIT   = 'nJy     '", b"BLANK   = 'nJy     '", True),  # BLANK has no meaning for floating-point pixels
    ],
    ids=["many-digits", "blank-of-floats"],
)
def test_stamp_with_an_unusual_card_gives_the_same_in_both_implementations(
    card: bytes, changed: bytes, usable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stamp = WITH_UNDECIDED_PSF.replace(card, changed, 1)
    assert stamp != WITH_UNDECIDED_PSF
    found = decode_all(stamp, 31)
    assert isinstance(found, list) == usable
    assert found == decode_all(stamp, 31, monkeypatch)


@needs_compiled
@settings(max_examples=400)
@given(
    stamp=st.sampled_from([FUZZED["ztf"], LSST, WITH_UNDECIDED_PSF]),
    changes=st.lists(st.tuples(st.integers(0, 60), st.sampled_from(CARDS)), min_size=1, max_size=3),
    size=st.sampled_from([1, 2, 30, 31, 63]),
)
def test_exchanged_cards_never_make_the_implementations_differ(
    stamp: bytes, changes: list[tuple[int, bytes]], size: int
) -> None:
    changed = bytearray(stamp)
    starts = [at for at in range(0, len(stamp), 80) if stamp[at : at + 3] == b"END" or stamp[at + 8 : at + 10] == b"= "]
    for which, card in changes:
        at = starts[which % len(starts)]
        changed[at : at + 80] = card
    with pytest.MonkeyPatch.context() as patched:
        assert decode_all(bytes(changed), size) == decode_all(bytes(changed), size, patched)


@pytest.mark.parametrize("end", [b"END=", b"END   x", b"END/ end"])
@pytest.mark.parametrize("stamp", ["ztf", "lsst"])
def test_stamp_with_a_damaged_end_card_is_refused(stamp: str, end: bytes) -> None:
    damaged = FUZZED[stamp].replace(b"END".ljust(80), end.ljust(80), 1)
    assert rejection(damaged) is RejectReason.BAD_CUTOUT  # not read with the pixels of the next extension
    assert decode_all(damaged, 31) == {0: RejectReason.BAD_CUTOUT}


def test_keyword_that_begins_with_end_does_not_end_a_header() -> None:
    assert bits(pixels(fits_bytes(numbered(30, 30), ENDTIME=1.5))) == bits(numbered(30, 30))


def test_signalling_nan_in_a_psf_image_makes_it_unusable_without_a_warning() -> None:
    psf = gaussian(31, 31)
    stamp = bytearray(fits_bytes_of(IMAGE, VARIANCE, image_hdu(psf, "PSFIMAGE")))
    start = stamp.index(psf.astype(">f8").tobytes())
    stamp[start : start + 8] = bytes.fromhex("7ff0000000000001")
    assert [usable for usable, _ in python_planes(bytes(stamp), 31, True).values()] == [True, False]
