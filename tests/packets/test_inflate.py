"""Decompressing several stamps in parallel gives the correct pixels, for all encoders and for damaged stamps."""

from __future__ import annotations

import gzip
import io
import struct
import zlib
from collections.abc import Sequence

import deflate
import fastavro
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from broker_filter.packets import compiled
from broker_filter.packets.batch import PLANES
from broker_filter.packets.stamps import decode_stamp
from tests.packets.test_stamps import CUTOUT_FIELDS, bits, fits_bytes, needs_compiled, numbered

SIZE = 63
DRAW = np.random.default_rng(8)
IMAGES = {
    "noise": DRAW.normal(200, 5, (63, 63)).astype(np.float32),  # literals and short repetitions
    "numbers": numbered(63, 63),
    "constant": np.full((63, 63), 3.5, np.float32),  # one long repetition
    "rows": np.tile(DRAW.normal(size=63).astype(np.float32), (63, 1)),  # repetitions at the distance of a row
    "small": DRAW.normal(size=(7, 11)).astype(np.float32),
    "bytes": DRAW.integers(0, 2**32, (63, 63), np.uint32).view(np.float32),  # incompressible: stored blocks
}


def gzip_by_zlib(file: bytes, level: int = 9, strategy: int = zlib.Z_DEFAULT_STRATEGY, flush: int = 0) -> bytes:
    """Compress in pieces of `flush` bytes, each of which becomes at least one block."""
    encoder = zlib.compressobj(level, zlib.DEFLATED, 31, 9, strategy)
    pieces = [file[i : i + flush] for i in range(0, len(file), flush)] if flush else [file]
    return b"".join(encoder.compress(piece) + encoder.flush(zlib.Z_FULL_FLUSH) for piece in pieces) + encoder.flush()


ENCODERS = {
    **{f"level {level}": lambda file, level=level: gzip_by_zlib(file, level) for level in range(10)},
    "Huffman": lambda file: gzip_by_zlib(file, 9, zlib.Z_HUFFMAN_ONLY),
    "runs": lambda file: gzip_by_zlib(file, 9, zlib.Z_RLE),
    "fixed codes": lambda file: gzip_by_zlib(file, 9, zlib.Z_FIXED),
    "many blocks": lambda file: gzip_by_zlib(file, 6, flush=700),
    "with a name": lambda file: b"\x1f\x8b\x08\x08" + bytes(6) + b"a.fits\0" + gzip_by_zlib(file)[10:],
}


