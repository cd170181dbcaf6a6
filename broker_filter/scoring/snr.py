"""The normalisation `snr`: pixels in units of their noise, so that a network sees the same units from every survey.

For each stamp: its background is subtracted (science and template), each pixel is divided by its noise, and the ratio
is compressed with arcsinh, which is linear up to the noise and logarithmic beyond, so that bright stars stay below 22.
It never gives NaN or infinity, whatever the pixels are.

- Background: the median of the pixels, without pixels farther than 3 standard deviations from a first median. LSST
  subtracts the sky already; ZTF does not. The difference image keeps its zero: on real alerts its median is 0.1 (LSST)
  and 0.03 (ZTF) of the noise.
- Noise: the square root of the variance plane where that is positive and finite. Elsewhere it is 1.4826 x the median
  absolute deviation (MAD) of the same clipped pixels, 1 if that is 0. On 151 real alerts of LSSTCam the MAD of the
  difference image is 1.06 of the median of the plane.
- Pixels that are NaN, infinite or beyond MAX_FLUX (ZTF marks some with 3.4e38) become 0.

`snr_numpy` is the reference. The compiled twin in `_normalise.c` has bit-identical results: all arithmetic is float32,
in the same order, and a median of an even number of pixels is the lower of the two middle ones.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

SUBTRACTED = ("science", "template")
"""The cutouts from which the background is subtracted."""
MAX_FLUX = np.float32(1e30)
"""Pixels beyond this value are not measurements. Differences of smaller ones cannot overflow float32."""
MAX_SNR = np.float32(1e9)
"""Largest ratio of a pixel to its noise; its square does not overflow float32."""
SIGMA_PER_MAD = np.float32(1.4826)
"""The standard deviation of a normal distribution in units of its median absolute deviation."""
CLIP = np.float32(3) * SIGMA_PER_MAD
"""Pixels farther from the median than this multiple of the MAD belong to sources. One such clip brings the noise of 31
px around ZTF's sources from 1.19 (template) to 1.02 of its value after five."""
_SQRT_HALF_BITS, _MANTISSA_BITS = np.int32(0x3F3504F3), np.int32(23)
"""The bits of the float32 next to 0.5^0.5, and the width of the mantissa."""
_LN2 = np.float32(0.6931472)
_LOG_SERIES = tuple(np.float32(2 / odd) for odd in (9, 7, 5, 3))
"""log(m) = 2 t + 2/3 t^3 + ... for t = (m - 1) / (m + 1); exact in float32 for m from 0.5^0.5 to 2^0.5."""


def snr_numpy(
    pixels: NDArray[np.float32],
    variance: NDArray[np.float32],
    boxes: NDArray[np.int16],
    subtracted: NDArray[np.bool_],
    padding: float,
    normalised: NDArray[np.float32],
) -> None:
    """Normalise M stamps `pixels` float32[M, S, S] with boxes int16[M, 4] into `normalised`, of the same shape.

    `variance` float32[M, S, S]: NaN where it is unknown. `subtracted` bool[M]: whether the background of a stamp is
    subtracted. Pixels outside the box become `padding`. No argument but `normalised` is changed.
    """
    m, size = len(pixels), pixels.shape[-1]
    index = np.arange(size)
    y0, x0, height, width = (boxes[:, k, None] for k in range(4))
    in_rows, in_columns = (index >= y0) & (index < y0 + height), (index >= x0) & (index < x0 + width)
    inside = (in_rows[:, :, None] & in_columns[:, None, :]).reshape(m, size * size)
    values = pixels.reshape(m, size * size)
    measured = inside & (np.abs(values) < MAX_FLUX)  # false for NaN
    values = np.where(measured, values, np.float32(0)) + np.float32(0)  # -0 becomes 0
    centre, noise = _background_and_noise(values, measured)
    values -= np.where(subtracted[:, None], centre, np.float32(0))
    known = variance.reshape(m, size * size)
    with np.errstate(invalid="ignore", over="ignore"):
        sigma = np.where((known > 0) & (known < np.inf), np.sqrt(known), noise)
        ratio = np.minimum(np.maximum(values / sigma, -MAX_SNR), MAX_SNR)
    compressed = np.where(measured, arcsinh(ratio), np.float32(0))
    normalised.reshape(m, size * size)[:] = np.where(inside, compressed, np.float32(padding))


def arcsinh(ratio: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return arcsinh of values of at most MAX_SNR, float32, to 2e-7 of max(1, |arcsinh|).

    It uses exactly rounded operations only, so that compiled code gives the same bits on every processor; libraries
    differ in the last bit.
    """
    size = np.abs(ratio)
    whole = size + np.sqrt(size * size + np.float32(1))  # arcsinh x = log(x + sqrt(x^2 + 1))
    bits = whole.view(np.int32)
    exponent = (bits - _SQRT_HALF_BITS) >> _MANTISSA_BITS
    mantissa = (bits - (exponent << _MANTISSA_BITS)).view(np.float32)
    t = (mantissa - np.float32(1)) / (mantissa + np.float32(1))
    square = t * t
    series = np.zeros_like(t)
    for coefficient in _LOG_SERIES:
        series = (series + coefficient) * square
    logarithm = exponent.astype(np.float32) * _LN2 + t * (series + np.float32(2))
    return np.copysign(logarithm, ratio)


def _background_and_noise(
    values: NDArray[np.float32], measured: NDArray[np.bool_]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the clipped median and 1.4826 x MAD of the measured pixels of M stamps, both float32[M, 1]."""
    first = _median(values, measured)
    deviation = np.abs(values - first)
    kept = measured & (deviation <= CLIP * _median(deviation, measured))
    centre = _median(values, kept)
    noise = SIGMA_PER_MAD * _median(np.abs(values - centre), kept)
    return centre, np.where(noise > 0, noise, np.float32(1))


def _median(values: NDArray[np.float32], chosen: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Return the lower median of the chosen values of each row, float32[M, 1]; 0 if none is chosen."""
    ordered = np.sort(np.where(chosen, values, np.inf), axis=1)
    count = chosen.sum(axis=1, keepdims=True)
    middle = np.take_along_axis(ordered, np.maximum(count - 1, 0) // 2, axis=1)
    return np.where(count > 0, middle, np.float32(0)).astype(np.float32)
