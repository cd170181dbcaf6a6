"""Encodes cutouts as PNG files, without matplotlib, with the asinh stretch of all pictures of cutouts."""

from __future__ import annotations

import struct
import zlib
from base64 import b64encode

import numpy as np
from numpy.typing import NDArray

SKY_SIGMAS = 1.0
BRIGHT_PERCENTILE = 99.8
SOFTENING = 0.2
"""The stretch of a cutout: asinh, from SKY_SIGMAS below the median to BRIGHT_PERCENTILE."""
MAD_TO_SIGMA = 1.4826
UNUSABLE = 1e30
"""The least absolute value that marks a pixel without a measurement, beside NaN: ZTF writes 3.4e38."""
MASKED = 255
"""The entry of the palette that is transparent, for pixels without a measurement."""
BRIGHTEST = MASKED - 1
"""The entry of the palette that is white."""
BITS, INDEXED = 8, 3
"""Bits of an entry, and the type of a picture with a palette, as the PNG header states them."""


def masked_png(pixels: NDArray[np.float32]) -> bytes:
    """Return a grey PNG of pixels float32[H, W], with the first row at the bottom, as in FITS.

    Pixels without a measurement are transparent.
    """
    return shades_png(masked_shades(pixels))


def as_url(png: bytes) -> str:
    """Return the address that holds a PNG, for a page in one file."""
    return f"data:image/png;base64,{b64encode(png).decode()}"


def masked_shades(pixels: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return pixels float32[H, W] as entries of the palette of `shades_png`: MASKED without a measurement.

    Pixels without a measurement are NaN, infinite or beyond UNUSABLE, and do not move the stretch.
    """
    measured = np.isfinite(pixels) & (np.abs(np.nan_to_num(pixels)) < UNUSABLE)
    shades = _stretched(np.where(measured, pixels, np.float32(np.nan)))
    shades[~measured] = MASKED
    return shades


def shades_png(shades: NDArray[np.uint8]) -> bytes:
    """Return the PNG of shades uint8[H, W], with the first row at the bottom; MASKED is transparent."""
    levels = np.round(np.linspace(0, 255, MASKED)).astype(np.uint8)
    palette = np.repeat(np.append(levels, np.uint8(0)), 3).tobytes()
    height, width = shades.shape
    lines = b"".join(b"\0" + line.tobytes() for line in shades[::-1])
    chunks = (
        _chunk(b"IHDR", struct.pack(">2I5B", width, height, BITS, INDEXED, 0, 0, 0)),
        _chunk(b"PLTE", palette),
        _chunk(b"tRNS", b"\xff" * MASKED + b"\0"),
        _chunk(b"IDAT", zlib.compress(lines)),
        _chunk(b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def _stretched(pixels: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return pixels as shades from 0 to BRIGHTEST, uint8[H, W]; NaN is 0."""
    finite = pixels[np.isfinite(pixels)].astype(np.float64)
    sky = float(np.median(finite)) if len(finite) else 0.0
    noise = MAD_TO_SIGMA * float(np.median(np.abs(finite - sky))) if len(finite) else 0.0
    low = sky - SKY_SIGMAS * (noise or 1.0)
    high = max(float(np.percentile(finite, BRIGHT_PERCENTILE)) if len(finite) else 0.0, sky + 10 * (noise or 1.0))
    scaled = np.clip((np.nan_to_num(pixels, nan=low).astype(np.float64) - low) / (high - low), 0, 1)
    shades: NDArray[np.float64] = BRIGHTEST * np.arcsinh(scaled / SOFTENING) / np.arcsinh(1 / SOFTENING)
    return np.round(shades).astype(np.uint8)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