def decode_together(stamps: Sequence[bytes]) -> tuple[NDArray[np.bool_], NDArray[np.float32]]:
    """Return whether the compiled code decoded each stamp, and the slots of the stamps."""
    assert compiled.decode_stamps is not None
    n = -(-len(stamps) // 3)
    slots, boxes = np.zeros((n, 3, SIZE, SIZE), np.float32), np.zeros((n, 3, 4), np.int16)
    taken, spans = np.zeros((n, 3), bool), np.full((n, 3, 2), -1)
    ends = np.cumsum([0, *map(len, stamps)])
    spans.reshape(-1, 2)[: len(stamps)] = np.stack([ends[:-1], ends[1:]], axis=1)
    bodies = [memoryview(b"".join(stamps))] * n
    states = np.zeros((n, 3, len(PLANES)), np.uint8)
    compiled.decode_stamps(bodies, spans, np.zeros(n, bool), slots, boxes, taken, None, None, states)
    return taken.reshape(-1)[: len(stamps)], slots.reshape(-1, SIZE, SIZE)[: len(stamps)]


def slowly(stamp: bytes) -> NDArray[np.float32]:
    slot = np.empty((SIZE, SIZE), np.float32)
    decode_stamp(stamp, slot, centred=False)
    return slot


@needs_compiled
@pytest.mark.parametrize("n", [1, 3, 4, 5, 90])
def test_stamps_of_all_encoders_are_decompressed_together(n: int) -> None:
    stamps = [encode(fits_bytes(image)) for image in IMAGES.values() for encode in ENCODERS.values()][:n]
    taken, slots = decode_together(stamps)
    assert taken.all()
    for stamp, slot in zip(stamps, slots, strict=True):
        assert bits(slot) == bits(slowly(stamp))


@needs_compiled
def test_a_refused_stream_does_not_affect_the_others() -> None:
    sound = gzip_by_zlib(fits_bytes(IMAGES["noise"]))
    stamps = [
        sound,
        b"\x1f\x8b\x08\x00" + bytes(40),
        b"",
        sound[:-1],
        sound[:2000],
        sound,
        fits_bytes(IMAGES["rows"]),
    ] * 5
    taken, slots = decode_together(stamps)
    assert taken.tolist() == [True, False, False, False, False, True, True] * 5
    assert all(bits(slots[k]) == bits(slowly(sound)) for k in range(len(stamps)) if k % 7 in (0, 5))


@needs_compiled
@pytest.mark.parametrize("level", range(1, 13))
def test_output_of_libdeflate_is_decoded_in_c_or_in_python(level: int) -> None:
    for image in IMAGES.values():
        stamp = bytes(deflate.gzip_compress(fits_bytes(image), level))
        taken, slots = decode_together([stamp] * 5)
        assert bits(slowly(stamp)) == bits(slowly(fits_bytes(image)))
        assert all(bits(slot) == bits(slowly(stamp)) for slot in slots[taken])


SOUND = gzip_by_zlib(fits_bytes(IMAGES["small"]))


@needs_compiled
@pytest.mark.parametrize(
    "stamp",
    [
        SOUND[:-8] + struct.pack("<I", zlib.crc32(b"another")) + SOUND[-4:],
        SOUND[:-4] + struct.pack("<I", 5759),
        SOUND[:-4] + struct.pack("<I", 5761),
        SOUND[:-8] + b"\0" + SOUND[-8:],  # an extra byte between the stream and its checksum
        SOUND[:-9] + SOUND[-8:],
        b"\x1f\x8b\x08\x04" + SOUND[4:10] + b"\x02\x00ab" + SOUND[10:],  # an extra field: valid, but rare
        b"\x1f\x8b\x07" + SOUND[3:],
        gzip.compress(b""),
    ],
    ids=["checksum", "too-long", "too-short", "junk", "no-last-byte", "extra-field", "method", "nothing"],
)
def test_unusual_or_damaged_gzip_files_are_left_to_python(stamp: bytes) -> None:
    assert not decode_together([stamp] * 6)[0].any()


@needs_compiled
@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(sorted(IMAGES)),
            st.sampled_from(sorted(ENCODERS)),
            st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=2),
            st.one_of(st.just(1.0), st.floats(0, 1)),
        ),
        min_size=4,
        max_size=8,
    )
)
def test_a_damaged_stamp_is_decoded_in_c_only_if_its_pixels_are_correct(
    drawn: list[tuple[str, str, list[tuple[float, int]], float]],
) -> None:
    stamps = []
    for image, encoder, edits, kept in drawn:
        stamp = bytearray(ENCODERS[encoder](fits_bytes(IMAGES[image])))
        for at, value in edits:
            stamp[int(at * len(stamp))] = value
        stamps.append(bytes(stamp[: int(kept * len(stamp))]))
    taken, slots = decode_together(stamps)
    for stamp, slot in zip((stamps[k] for k in np.flatnonzero(taken)), slots[taken], strict=True):
        assert bits(slot) == bits(slowly(stamp))


@needs_compiled
def test_every_shared_ztf_stamp_decodes_in_a_batch_as_it_does_alone(ztf_packets: list[tuple[int, bytes]]) -> None:
    for start in range(0, len(ztf_packets), 100):
        alerts = [next(fastavro.reader(io.BytesIO(packet))) for _, packet in ztf_packets[start : start + 100]]
        stamps = [alert[field]["stampData"] for alert in alerts for field in CUTOUT_FIELDS]
        taken, slots = decode_together(stamps)
        assert taken.all()
        assert all(bits(slot) == bits(slowly(stamp)) for stamp, slot in zip(stamps, slots, strict=True))
